// matmul: c = a b over the last two dimensions, leading ones repeated where 1.
//   in     a [..., M, K]   b [..., K, N]   f32|f64            out    [..., M, N]
//   keeps  a and b         grad  bx: da += dc b^T, db += a^T dc, each summed over repeated products
//   errors inner sizes differ; leading sizes differ and neither is 1; dtypes differ
//   bitwise run-to-run: yes, for any number of threads
#include <algorithm>

#include <cblas.h>

#include "ops/cpu.h"
#include "ops/ops.h"

namespace pith {

static void blas(CBLAS_TRANSPOSE ta, CBLAS_TRANSPOSE tb, int64_t m, int64_t n, int64_t k,
                 float alpha, const float* a, int64_t lda, const float* b, int64_t ldb, float beta,
                 float* c, int64_t ldc) {
    cblas_sgemm(CblasRowMajor, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
static void blas(CBLAS_TRANSPOSE ta, CBLAS_TRANSPOSE tb, int64_t m, int64_t n, int64_t k,
                 double alpha, const double* a, int64_t lda, const double* b, int64_t ldb,
                 double beta, double* c, int64_t ldc) {
    cblas_dgemm(CblasRowMajor, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

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
        blas(at ? CblasTrans : CblasNoTrans, bt ? CblasTrans : CblasNoTrans,
             std::min(kTileM, m - i), std::min(kTileN, n - j), k, alpha,
             a.data + i * (at ? 1 : a.ld), std::max<int64_t>(1, a.ld), b.data + j * (bt ? b.ld : 1),
             std::max<int64_t>(1, b.ld), beta, c + i * ldc + j, std::max<int64_t>(1, ldc));
    });
}
template void gemm<float>(int64_t, int64_t, int64_t, Matrix<float>, Matrix<float>, float, float*,
                          int64_t, float);
template void gemm<double>(int64_t, int64_t, int64_t, Matrix<double>, Matrix<double>, double,
                           double*, int64_t, double);

}  // namespace pith
