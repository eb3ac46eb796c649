// matmul: c = a b over the last two dimensions, leading ones repeated where 1.
//   in     a [..., M, K]   b [..., K, N]   f32|f64            out    [..., M, N]
//   keeps  a and b         grad  da += dc b^T, db += a^T dc, each summed over repeated products
//   errors inner sizes differ; leading sizes differ and neither is 1; dtypes differ
//   bitwise run-to-run: yes, for any number of threads
#include <cblas.h>

#include <algorithm>
#include <type_traits>

#include "ops/general.h"
#include "ops/ops.h"

namespace pith {

// OpenBLAS computes a tile on the calling thread; the tiles are ours, and of one size, so that the
// order of every sum is the same for any number of threads.
template <class T>
void gemm(int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, T beta, T* c, int64_t ldc,
          T alpha) {
  static const bool one_thread = (openblas_set_num_threads(1), true);
  (void)one_thread;
  constexpr int64_t kTileM = 192, kTileN = 384;
  const bool at = a.layout == Layout::Transposed, bt = b.layout == Layout::Transposed;
  const int64_t across = (n + kTileN - 1) / kTileN, down = (m + kTileM - 1) / kTileM;
  parallel_rows(across * down, std::min(m, kTileM) * std::min(n, kTileN) * k, [&](int64_t tile) {
    const int64_t i = tile / across * kTileM, j = tile % across * kTileN;
    const auto blas = [](auto... x) {
      if constexpr (std::is_same_v<T, float>)
        cblas_sgemm(CblasRowMajor, x...);
      else
        cblas_dgemm(CblasRowMajor, x...);
    };
    blas(at ? CblasTrans : CblasNoTrans, bt ? CblasTrans : CblasNoTrans, std::min(kTileM, m - i),
         std::min(kTileN, n - j), k, alpha, a.data + i * (at ? 1 : a.ld),
         std::max<int64_t>(1, a.ld), b.data + j * (bt ? b.ld : 1), std::max<int64_t>(1, b.ld), beta,
         c + i * ldc + j, ldc);
  });
}
template void gemm<float>(int64_t, int64_t, int64_t, Matrix<float>, Matrix<float>, float, float*,
                          int64_t, float);
template void gemm<double>(int64_t, int64_t, int64_t, Matrix<double>, Matrix<double>, double,
                           double*, int64_t, double);

namespace {

constexpr Layout kNormal = Layout::Normal, kTransposed = Layout::Transposed;

// x with only its leading dimensions.
Tensor leading(Tensor x) {
  x.dim.rank -= 2;
  return x;
}

// c = or += a b for each index of `lead`, to which all their leading dimensions broadcast. Products
// go to different threads where they are written to different places.
template <class T>
void products_cpu(const Dims& lead, const Tensor& a, Layout a_layout, const Tensor& b,
                  Layout b_layout, const Tensor& c, bool add) {
  const int64_t m = c.dim[c.dim.rank - 2], n = c.cols();
  const int64_t k = a_layout == kNormal ? a.cols() : a.dim[a.dim.rank - 2];
  const View va = view_of(leading(a), lead), vb = view_of(leading(b), lead),
             vc = view_of(leading(c), lead);
  const bool apart = vc.x.numel() == lead.numel();
  const Walk walk(lead, {vc, va, vb});
  parallel_rows(lead.numel(), apart ? m * n * k : 0, [&](int64_t p) {
    int64_t at[Walk::kViews];
    walk.locate(p / walk.inner(), p % walk.inner(), at);
    gemm<T>(m, n, k, {a.as<T>() + at[1] * m * k, a.cols(), a_layout},
            {b.as<T>() + at[2] * k * n, b.cols(), b_layout}, add, c.as<T>() + at[0] * m * n, n);
  });
}

void matmul_bx(Rank& rank, Node& node) {
  const Tensor &dc = node.grad[0], &a = node.bx_keep[0], &b = node.bx_keep[1];
  const Dims lead = leading(dc).dim;
  const Tensor da = zeroed(rank, node, 0), db = zeroed(rank, node, 1);
  float_kernel(rank, node, [&]<class T>(T*) {
    if (da.defined()) products_cpu<T>(lead, dc, kNormal, b, kTransposed, da, true);
    if (db.defined()) products_cpu<T>(lead, a, kTransposed, dc, kNormal, db, true);
  });
}

}  // namespace

Tensor matmul(Rank& rank, Tensor a, Tensor b, At at) {
  check_alike(rank, "matmul", at, {&a, &b});
  check(rank, "matmul", at, {{"two dimensions or more", a.dim.rank > 1 && b.dim.rank > 1}},
        {&a, &b});
  const int64_t m = a.dim[a.dim.rank - 2], k = a.cols(), n = b.cols();
  check(rank, "matmul", at,
        {{"a.dim[-1] == b.dim[-2]  (a [..., M, K] x b [..., K, N])", k == b.dim[b.dim.rank - 2]}},
        {&a, &b});
  const Tensor lead_a = leading(a), lead_b = leading(b);
  Dims dims = broadcast(rank, "matmul", at, {&lead_a, &lead_b});
  dims[dims.rank++] = m;
  dims[dims.rank++] = n;
  Dims products = dims;
  if (lead_b.dim.rank == 0 || lead_b.numel() == 1) {  // one b for all: one product of all rows
    products = {1, a.rows(), n};
    a = a.view({1, a.rows(), k});
    b = b.view({1, k, n});
  }
  Tensor c = empty(rank, products, a.dtype, at);
  float_kernel(rank, "matmul", at, a, [&]<class T>(T*) {
    products_cpu<T>(leading(c).dim, a, kNormal, b, kNormal, c, false);
  });
  record_op(rank, "matmul", at, {a, b}, c, matmul_bx, {{a, 2}, {b, 1}});
  return c.view(dims, at);
}

}  // namespace pith
