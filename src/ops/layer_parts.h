// layer_parts: what several layer ops share on the CPU. defines: float_kernel of a node, writable,
// zeroed, set_backward, check_ids, linear_y, linear_dx, linear_dw, column_blocks, add_columns,
// rms_scale, rms_norm_grad
#pragma once
#include <cmath>
#include <cstring>

#include "ops/cpu.h"
#include "ops/cpu_rows.h"

namespace pith {

// ---- Nodes. -----------------------------------------------------------------------------------

template <class F>
void float_kernel(const Rank& rank, const Node& node, F&& f) {
  float_kernel(rank, node.op, node.at, node.in[0], f);
}

// Where to write the gradient of input k.
template <class T>
Slot<T> writable(Rank& rank, const Node& node, int k) {
  const GradSlot slot = grad_slot(rank, node.in[k], node.at);
  return {slot.grad.as<T>(), slot.add};
}
// The same for ops that only add: a fresh gradient begins as zeros. Undefined if not wanted.
inline Tensor zeroed(Rank& rank, const Node& node, int k) {
  const GradSlot slot = grad_slot(rank, node.in[k], node.at);
  if (slot.grad.data && !slot.add) std::memset(slot.grad.data, 0, slot.grad.bytes());
  return slot.grad;
}

using NodeFunction = void(Rank&, Node&);
// Completes a node whose weights are inputs `weights`. Weight gradients can wait only where they go
// to accumulators: one that another op made the weight from is due in bx, before that op's.
template <NodeFunction* bx, NodeFunction* bw>
void set_backward(Node& node, std::initializer_list<int> weights) {
  bool made = false;
  for (const int k : weights) made |= node.in[k].var >= 0 && !node.in[k].grad;
  node.bx = bx;
  if (made)
    node.bx = [](Rank& rank, Node& n) {
      if constexpr (bx != nullptr) bx(rank, n);
      bw(rank, n);
    };
  else
    node.bw = [](Rank& rank, Node* const* nodes, int n) {
      for (int i = 0; i < n; i++) bw(rank, *nodes[i]);
    };
}

// Throws unless every element of `ids` (I32, in main memory) is in [0, limit) or is `also`; the
// message gives the first that is not.
inline void check_ids(const Rank& rank, const char* op, At at, const char* what, const Tensor& ids,
                      int64_t limit, int32_t also = 0) {
  const int32_t* id = ids.i32();
  for (int64_t i = 0, n = ids.numel(); i < n; i++) {
    if ((id[i] >= 0 && id[i] < limit) || (also && id[i] == also)) continue;
    const string need =
        text("%s in [0,%ld), not %d at element %ld", what, long(limit), id[i], long(i));
    check(rank, op, at, {{need.c_str(), false}}, {&ids});
  }
}

// ---- The products of y = x w^T, x [..., in], w [out, in], y [..., out]. -----------------------

template <class T>
void linear_y(const Tensor& x, const Tensor& w, Slot<T> y) {  // y = or += x w^T
  const int64_t out = w.dim[0], in = w.dim[1];
  gemm<T>(x.rows(), out, in, {x.as<T>(), in}, {w.as<T>(), in, Layout::Transposed}, y.add, y.data,
          out);
}
template <class T>
void linear_dx(const Tensor& dy, const Tensor& w, Slot<T> dx) {  // dx = or += dy w, if wanted
  const int64_t out = w.dim[0], in = w.dim[1];
  if (!dx.data) return;
  gemm<T>(dy.rows(), in, out, {dy.as<T>(), out}, {w.as<T>(), in}, dx.add, dx.data, in);
}
template <class T>
void linear_dw(const Tensor& dy, const Tensor& x, Slot<T> dw) {  // dw = or += dy^T x, if wanted
  const int64_t out = dy.cols(), in = x.cols();
  if (!dw.data) return;
  gemm<T>(out, in, x.rows(), {dy.as<T>(), out, Layout::Transposed}, {x.as<T>(), in}, dw.add,
          dw.data, in);
}

// ---- Columns. ---------------------------------------------------------------------------------

// f(first, n) for blocks of at most kBlockColumns columns, on all threads, each taking `rows` rows.
constexpr int64_t kBlockColumns = 64;
template <class F>
void column_blocks(int64_t rows, int64_t cols, F&& f) {
  parallel_rows((cols + kBlockColumns - 1) / kBlockColumns, rows * kBlockColumns, [&](int64_t b) {
    const int64_t first = b * kBlockColumns, left = cols - first;
    f(first, left < kBlockColumns ? left : kBlockColumns);
  });
}

// to[c] = or += the sum of f(r, c) over r in [0, rows), in the order of r, if wanted.
template <class T, class F>
void add_columns(int64_t rows, int64_t cols, Slot<T> to, F&& f) {
  if (!to.data) return;
  column_blocks(rows, cols, [&](int64_t first, int64_t n) {
    T sum[kBlockColumns] = {};
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < n; c++) sum[c] += f(r, first + c);
    for (int64_t c = 0; c < n; c++) to.put(first + c, sum[c]);
  });
}

// ---- The root mean square norm y = x s w of one row, s = 1 / sqrt(mean(x^2) + eps). -----------

template <class T>
T rms_scale(const T* x, int64_t n, T eps) {
  return 1 / std::sqrt(dot(x, x, n) / n + eps);
}
// dx = s (u - x s^2 mean(u x)), u = dy w. dx may be dy.
template <class T>
void rms_norm_grad(int64_t n, const T* dy, const T* w, const T* x, T s, T* dx) {
  const T along = lane_sum<T>(n, [&](int64_t j) { return dy[j] * w[j] * x[j]; });
  const T c = along * s * s * s / n;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; j++) dx[j] = dy[j] * w[j] * s - x[j] * c;
}

}  // namespace pith
