#include "core/cuda.cuh"

namespace pith {

static void check(bool good, const char* got, At at) {
  if (!good)
    failed(text("%s:%d", at.file, at.line), text("CUDA failed (got %s)", got),
        "PITH_DEBUG=1, which names the op");
}
void cuda_check(cudaError_t e, At at) { check(e == cudaSuccess, cudaGetErrorString(e), at); }
void cuda_check(cublasStatus_t s, At at) {
  check(s == CUBLAS_STATUS_SUCCESS, cublasGetStatusString(s), at);
}

vector<string> cuda_devices(string& why) {
  int count = 0;
  vector<string> devices;
  why = cudaGetErrorString(cudaGetDeviceCount(&count));
  for (int i = 0; i < count; i++) {
    cudaDeviceProp p{};
    cuda_check(cudaGetDeviceProperties(&p, i));
    devices.push_back(text(
        "%s, sm_%d%d, %.1f GiB", p.name, p.major, p.minor, double(p.totalGlobalMem) / (1 << 30)));
  }
  return devices;
}

__global__ void any_kernel() {}

Cuda* cuda_open(int device) {
  Cuda* cuda = new Cuda{.device = device};
  cuda_check(cudaSetDevice(device));
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, any_kernel) == cudaErrorNoKernelImageForDevice) {
    string why;
    bad_input("--device cuda", "this build has no code for " + cuda_devices(why)[device],
        "a build with its PITH_CUDA_ARCHITECTURES, or --device cpu");
  }
  cuda_check(cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking));
  cuda_check(cudaStreamCreateWithFlags(&cuda->reader, cudaStreamNonBlocking));
  cuda_check(cudaDeviceGetAttribute(&cuda->processors, cudaDevAttrMultiProcessorCount, device));
  cudaMemPool_t pool;
  cuda_check(cudaDeviceGetDefaultMemPool(&pool, device));
  u64 keep = UINT64_MAX;  // what is freed stays with the process
  cuda_check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep));
  cuda_check(cublasCreate(&cuda->blas));
  cuda_check(cublasSetStream(cuda->blas, cuda->stream));
  return cuda;
}

void cuda_close(Cuda* cuda) {
  cuda_check(cudaStreamSynchronize(cuda->stream));
  cuda->attention.reset();  // it uses the stream
  cuda_check(cublasDestroy(cuda->blas));
  cuda_check(cudaStreamDestroy(cuda->stream));
  cuda_check(cudaStreamDestroy(cuda->reader));
  delete cuda;
}

void* cuda_allocate(Cuda& cuda, i64 bytes) {
  void* data = nullptr;
  const cudaError_t error = cudaMallocAsync(&data, bytes, cuda.stream);
  if (error != cudaErrorMemoryAllocation) cuda_check(error);
  cudaGetLastError();  // it is told by the null
  return data;
}

void cuda_free(Cuda& cuda, void* data) {
  if (data) cudaFreeAsync(data, cuda.stream);  // destructors call it: the next call tells of errors
}

void cuda_zero(Rank& rank, void* data, i64 bytes) {
  if (bytes) cuda_check(cudaMemsetAsync(data, 0, bytes, cuda_of(rank).stream));
}

void cuda_copy(Rank& rank, void* to, const void* from, i64 bytes) {
  const cudaStream_t stream = cuda_of(rank).stream;
  cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream));
  cuda_check(cudaStreamSynchronize(stream));
}

void cuda_read(Cuda& cuda, void* to, const void* from, i64 bytes) {
  cuda_check(cudaSetDevice(cuda.device));
  cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, cuda.reader));
  cuda_check(cudaStreamSynchronize(cuda.reader));
}

void cuda_sync(Cuda& cuda) { cuda_check(cudaStreamSynchronize(cuda.stream)); }

template <class To, class T, int N>
static void add_packs(Rank& rank, i64 packs, To* to, const T* from) {
  cuda_each(rank, packs, [=] __device__(i64 i) {
    Pack<To, N> a = pack<N>(to, i);
    const Pack<T, N> b = pack<N>(from, i);
    for (int j = 0; j < N; j++) a.x[j] = a.x[j] + b.x[j];
    pack<N>(to, i) = a;
  });
}
template <class To, class T>
static void add_elements(Rank& rank, i64 n, To* to, const T* from) {
  with_packs<To>(n, [&](auto width) {
    constexpr int N = width;
    add_packs<To, T, N>(rank, n / N, to, from);
  });
}

void cuda_add(Rank& rank, const Tensor& to, const Tensor& from) {
  i64 n = to.numel();
  if (to.dtype == DType::F64) return add_elements(rank, n, to.as<double>(), from.as<double>());
  if (to.dtype != from.dtype) return add_elements(rank, n, to.f32(), from.as<BF16>());
  if (to.dtype == DType::BF16) return add_elements(rank, n, to.as<BF16>(), from.as<BF16>());
  add_elements(rank, n, to.f32(), from.f32());
}

}
