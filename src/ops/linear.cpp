// linear: y = x w^T + bias.
//   in     x [..., in]   w [out, in]   bias [out] or undefined   f32|f64, one dtype
//   out    [..., out]
//   keeps  bx: w   bw: x      grad  bx: dx += dy w   bw: dw += dy^T x, dbias += sum over rows of dy
//   errors w.dim[1] != x's last size; bias is not [out]; dtypes differ
//   bitwise run-to-run: yes, for any number of threads
#include <algorithm>

#include "ops/layer_parts.h"
#include "ops/ops.h"

namespace pith {

template <class T>
static void linear_cpu(const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& y) {
  const int64_t out = w.dim[0];
  if (bias.defined())
    parallel_rows(x.rows(), out,
                  [&](int64_t r) { std::copy_n(bias.as<T>(), out, y.as<T>() + r * out); });
  linear_y<T>(x, w, {y.as<T>(), bias.defined()});
}

template <class T>
static void linear_bw_cpu(const Tensor& dy, const Tensor& x, Slot<T> dw, Slot<T> dbias) {
  const int64_t out = dy.cols();
  linear_dw(dy, x, dw);
  add_columns(x.rows(), out, dbias,
              [&, d = dy.as<T>()](int64_t r, int64_t j) { return d[r * out + j]; });
}

static void linear_bx(Rank& rank, Node& node) {
  float_kernel(rank, node, [&]<class T>(T*) {
    linear_dx(node.grad[0], node.bx_keep[0], writable<T>(rank, node, 0));
  });
}

static void linear_bw(Rank& rank, Node& node) {
  float_kernel(rank, node, [&]<class T>(T*) {
    linear_bw_cpu(node.grad[0], node.bw_keep[0], writable<T>(rank, node, 1),
                  writable<T>(rank, node, 2));
  });
}

Tensor linear(Rank& rank, Tensor x, Tensor w, Tensor bias, At at) {
  const int64_t out = w.dim[0];
  check(rank, "linear", at,
        {{"x [..., in] and w [out, in]", x.defined() && w.dim.rank == 2 && x.cols() == w.dim[1]},
         {"bias [out] or undefined", !bias.defined() || bias.dim == Dims{out}},
         {"one dtype", x.dtype == w.dtype && (!bias.defined() || bias.dtype == w.dtype)}},
        {&x, &w, &bias});
  Dims dims = x.dim;
  dims[dims.rank - 1] = out;
  Tensor y = empty(rank, dims, x.dtype, at);
  float_kernel(rank, "linear", at, x, [&]<class T>(T*) { linear_cpu<T>(x, w, bias, y); });
  if (Node* n = record(rank, "linear", at, {x, w, bias}, {&y})) {
    n->bx_keep = {w};
    n->bw_keep = {x};
    set_backward<linear_bx, linear_bw>(*n, {1, 2});
  }
  return y;
}

}  // namespace pith
