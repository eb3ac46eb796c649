// cuda: what kernels share.
#pragma once
#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <algorithm>

#include "core/cuda.h"

namespace pith {

struct Cuda {
  int processors = 0;
  cudaStream_t stream = nullptr;
  cublasHandle_t blas = nullptr;
};

void cuda_check(cudaError_t error, At at = At::here());
void cuda_check(cublasStatus_t status, At at = At::here());

constexpr int kBlock = 256;  // threads

template <int kEach, class F>
__global__ void __launch_bounds__(kBlock) each_kernel(i64 n, F f) {
  const i64 first = i64(blockIdx.x) * kEach + threadIdx.x % kEach;
  for (i64 i = first; i < n; i += i64(gridDim.x) * kEach) f(i);
}
// f(i) for i in [0, n): a thread each or, with kEach = 1, all threads of a block together.
template <int kEach = kBlock, class F>
void cuda_each(Rank& rank, i64 n, F f) {
  if (n == 0) return;
  const Cuda& cuda = cuda_of(rank);
  const i64 blocks = min<i64>((n + kEach - 1) / kEach, cuda.processors * 16);
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
  const T all = part[threadIdx.x % apart];
  __syncthreads();
  return all;
}
template <class T>
__device__ T block_sum(T x, int apart = 1) {
  return block_fold(
      x, [](T a, T b) { return a + b; }, apart);
}

}
