// cuda: what kernels share, and what C++ that calls CUDA's libraries does.
#pragma once
#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <memory>
#include <type_traits>

#include "core/cuda.h"

namespace pith {

struct AttentionPlans;
struct GemmPlans;
struct Cuda {
  int device = 0, processors = 0;
  cudaStream_t stream = nullptr, reader = nullptr;
  cublasHandle_t blas = nullptr;
  std::shared_ptr<AttentionPlans> attention;  // of ops/cudnn_attention
  std::shared_ptr<GemmPlans> gemms;           // of ops/gemm
};

void cuda_check(cudaError_t error, At at = At::here());
void cuda_check(cublasStatus_t status, At at = At::here());

#ifdef __CUDACC__
constexpr int kBlock = 256;  // threads

template <int kEach, class F>
__global__ void __launch_bounds__(kBlock) each_kernel(i64 n, F f) {
  i64 first = i64(blockIdx.x) * kEach + threadIdx.x % kEach;
  for (i64 i = first; i < n; i += i64(gridDim.x) * kEach) f(i);
}
// f(i) for i in [0, n): a thread each or, with kEach = 1, all threads of a block together.
template <int kEach = kBlock, class F>
void cuda_each(Rank& rank, i64 n, F f) {
  if (n == 0) return;
  const Cuda& cuda = cuda_of(rank);
  i64 blocks = min<i64>((n + kEach - 1) / kEach, cuda.processors * 16);
  each_kernel<kEach><<<blocks, kBlock, 0, cuda.stream>>>(n, f);
  cuda_check(cudaGetLastError());
}
// f(i) for i in [0, n), by the threads of a block.
template <class F>
__device__ void block_each(i64 n, F f) {
  for (i64 i = threadIdx.x; i < n; i += kBlock) f(i);
}
// x of the block's threads joined, in one order, for all of them: of every `apart`-th, a power
// of 2.
template <class T, class Join>
__device__ T block_fold(T x, Join join, int apart = 1) {
  __shared__ T part[kBlock];
  part[threadIdx.x] = x;
  for (int half = kBlock / 2; half >= apart; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) part[threadIdx.x] = join(part[threadIdx.x], part[threadIdx.x + half]);
  }
  __syncthreads();
  T all = part[threadIdx.x % apart];
  __syncthreads();
  return all;
}
template <class T>
__device__ T block_sum(T x, int apart = 1) {
  return block_fold(
      x, [](T a, T b) { return a + b; }, apart);
}

// n neighbours, moved at once.
template <class T, int n>
struct alignas(n * sizeof(T)) Pack {
  T x[n];
};
// Pack i of a row that begins at p.
template <int n, class T>
__device__ Pack<T, n>& pack(T* p, i64 i) {
  return reinterpret_cast<Pack<T, n>*>(p)[i];
}
template <int n, class T>
__device__ const Pack<T, n>& pack(const T* p, i64 i) {
  return reinterpret_cast<const Pack<T, n>*>(p)[i];
}
// f(constant), of 16 bytes where rows of n elements are so aligned, else of one element.
template <class T, class F>
void with_packs(i64 n, F f) {
  constexpr int kPack = 16 / sizeof(T);
  if (n % kPack == 0)
    f(std::integral_constant<int, kPack>());
  else
    f(std::integral_constant<int, 1>());
}

// The threads that share a row: a power of 2 up to a warp, or a block.
struct Team {
  int size;
  __device__ int id() const { return threadIdx.x & (size - 1); }
  template <class F>
  __device__ void each(i64 n, F f) const {
    for (i64 i = id(); i < n; i += size) f(i);
  }
  // x of all joined, in one order, for all of them; `join` commutes.
  template <class T, class Join>
  __device__ T fold(T x, Join join) const {
    int lanes = size < 32 ? size : 32;
    unsigned ours = (~0u >> (32 - lanes)) << (threadIdx.x & 31 & -lanes);
    for (int apart = lanes / 2; apart; apart /= 2) x = join(x, __shfl_xor_sync(ours, x, apart));
    if (size <= 32) return x;
    __shared__ T part[32];
    __syncthreads();
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    x = part[0];
    for (int i = 1; i < size / 32; i++) x = join(x, part[i]);
    return x;
  }
  template <class T>
  __device__ T sum(T x) const {
    return fold(x, [](T a, T b) { return a + b; });
  }
};
template <class F>
__global__ void __launch_bounds__(kBlock) rows_kernel(i64 rows, int size, F f) {
  int at_once = kBlock / size;
  for (i64 r = i64(blockIdx.x) * at_once + threadIdx.x / size; r < rows; r += gridDim.x * at_once)
    f(r, Team{size});
}
// f(row, team) for rows of `work` steps, with the threads that suit them or as many as told.
template <class F>
void cuda_rows(Rank& rank, i64 rows, i64 work, F f, int size = 0) {
  if (rows == 0) return;
  if (!size) size = work > 128 ? kBlock : 32;
  i64 blocks = min<i64>((rows * size + kBlock - 1) / kBlock, 1 << 16);
  rows_kernel<<<blocks, kBlock, 0, cuda_of(rank).stream>>>(rows, size, f);
  cuda_check(cudaGetLastError());
}

// Elements of any float dtype.
struct AnyFloat {
  char* data;
  DType dtype;
  explicit AnyFloat(const Tensor& t) : data(t.data), dtype(t.dtype) {}
  __device__ double get(i64 i) const {
    if (dtype == DType::BF16) return float(reinterpret_cast<BF16*>(data)[i]);
    if (dtype == DType::F32) return reinterpret_cast<float*>(data)[i];
    return dtype == DType::F64 ? reinterpret_cast<double*>(data)[i] : double(u8(data[i]));
  }
  __device__ void put(i64 i, double x, bool add = false) const {
    if (add) x += get(i);
    if (dtype == DType::BF16) reinterpret_cast<BF16*>(data)[i] = BF16(float(x));
    if (dtype == DType::F32) reinterpret_cast<float*>(data)[i] = float(x);
    if (dtype == DType::F64) reinterpret_cast<double*>(data)[i] = x;
  }
};

#endif

}
