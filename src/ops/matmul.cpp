#include <cblas.h>

#include <algorithm>
#include <type_traits>

#include "ops/cpu.h"

namespace pith {

// OpenBLAS computes a tile on the calling thread; tiles are of one size for any number of threads.
template <class T>
void gemm(i64 m, i64 n, i64 k, Matrix<T> a, Matrix<T> b, T beta, T* c, i64 ldc, T alpha) {
  [[maybe_unused]] static const bool one_thread = (openblas_set_num_threads(1), true);
  constexpr i64 kTileM = 192, kTileN = 384;
  bool at = a.layout == kTransposed, bt = b.layout == kTransposed;
  i64 across = (n + kTileN - 1) / kTileN, down = (m + kTileM - 1) / kTileM;
  parallel_rows(across * down, min(m, kTileM) * min(n, kTileN) * k, [&](i64 tile) {
    i64 i = tile / across * kTileM, j = tile % across * kTileN;
    const auto blas = [](auto... x) {
      if constexpr (std::is_same_v<T, float>)
        cblas_sgemm(CblasRowMajor, x...);
      else
        cblas_dgemm(CblasRowMajor, x...);
    };
    blas(at ? CblasTrans : CblasNoTrans, bt ? CblasTrans : CblasNoTrans, min(kTileM, m - i),
        min(kTileN, n - j), k, alpha, a.data + i * (at ? 1 : a.ld), max<i64>(1, a.ld),
        b.data + j * (bt ? b.ld : 1), max<i64>(1, b.ld), beta, c + i * ldc + j, ldc);
  });
}
template void gemm(i64, i64, i64, Matrix<float>, Matrix<float>, float, float*, i64, float);
template void gemm(i64, i64, i64, Matrix<double>, Matrix<double>, double, double*, i64, double);

Tensor linear(Rank& rank, Tensor x, Tensor w, Tensor bias, At at) {
  Op op{rank, "linear", at};
  i64 out = w.dim[0];
  op.check({{"x [..., in] and w [out, in]", x.defined() && w.dim.rank == 2 && x.cols() == w.dim[1]},
               {"bias [out] or undefined", !bias.defined() || bias.dim == Dims{out}},
               {"one dtype", one_dtype({&x, &w, &bias})}},
      {&x, &w, &bias});
  Tensor y = op.empty(with_size(x.dim, x.dim.rank - 1, out), x.dtype);
  op.typed(x, [&]<class T>(T*) {
    if (bias.defined()) copy_elements<T>(op, y.dim, view_of(bias, y.dim), view_of(y), false);
    product<T>(op, x, w, {y, bias.defined()}, kNormal, kTransposed);
  });
  record(op, {x, w, bias}, {&y})
      .bx({w}, []<class T>(Backward<T> b) { product<T>(b.op(), b.dy(), b.keep[0], b.slot(0)); })
      .bw(1, {x}, []<class T>(Backward<T> b) {
        product<T>(b.op(), b.dy(), b.keep[0], b.slot(1), kTransposed);
        GradSlot dbias = b.slot(2);
        if (dbias.grad.defined()) sum_to<T>(b.op(), b.dy(), dbias);
      });
  return y;
}

namespace {

// x with only its leading dimensions, at least one.
Tensor leading(Tensor x) {
  x.dim.rank -= 2;
  if (x.dim.rank == 0) x.dim = {1};
  return x;
}

// c = or += a b at each index of `lead`, on several threads where products go to different places.
template <class T>
void products(const Op& op, const Dims& lead, const Tensor& a, Layout a_layout, const Tensor& b,
    Layout b_layout, const Tensor& c, bool add) {
  if (!c.defined()) return;
  View va = view_of(leading(a), lead), vb = view_of(leading(b), lead);
  View vc = view_of(leading(c), lead);
  auto at = [&](Tensor x, const View& v, i64 p) {
    i64 rows = x.dim[x.dim.rank - 2], cols = x.cols();
    x.dim = {rows, cols};
    if (x.data) x.data += v.offset(lead, p) * rows * cols * size_of(x.dtype);
    return x;
  };
  auto one = [&](i64 p) {
    product<T>(op, at(a, va, p), at(b, vb, p), {at(c, vc, p), add}, a_layout, b_layout);
  };
  i64 work = c.cols() * a.dim[a.dim.rank - 2] * a.cols();
  if (c.device == Device::CPU && vc.x.numel() == lead.numel()) {
    parallel_rows(lead.numel(), work, one);
  } else {
    for (i64 p = 0; p < lead.numel(); p++) one(p);
  }
}

}

Tensor matmul(Rank& rank, Tensor a, Tensor b, At at) {
  Op op{rank, "matmul", at};
  op.check_alike({&a, &b});
  op.check({{"two dimensions or more", a.dim.rank > 1 && b.dim.rank > 1}}, {&a, &b});
  op.check({{"a.dim[-1] == b.dim[-2]  (a [..., M, K] x b [..., K, N])",
               a.cols() == b.dim[b.dim.rank - 2]}},
      {&a, &b});
  Tensor lead_a = leading(a), lead_b = leading(b);
  Dims lead = op.broadcast({&lead_a, &lead_b});
  Dims dims = lead;
  if (a.dim.rank == 2 && b.dim.rank == 2) dims.rank = 0;
  dims[dims.rank++] = a.dim[a.dim.rank - 2];
  dims[dims.rank++] = b.cols();
  Tensor c = op.empty(dims, a.dtype);
  op.typed(a, [&]<class T>(T*) { products<T>(op, lead, a, kNormal, b, kNormal, c, false); });
  record(op, {a, b}, {&c})
      .bx({b.needs_grad() ? a : Tensor{}, a.needs_grad() ? b : Tensor{}},
          []<class T>(Backward<T> back) {
            const Tensor &dc = back.dy(), da = back.zeroed(0), db = back.zeroed(1);
            Dims each = leading(dc).dim;
            products<T>(back.op(), each, dc, kNormal, back.keep[1], kTransposed, da, true);
            products<T>(back.op(), each, back.keep[0], kTransposed, dc, kNormal, db, true);
          });
  return c;
}

}
