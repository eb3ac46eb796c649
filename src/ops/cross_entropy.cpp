// lm_head_cross_entropy: sum over tokens of log(sum of e^logits) - logits[label], logits = x w^T.
//   in     x [T, D]   w [V, D]   f32|f64, one dtype   labels I32 [T] in [0, V) or kIgnoreLabel
//   out    [1], the sum in f64      keeps  bx: dx
//   grad   dlogits = scale (softmax(logits) - one-hot(label)), formed in the forward by chunks
//          of rows; w's gradient dlogits^T x is added there too   bx: dx += dlogits w
//   errors shapes; a label outside [0, V); dtypes differ
//   bitwise run-to-run: yes, for any number of threads
#include <algorithm>

#include "ops/layer_parts.h"
#include "ops/ops.h"

namespace pith {

// Rows of logits at a time: enough for one pass over w and dw to be cheap beside the products.
constexpr int64_t kChunkRows = 256;

// The loss of one row; with `grad`, its logits become their gradient.
template <class T>
static double row_loss(T* logits, int64_t V, int32_t label, T scale, bool grad) {
  if (label == kIgnoreLabel) {
    if (grad) std::fill_n(logits, V, T(0));
    return 0;
  }
  const T at_label = logits[label], top = max_of(logits, V);
  const T sum = exp_sum(logits, V, top);
  if (grad) {
    const T factor = scale / sum;
    for (int64_t v = 0; v < V; v++) logits[v] *= factor;
    logits[label] -= scale;
  }
  return std::log(double(sum)) + double(top - at_label);
}

// dx and dw.data may be undefined. `logits` has room for a chunk, `losses` for each of its rows.
template <class T>
static double cross_entropy_cpu(const Tensor& x, const Tensor& w, const Tensor& labels, T scale,
                                const Tensor& logits, double* losses, const Tensor& dx,
                                Slot<T> dw) {
  const int64_t tokens = x.dim[0], V = w.dim[0];
  const bool grad = dx.defined() || dw.data;
  double sum = 0;
  for (int64_t first = 0; first < tokens; first += kChunkRows) {
    const int64_t rows = std::min(kChunkRows, tokens - first);
    const Tensor part = x.slice_rows(first, first + rows), d = logits.slice_rows(0, rows);
    linear_y<T>(part, w, {d.as<T>()});
    parallel_rows(rows, V * 8, [&](int64_t r) {
      losses[r] = row_loss(d.as<T>() + r * V, V, labels.i32()[first + r], scale, grad);
    });
    for (int64_t r = 0; r < rows; r++) sum += losses[r];
    if (dx.defined()) linear_dx<T>(d, w, {dx.as<T>() + first * x.dim[1]});
    linear_dw<T>(d, part, {dw.data, dw.add || first > 0});
  }
  if (dw.data && !dw.add && tokens == 0) std::fill_n(dw.data, w.numel(), T(0));
  return sum;
}

Tensor lm_head_cross_entropy(Rank& rank, Tensor x, Tensor w, Tensor labels, double scale, At at) {
  const char* op = "lm_head_cross_entropy";
  check(rank, op, at,
        {{"x [T, D] and w [V, D]", x.dim.rank == 2 && w.dim.rank == 2 && x.dim[1] == w.dim[1]},
         {"labels I32 [T]", labels.dtype == DType::I32 && labels.dim == Dims{x.dim[0]}},
         {"one dtype", x.dtype == w.dtype}},
        {&x, &w, &labels});
  Tensor loss = empty(rank, {1}, x.dtype, at);
  const int64_t rows = std::min(kChunkRows, x.dim[0]);
  const Tensor logits = empty(rank, {rows, w.dim[0]}, x.dtype, at);
  const Tensor losses = empty(rank, {rows}, DType::F64, at);
  const bool needs_dx = rank.tape && x.needs_grad();
  const Tensor dx = needs_dx ? empty(rank, x.dim, x.dtype, at) : Tensor{};
  float_kernel(rank, op, at, x, [&]<class T>(T*) {
    check_ids(rank, op, at, "labels", labels, w.dim[0], kIgnoreLabel);
    const GradSlot dw = rank.tape ? grad_slot(rank, w, at) : GradSlot{};
    loss.as<T>()[0] =
        static_cast<T>(cross_entropy_cpu<T>(x, w, labels, static_cast<T>(scale), logits,
                                            losses.as<double>(), dx, {dw.grad.as<T>(), dw.add}));
  });
  if (Node* n = record(rank, op, at, {x, w}, {&loss})) {
    n->bx_keep = {dx};
    n->bx = [](Rank& r, Node& node) {
      if (node.bx_keep[0].defined()) add_grad(r, node.in[0], node.bx_keep[0]);
    };
  }
  return loss;
}

}  // namespace pith
