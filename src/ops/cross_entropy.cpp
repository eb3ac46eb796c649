// lm_head_cross_entropy.
//   in     x [T, D]   w [V, D]   f32|f64, one dtype   labels I32 [T] in [0, V) or kIgnoreLabel
//   grad   dlogits = scale (softmax(logits) - one-hot(label)), dx = dlogits w, dw = dlogits^T x
//   errors shapes; a label outside [0, V); dtypes differ

#include <algorithm>

#include "ops/cpu.h"

namespace pith {
namespace {

// Rows of logits at a time: a pass over w and dw is cheap beside their products.
constexpr i64 kChunkRows = 256;

// The loss of one row; with `grad`, its logits become their gradient.
template <class T>
double row_loss(T* logits, i64 V, int label, T scale, bool grad) {
  if (label == kIgnoreLabel) {
    if (grad) std::fill_n(logits, V, T(0));
    return 0;
  }
  const T at_label = logits[label], top = max_of(logits, V);
  const T sum = exp_sum(logits, V, top);
  if (grad) {
    const T factor = scale / sum;
    for (i64 v = 0; v < V; v++) logits[v] *= factor;
    logits[label] -= scale;
  }
  return std::log(double(sum)) + double(top - at_label);
}

template <class T>
double cross_entropy_cpu(const Op& op, const Tensor& x, const Tensor& w, const Tensor& labels,
                         double scale, const Tensor& dx, const GradSlot& slot) {
  const Slot<T> dw{slot.grad.as<T>(), slot.add};
  const i64 tokens = x.dim[0], V = w.dim[0], most = min(kChunkRows, tokens);
  const bool grad = dx.defined() || dw.data;
  const Tensor logits = op.empty({most, V}, x.dtype);
  vector<double> losses(most);
  double sum = 0;
  for (i64 first = 0; first < tokens; first += kChunkRows) {
    const i64 rows = min(kChunkRows, tokens - first);
    const Tensor part = x.slice_rows(first, first + rows), d = logits.slice_rows(0, rows);
    product<T>(op, part, w, {d.as<T>()}, kNormal, kTransposed);
    parallel_rows(rows, V * 8, [&](i64 r) {
      losses[r] = row_loss(row_of<T>(d, r), V, labels.i32()[first + r], T(scale), grad);
    });
    for (i64 r = 0; r < rows; r++) sum += losses[r];
    if (dx.defined()) product<T>(op, d, w, {row_of<T>(dx, first)});
    product<T>(op, d, part, {dw.data, dw.add || first > 0}, kTransposed);
  }
  if (dw.data && !dw.add && tokens == 0) std::fill_n(dw.data, w.numel(), T(0));
  return sum;
}

}

Tensor lm_head_cross_entropy(Rank& rank, Tensor x, Tensor w, Tensor labels, double scale, At at) {
  const Op op{rank, "lm_head_cross_entropy", at};
  op.check({{"x [T, D] and w [V, D]", x.dim.rank == 2 && w.dim.rank == 2 && x.dim[1] == w.dim[1]},
            {"labels I32 [T]", is_i32(labels, {x.dim[0]})},
            {"one dtype", x.dtype == w.dtype}},
           {&x, &w, &labels});
  Tensor loss = op.empty({1}, x.dtype);
  const Tensor dx = rank.tape && x.needs_grad() ? op.like(x) : Tensor{};
  op.on_cpu(x, [&]<class T>(T*) {
    op.check_ids("labels", labels, w.dim[0], kIgnoreLabel);
    const GradSlot dw = rank.tape ? grad_slot(rank, w, at) : GradSlot{};
    *loss.as<T>() = T(cross_entropy_cpu<T>(op, x, w, labels, scale, dx, dw));
  });
  record(op, {x, w}, {&loss}).bx({dx}, [](const auto& b) {
    if (b.keep[0].defined()) add_grad(b.rank, b.node.in[0], b.keep[0]);
  });
  return loss;
}

}
