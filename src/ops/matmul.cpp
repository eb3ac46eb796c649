// matmul: c = a b over the last two dimensions, leading ones repeated where 1.
//   in     a [..., M, K]   b [..., K, N]   f32|f64            out    [..., M, N]
//   keeps  a and b         grad  bx: da += dc b^T, db += a^T dc, each summed over repeated products
//   errors inner sizes differ; leading sizes differ and neither is 1; dtypes differ
//   bitwise run-to-run: yes, for any number of threads
#include <algorithm>

#include <cblas.h>

#include "ops/general.h"
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

// ---- The op
// --------------------------------------------------------------------------------------

namespace {

// The products [m, k] x [k, n] of a batched matmul, over the leading dimensions of the result.
struct Products {
    Dims lead;
    Steps a, b;  // matrices from one product to the next; 0 where an operand is repeated
    int64_t m = 0, n = 0, k = 0;
    int64_t count() const { return lead.numel(); }
    int64_t of(const Steps& steps, int64_t p) const {
        int64_t at = 0;
        for (int d = lead.rank - 1; d >= 0; p /= lead[d--]) at += p % lead[d] * steps.dim[d];
        return at;
    }
    template <class T>
    const T* a_of(const Tensor& t, int64_t p) const {
        return t.as<T>() + of(a, p) * m * k;
    }
    template <class T>
    const T* b_of(const Tensor& t, int64_t p) const {
        return t.as<T>() + of(b, p) * k * n;
    }
};

Tensor leading(const Tensor& x) {
    Tensor lead = x.meta();
    lead.dim.rank -= 2;
    if (lead.dim.rank == 0) lead.dim = {1};
    return lead;
}

Products products_of(const Rank& rank, At at, const Tensor& a, const Tensor& b) {
    const Tensor lead_a = leading(a), lead_b = leading(b);
    Products s{broadcast(rank, "matmul", at, {&lead_a, &lead_b})};
    s.a = steps_of(lead_a.dim, s.lead);
    s.b = steps_of(lead_b.dim, s.lead);
    s.m = a.dim[a.dim.rank - 2];
    s.k = a.cols();
    s.n = b.cols();
    if (lead_b.numel() == 1) {  // one matrix b for all: one product of all rows
        s.m = a.rows();
        s.lead = {1};
    }
    return s;
}

// f(p) for each product: on all threads where products are small and `apart` (write to different
// places), else one after another, each divided by gemm.
template <class F>
void each_product(const Products& s, bool apart, F&& f) {
    const int64_t work = s.m * s.n * s.k;
    parallel_rows(s.count(), apart && work < int64_t{1} << 21 ? work : 0, f);
}

void matmul_cpu(const Rank& rank, At at, Tensor a, Tensor b, const Products& s, Tensor c) {
    float_kernel(rank, "matmul", at, a, [&]<class T>(T*) {
        each_product(s, true, [&](int64_t p) {
            gemm<T>(s.m, s.n, s.k, {s.a_of<T>(a, p), s.k}, {s.b_of<T>(b, p), s.n}, 0,
                    c.as<T>() + p * s.m * s.n, s.n);
        });
    });
}

// da += dc b^T
void left_grad_cpu(const Rank& rank, At at, Tensor dc, Tensor b, const Products& s, Tensor da) {
    float_kernel(rank, "matmul", at, dc, [&]<class T>(T*) {
        each_product(s, da.numel() == s.count() * s.m * s.k, [&](int64_t p) {
            gemm<T>(s.m, s.k, s.n, {dc.as<T>() + p * s.m * s.n, s.n},
                    {s.b_of<T>(b, p), s.n, Layout::Transposed}, 1,
                    da.as<T>() + s.of(s.a, p) * s.m * s.k, s.k);
        });
    });
}

// db += a^T dc
void right_grad_cpu(const Rank& rank, At at, Tensor dc, Tensor a, const Products& s, Tensor db) {
    float_kernel(rank, "matmul", at, dc, [&]<class T>(T*) {
        each_product(s, db.numel() == s.count() * s.k * s.n, [&](int64_t p) {
            gemm<T>(s.k, s.n, s.m, {s.a_of<T>(a, p), s.k, Layout::Transposed},
                    {dc.as<T>() + p * s.m * s.n, s.n}, 1, db.as<T>() + s.of(s.b, p) * s.k * s.n,
                    s.n);
        });
    });
}

void matmul_grad(const Pass& pass) {
    const At at = pass.node.at;
    const Products s = products_of(pass.rank, at, pass.node.in[0], pass.node.in[1]);
    if (const Tensor da = pass.zeroed_slot(0); da.defined())
        left_grad_cpu(pass.rank, at, pass.dy(), pass.kept[1], s, da);
    if (const Tensor db = pass.zeroed_slot(1); db.defined())
        right_grad_cpu(pass.rank, at, pass.dy(), pass.kept[0], s, db);
}

}  // namespace

Tensor matmul(Rank& rank, Tensor a, Tensor b, At at) {
    check_alike(rank, "matmul", at, {&a, &b});
    check(rank, "matmul", at, {{"two dimensions or more", a.dim.rank > 1 && b.dim.rank > 1}},
          {&a, &b});
    check(rank, "matmul", at,
          {{"a.dim[-1] == b.dim[-2]  (a [..., M, K] x b [..., K, N])",
            a.cols() == b.dim[b.dim.rank - 2]}},
          {&a, &b});
    const Tensor lead_a = leading(a), lead_b = leading(b);
    Dims dims = broadcast(rank, "matmul", at, {&lead_a, &lead_b});
    if (a.dim.rank == 2 && b.dim.rank == 2) dims.rank = 0;
    dims[dims.rank++] = a.dim[a.dim.rank - 2];
    dims[dims.rank++] = b.cols();
    Tensor c = empty(rank, dims, a.dtype, at);
    matmul_cpu(rank, at, a, b, products_of(rank, at, a, b), c);
    record_grad<matmul_grad>(rank, "matmul", at, {a, b}, c, {{a, 2}, {b, 1}});
    return c;
}

}  // namespace pith
