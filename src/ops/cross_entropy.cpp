// dlogits = scale (softmax(logits) - one-hot(label))

#include <algorithm>

#include "ops/cpu.h"

namespace pith {
namespace {

// Logits at a time, a whole number of rows: a pass over w and dw is cheap beside their products.
constexpr i64 kCpuRows = 256, kChunk = i64{1} << 30;

// The loss of one row; with `grad`, its logits become their gradient.
template <class T>
double row_loss(T* logits, i64 V, int label, T scale, bool grad) {
  if (label == kIgnoreLabel) {
    if (grad) std::fill_n(logits, V, T(0));
    return 0;
  }
  T at_label = logits[label], top = max_of(logits, V);
  T sum = exp_sum(logits, V, top);
  if (grad) {
    T factor = scale / sum;
    for (i64 v = 0; v < V; v++) logits[v] *= factor;
    logits[label] = logits[label] - scale;
  }
  return std::log(double(sum)) + double(top - at_label);
}

template <class T>
void cross_entropy(const Op& op, const Tensor& x, const Tensor& w, const Tensor& labels,
    double scale, const Tensor& dx, const GradSlot& dw, const Tensor& loss) {
  i64 tokens = x.dim[0], V = w.dim[0];
  bool grad = dx.defined() || dw.grad.defined(), gpu = x.on_gpu();
  i64 chunks = max<i64>(1, (tokens * V + kChunk - 1) / kChunk);
  i64 most = min(kCpuRows, tokens);
  // PERF: of a GPU's products, those of a multiple of 256 rows are the fastest.
  if (gpu) most = chunks == 1 ? tokens : ((tokens + chunks - 1) / chunks + 255) / 256 * 256;
  Tensor logits = op.empty({most, V}, x.dtype), losses = op.empty({tokens}, DType::F64);
  for (i64 first = 0; first < tokens; first += most) {
    i64 end = min(tokens, first + most);
    Tensor part = x.slice_rows(first, end), d = logits.slice_rows(0, end - first);
    Tensor label = labels.slice_rows(first, end), to = losses.slice_rows(first, end);
    product<T>(op, part, w, {d}, kNormal, kTransposed);
    if (gpu)
      OnCuda<T>::row_losses(op.rank, d, label, scale, grad, to);
    else
      parallel_rows(end - first, V * 8, [&](i64 r) {
        to.as<double>()[r] = row_loss(row_of<T>(d, r), V, label.i32()[r], T(scale), grad);
      });
    if (dx.defined()) product<T>(op, d, w, {dx.slice_rows(first, end)});
    product<T>(op, d, part, {dw.grad, dw.add || first > 0}, kTransposed);
  }
  if (!dw.add && tokens == 0) fill_zero(op.rank, dw.grad);
  double sum = 0;
  if (gpu) return cuda_sum(op.rank, {1, tokens, 1}, losses, loss);
  for (i64 t = 0; t < tokens; t++) sum += losses.as<double>()[t];
  *loss.as<T>() = T(sum);
}

}

Tensor lm_head_cross_entropy(Rank& rank, Tensor x, Tensor w, Tensor labels, double scale, At at) {
  Op op{rank, "lm_head_cross_entropy", at};
  op.check({{"x [T, D] and w [V, D]", x.dim.rank == 2 && w.dim.rank == 2 && x.dim[1] == w.dim[1]},
               {"labels I32 [T]", is_i32(labels, {x.dim[0]})}, {"one dtype", x.dtype == w.dtype}},
      {&x, &w, &labels});
  Tensor loss = op.empty({1}, wide(x.dtype));
  Tensor dx = rank.tape && x.needs_grad() ? op.like(x) : Tensor{};
  op.check_ids("labels", labels, w.dim[0], kIgnoreLabel);
  GradSlot dw = rank.tape ? grad_slot(rank, w, at) : GradSlot{};
  op.typed(x, [&]<class T>(T*) { cross_entropy<T>(op, x, w, labels, scale, dx, dw, loss); });
  record(op, {x, w}, {&loss}).bx({dx}, [](const auto& b) {
    if (b.keep[0].defined()) add_grad(b.rank, b.node.in[0], b.keep[0]);
  });
  return loss;
}

}
