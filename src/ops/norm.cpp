// rms_norm: y = x / sqrt(mean(x^2) + eps) * w, over the last dimension.
// add_rms_norm: sum = x + residual, normed = rms_norm(sum, w, eps), in one pass.
//                                                           Zhang & Sennrich 2019, arXiv:1910.07467
//   in     x, residual [..., D]   w [D]   f32|f64, one dtype         out  like x
//   keeps  bx: x (or sum), w, rstd [rows]   bw: x (or sum), rstd
//   grad   with u = dy w:  bx: dx += rstd (u - x rstd^2 mean(u x)), and dsum, to x and residual
//          bw: dw += sum over rows of dy x rstd
//   errors w is not [D]; residual's shape is not x's; dtypes differ
//   bitwise run-to-run: yes, for any number of threads
#include <algorithm>

#include "ops/layer_parts.h"
#include "ops/ops.h"

namespace pith {

// `residual` may be undefined; then sum is x already.
template <class T>
static void rms_norm_cpu(const Tensor& x, const Tensor& residual, const Tensor& w, double eps,
                         const Tensor& sum, const Tensor& y, const Tensor& rstd) {
  const int64_t D = x.cols();
  parallel_rows(x.rows(), D * 4, [&](int64_t r) {
    T* row = sum.as<T>() + r * D;
    const T* a = x.as<T>() + r * D;
    const T* b = residual.as<T>() + r * D;
    for (int64_t j = 0; residual.defined() && j < D; j++) row[j] = a[j] + b[j];
    const T scale = rms_scale(row, D, static_cast<T>(eps));
    rstd.as<T>()[r] = scale;
    T* out = y.as<T>() + r * D;
    for (int64_t j = 0; j < D; j++) out[j] = row[j] * scale * w.as<T>()[j];
  });
}

// dx = the norm's gradient plus that of the sum; either of dy and dsum may be undefined.
template <class T>
static void rms_norm_bx_cpu(const Tensor& dy, const Tensor& dsum, const Tensor& x, const Tensor& w,
                            const Tensor& rstd, const Tensor& dx) {
  const int64_t D = x.cols();
  parallel_rows(x.rows(), D * 8, [&](int64_t r) {
    T* to = dx.as<T>() + r * D;
    if (dy.defined())
      rms_norm_grad(D, dy.as<T>() + r * D, w.as<T>(), x.as<T>() + r * D, rstd.as<T>()[r], to);
    else
      std::fill_n(to, D, T(0));
    const T* more = dsum.as<T>() + r * D;
    for (int64_t j = 0; dsum.defined() && j < D; j++) to[j] += more[j];
  });
}

template <class T>
static void rms_norm_bw_cpu(const Tensor& dy, const Tensor& x, const Tensor& rstd, Slot<T> dw) {
  const int64_t D = x.cols();
  const T *g = dy.as<T>(), *row = x.as<T>(), *scale = rstd.as<T>();
  add_columns(x.rows(), D, dw,
              [=](int64_t r, int64_t j) { return g[r * D + j] * (row[r * D + j] * scale[r]); });
}

// Outputs of a node are the normed rows or, with a residual, the sum and these.
static void rms_norm_bx(Rank& rank, Node& node) {
  const TensorList& keep = node.bx_keep;
  const bool summed = node.out.count == 2;
  const Tensor dx = empty(rank, keep[0].dim, keep[0].dtype, node.at);
  float_kernel(rank, node, [&]<class T>(T*) {
    rms_norm_bx_cpu<T>(node.grad[summed], summed ? node.grad[0] : Tensor{}, keep[0], keep[1],
                       keep[2], dx);
  });
  if (summed && node.in[1].needs_grad()) {
    Tensor copy = empty(rank, dx.dim, dx.dtype, node.at);
    std::copy_n(dx.data, dx.bytes(), copy.data);
    add_grad(rank, node.in[1], copy);
  }
  add_grad(rank, node.in[0], dx);
}

static void rms_norm_bw(Rank& rank, Node& node) {
  const Tensor& dy = node.grad[node.out.count - 1];
  if (!dy.defined()) return;
  float_kernel(rank, node, [&]<class T>(T*) {
    rms_norm_bw_cpu(dy, node.bw_keep[0], node.bw_keep[1], writable<T>(rank, node, 2));
  });
}

// Both ops: sum is x where there is no residual.
static AddRmsNorm norm_of_sum(Rank& rank, const char* op, const Tensor& x, const Tensor& residual,
                              const Tensor& w, double eps, At at) {
  const bool summed = residual.defined();
  check(rank, op, at,
        {{"x [..., D] and w [D]", x.defined() && w.dim == Dims{x.cols()}},
         {"residual of x's shape", !summed || residual.dim == x.dim},
         {"one dtype", x.dtype == w.dtype && (!summed || x.dtype == residual.dtype)}},
        {&x, &residual, &w});
  AddRmsNorm all{summed ? empty(rank, x.dim, x.dtype, at) : x, empty(rank, x.dim, x.dtype, at)};
  const Tensor rstd = empty(rank, {x.rows()}, x.dtype, at);
  float_kernel(rank, op, at, x, [&]<class T>(T*) {
    rms_norm_cpu<T>(x, residual, w, eps, all.sum, all.normed, rstd);
  });
  Node* n = summed ? record(rank, op, at, {x, residual, w}, {&all.sum, &all.normed})
                   : record(rank, op, at, {x, residual, w}, {&all.normed});
  if (n) {
    n->bx_keep = {all.sum, w, rstd};
    n->bw_keep = {all.sum, rstd};
    set_backward<rms_norm_bx, rms_norm_bw>(*n, {2});
  }
  return all;
}

Tensor rms_norm(Rank& rank, Tensor x, Tensor w, double eps, At at) {
  return norm_of_sum(rank, "rms_norm", x, {}, w, eps, at).normed;
}

AddRmsNorm add_rms_norm(Rank& rank, Tensor x, Tensor residual, Tensor w, double eps, At at) {
  check(rank, "add_rms_norm", at, {{"a residual", residual.defined()}}, {&x, &residual});
  return norm_of_sum(rank, "add_rms_norm", x, residual, w, eps, at);
}

}  // namespace pith
