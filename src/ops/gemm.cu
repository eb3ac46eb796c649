// gemm: dense products by cuBLAS. The large ones in BF16 take the fastest of cuBLASLt's algorithms
// among those that give the same bits, as most do: it is measured where a shape is first met, and
// what is measured changes no result.
#include <cublasLt.h>

#include "core/cuda.cuh"
#include "ops/cpu.h"

namespace pith {

struct GemmPlan {
  i64 key[6];
  cublasLtMatmulDescOpaque_t product;
  cublasLtMatrixLayoutOpaque_t a, b, c;
  cublasLtMatmulHeuristicResult_t choice;
};
struct GemmPlans {
  vector<GemmPlan> list;
};

namespace {

constexpr i64 kLargeProduct = i64(1) << 30;  // multiply-adds
constexpr size_t kMostWorkspace = 32 << 20;
constexpr int kCandidates = 8, kTimes = 3;

cudaDataType_t blas_type(DType d) {
  return d == DType::F64 ? CUDA_R_64F : d == DType::F32 ? CUDA_R_32F : CUDA_R_16BF;
}

// c [m, n] = or += a b. cuBLAS has columns for rows: to it that is c^T = b^T a^T.
struct Product {
  Rank& rank;
  i64 m, n, k;
  const Tensor &a, &b;
  bool a_transposed, b_transposed;
  const GradSlot& c;
};

void run(const Product& p, GemmPlan& plan, void* to) {
  Tensor work = empty(p.rank, {i64(plan.choice.workspaceSize)}, DType::U8);
  float one = 1, beta = p.c.add;
  const Cuda& cuda = cuda_of(p.rank);
  cuda_check(cublasLtMatmul(cublasLtHandle_t(cuda.blas), &plan.product, &one, p.b.data, &plan.a,
      p.a.data, &plan.b, &beta, to, &plan.c, to, &plan.c, &plan.choice.algo, work.data,
      plan.choice.workspaceSize, cuda.stream));
}

// Differs, but for chance, where the bytes do: a multiple of 4 of them.
u64 fingerprint(Rank& rank, const void* data, i64 bytes) {
  constexpr i64 kChunk = 1 << 16;
  i64 words = bytes / 4;
  const unsigned* word = static_cast<const unsigned*>(data);
  Tensor sum = zeros(rank, {1}, DType::F64);
  auto* to = sum.as<unsigned long long>();
  cuda_each<1>(rank, (words + kChunk - 1) / kChunk, [=] __device__(i64 chunk) {
    unsigned long long part = 0;
    block_each(min(kChunk, words - chunk * kChunk), [&](i64 i) {
      i64 at = chunk * kChunk + i;
      part += (word[at] + 1ull) * (2 * at + 1) * 0x9E3779B97F4A7C15ull;
    });
    part = block_sum(part);
    if (threadIdx.x == 0) atomicAdd(to, part);  // of integers: any order
  });
  vector<char> host;
  return *on_host(rank, sum, host).as<u64>();
}

float best_time(const Product& p, GemmPlan& plan, void* to) {
  cudaEvent_t begin, end;
  cuda_check(cudaEventCreate(&begin));
  cuda_check(cudaEventCreate(&end));
  float best = INFINITY;
  for (int i = 0; i < kTimes; i++) {
    cuda_check(cudaEventRecord(begin, cuda_of(p.rank).stream));
    run(p, plan, to);
    cuda_check(cudaEventRecord(end, cuda_of(p.rank).stream));
    cuda_check(cudaEventSynchronize(end));
    float ms = 0;
    cuda_check(cudaEventElapsedTime(&ms, begin, end));
    best = std::min(best, ms);
  }
  cuda_check(cudaEventDestroy(begin));
  cuda_check(cudaEventDestroy(end));
  return best;
}

GemmPlan make_plan(const Product& p) {
  GemmPlan plan{};
  cuda_check(cublasLtMatmulDescInit(&plan.product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  const auto transposed = [&](cublasLtMatmulDescAttributes_t what, int is) {
    cuda_check(cublasLtMatmulDescSetAttribute(&plan.product, what, &is, sizeof is));
  };
  transposed(CUBLASLT_MATMUL_DESC_TRANSA, p.b_transposed);
  transposed(CUBLASLT_MATMUL_DESC_TRANSB, p.a_transposed);
  const auto layout = [](cublasLtMatrixLayoutOpaque_t& to, const Tensor& t, i64 rows, i64 cols) {
    cuda_check(cublasLtMatrixLayoutInit(&to, blas_type(t.dtype), cols, rows, cols));
  };
  layout(plan.a, p.b, p.b.rows(), p.b.cols());
  layout(plan.b, p.a, p.a.rows(), p.a.cols());
  layout(plan.c, p.c.grad, p.m, p.n);
  cublasLtMatmulPreferenceOpaque_t wish;
  cuda_check(cublasLtMatmulPreferenceInit(&wish));
  cuda_check(cublasLtMatmulPreferenceSetAttribute(
      &wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kMostWorkspace, sizeof kMostWorkspace));
  cublasLtMatmulHeuristicResult_t found[kCandidates];
  int count = 0;
  Cuda& cuda = cuda_of(p.rank);
  cuda_check(cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t(cuda.blas), &plan.product, &plan.a,
      &plan.b, &plan.c, &plan.c, &wish, kCandidates, found, &count));
  if (count == 0)
    failed("matrix product", text("cuBLAS has none for %ld, %ld, %ld", p.m, p.n, p.k));
  // Sums are measured elsewhere, if there is room.
  i64 bytes = p.c.grad.bytes();
  void* to = p.c.add ? cuda_allocate(cuda, bytes) : p.c.grad.data;
  u64 bits[kCandidates] = {};
  float ms[kCandidates] = {};
  for (int i = 0; i < count && to; i++) {
    plan.choice = found[i];
    cuda_check(cudaMemsetAsync(to, p.c.add ? 0 : 0xFF, bytes, cuda.stream));
    run(p, plan, to);
    bits[i] = fingerprint(p.rank, to, bytes);
    ms[i] = best_time(p, plan, to);
  }
  auto votes = [&](int i) { return std::count(bits, bits + count, bits[i]); };
  int best = 0;
  for (int i = 1; i < count; i++)
    if (votes(i) > votes(best) || (bits[i] == bits[best] && ms[i] < ms[best])) best = i;
  plan.choice = found[best];
  if (p.c.add) cuda_free(cuda, to);
  return plan;
}

GemmPlan& plan_of(const Product& p) {
  const i64 key[] = {
      p.m, p.n, p.k, p.a_transposed, p.b_transposed, int(p.c.grad.dtype) * 2 + p.c.add};
  auto& plans = cuda_of(p.rank).gemms;
  if (!plans) plans = std::make_shared<GemmPlans>();
  for (GemmPlan& plan : plans->list)
    if (std::equal(key, key + std::size(key), plan.key)) return plan;
  plans->list.push_back(make_plan(p));
  std::copy_n(key, std::size(key), plans->list.back().key);
  return plans->list.back();
}

}

void cuda_gemm(Rank& rank, i64 m, i64 n, i64 k, const Tensor& a, bool a_transposed, const Tensor& b,
    bool b_transposed, const GradSlot& c) {
  if (k == 0 && !c.add) cuda_zero(rank, c.grad.data, m * n * size_of(c.grad.dtype));
  if (m == 0 || n == 0 || k == 0) return;
  // Addresses and rows as the fast algorithms want them.
  u64 alike = u64(a.data) | u64(b.data) | u64(c.grad.data) | u64(a.cols() * 2) | u64(n * 2);
  if (a.dtype == DType::BF16 && m * n * k >= kLargeProduct && alike % 16 == 0) {
    const Product p{rank, m, n, k, a, b, a_transposed, b_transposed, c};
    return run(p, plan_of(p), c.grad.data);
  }
  bool f64 = a.dtype == DType::F64;
  double one = 1, beta = c.add;
  float one32 = 1, beta32 = c.add;
  auto scalar = [f64](const double& x, const float& y) -> const void* {
    return f64 ? static_cast<const void*>(&x) : &y;
  };
  cuda_check(cublasGemmEx_64(cuda_of(rank).blas, cublasOperation_t(b_transposed),
      cublasOperation_t(a_transposed), n, m, k, scalar(one, one32), b.data, blas_type(b.dtype),
      b.cols(), a.data, blas_type(a.dtype), a.cols(), scalar(beta, beta32), c.grad.data,
      blas_type(c.grad.dtype), n, f64 ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F,
      CUBLAS_GEMM_DEFAULT));
}

}
