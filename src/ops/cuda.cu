#include "core/cuda.cuh"

#include "ops/cpu.h"

namespace pith {

// g, a, b, c and the output in one index space. Dimensions that all cross as one are one: whole
// tensors need no division.
struct Walk {
  int rank = 0;
  i64 size[kMaxDims], step[kMaxDims][5];
  char* data[5];
  double scalar[5];
  bool bytes[5];
  template <class T>
  __device__ T at(int k, i64 i) const {
    if (!data[k]) return T(scalar[k]);
    return bytes[k] ? T(u8(data[k][i])) : reinterpret_cast<T*>(data[k])[i];
  }
};

template <class T>
void OnCuda<T>::elementwise(Rank& rank, const Dims& space, const View* v, bool add, Formula f) {
  Walk w;
  for (int k = 0; k < 5; k++) {
    const Tensor& x = v[k].x;
    w.data[k] = x.data ? x.data + v[k].begin * size_of(x.dtype) : nullptr;
    w.bytes[k] = x.dtype == DType::U8;
    w.scalar[k] = v[k].scalar;
  }
  for (int d = 0; d < space.rank; d++) {
    if (space[d] == 1) continue;
    bool one = w.rank > 0;
    for (int k = 0; k < 5; k++) one = one && w.step[w.rank - 1][k] == v[k].step[d] * space[d];
    if (!one) w.size[w.rank++] = 1;
    w.size[w.rank - 1] *= space[d];
    for (int k = 0; k < 5; k++) w.step[w.rank - 1][k] = v[k].step[d];
  }
  const i64 n = space.numel();
  cuda_each(rank, n, [=] __device__(i64 i) {
    i64 at[5] = {};
    for (int d = w.rank - 1; d >= 0; d--) {
      const i64 size = w.size[d];
      const i64 next = d == 0 ? 0 : n >> 32 ? i / size : u32(i) / u32(size);
#pragma unroll
      for (int k = 0; k < 5; k++) at[k] += (i - next * size) * w.step[d][k];
      i = next;
    }
    const auto x = [&](int k) { return w.at<T>(k, at[k]); };
    Slot<T>{reinterpret_cast<T*>(w.data[4]), add}.put(at[4], evaluate(f, x(0), x(1), x(2), x(3)));
  });
}

// A block adds up `width` neighbours; every `width`-th thread the same.
template <class T>
void OnCuda<T>::sum(Rank& rank, const Extent& e, const T* x, T* y) {
  int width = 1;
  while (width < 32 && width < e.inner) width *= 2;
  const i64 tiles = (e.inner + width - 1) / width;
  cuda_each<1>(rank, e.outer * tiles, [=] __device__(i64 b) {
    const i64 o = b / tiles, c = b % tiles * width + threadIdx.x % width;
    double sum = 0;
    for (i64 i = threadIdx.x / width; c < e.inner && i < e.n; i += kBlock / width)
      sum += x[(o * e.n + i) * e.inner + c];
    sum = block_sum(sum, width);
    if (threadIdx.x < width && c < e.inner) y[o * e.inner + c] = T(sum);
  });
}

template <class T>
void OnCuda<T>::gemm(Rank& rank, i64 m, i64 n, i64 k, Matrix<T> a, Matrix<T> b, T beta, T* c) {
  if (k == 0 && beta == 0) cuda_zero(rank, c, m * n * sizeof(T));
  if (m == 0 || n == 0 || k == 0) return;
  // c^T = b^T a^T, as cuBLAS has columns for rows.
  const auto call = [&](auto blas, T one = 1) {
    const auto left = cublasOperation_t(b.layout), right = cublasOperation_t(a.layout);
    cuda_check(blas(cuda_of(rank).blas, left, right, n, m, k, &one, b.data, b.ld, a.data, a.ld,
                    &beta, c, n));
  };
  if constexpr (sizeof(T) == 8)
    call(cublasDgemm_64);
  else
    call(cublasSgemm_64);
}

template <class T>
void OnCuda<T>::gather_rows(Rank& rank, const Tensor& x, i64 n, const Tensor& index,
                            const Tensor& begin, Slot<T> y) {
  const T* from = x.as<T>();
  const int *id = index.i32(), *cut = begin.defined() ? begin.i32() : nullptr;
  cuda_each<1>(rank, cut ? begin.dim[0] - 1 : index.numel(), [=] __device__(i64 r) {
    const i64 first = cut ? cut[r] : r, end = cut ? cut[r + 1] : r + 1;
    block_each(n, [=](i64 j) {
      T sum = y.add ? y.data[r * n + j] : 0;
      for (i64 i = first; i < end; i++) sum += from[id[i] * n + j];
      y.data[r * n + j] = sum;
    });
  });
}

// The block of an id's first row adds all of them, in order.
template <class T>
void OnCuda<T>::scatter_rows(Rank& rank, const Tensor& x, i64 n, const Tensor& ids,
                             const Tensor& y) {
  const i64 count = ids.numel();
  const int* id = ids.i32();
  const T* from = x.as<T>();
  T* to = y.as<T>();
  cuda_each<1>(rank, count, [=] __device__(i64 row) {
    __shared__ bool same[kBlock];
    for (i64 first = 0; first < count; first += kBlock) {
      const i64 mine = first + threadIdx.x;
      const bool is = mine < count && id[mine] == id[row];
      if (__syncthreads_or(is && mine < row)) return;
      same[threadIdx.x] = is;
      if (!__syncthreads_or(is)) continue;
      for (int i = 0; i < kBlock; i++)
        if (same[i])
          block_each(n, [=](i64 j) { to[id[row] * n + j] += from[(first + i) * n + j]; });
    }
  });
}

template <class T>
void OnCuda<T>::cumsum(Rank& rank, const Tensor& x, Slot<T> to, bool reverse) {
  const i64 n = x.cols();
  const T* from = x.as<T>();
  cuda_each<1>(rank, x.rows(), [=] __device__(i64 r) {
    __shared__ T part[kBlock];
    T before = 0;
    for (i64 first = 0; first < n; first += kBlock) {
      const i64 i = first + threadIdx.x, at = r * n + (reverse ? n - 1 - i : i);
      T sum = i < n ? from[at] : 0;
      for (int back = 1; back < 2 * kBlock; back *= 2) {
        __syncthreads();
        part[threadIdx.x] = sum;
        __syncthreads();
        if (threadIdx.x >= back) sum += part[threadIdx.x - back];
      }
      if (i < n) to.put(at, before + sum);
      before += part[kBlock - 1];
    }
  });
}

template <class T>
void OnCuda<T>::softmax(Rank& rank, const Tensor& x, const Tensor& y) {
  const i64 n = x.cols();
  const T* from = x.as<T>();
  T* to = y.as<T>();
  cuda_each<1>(rank, x.rows(), [=] __device__(i64 r) {
    const auto larger = [](T a, T b) { return b > a ? b : a; };
    T top = -INFINITY, sum = 0;
    block_each(n, [&](i64 i) { top = larger(top, from[r * n + i]); });
    top = block_fold(top, larger);
    block_each(n, [&](i64 i) { sum += to[r * n + i] = exp_negative(from[r * n + i] - top); });
    sum = block_sum(sum);
    block_each(n, [&](i64 i) { to[r * n + i] /= sum; });
  });
}

template <class T>
void OnCuda<T>::softmax_grad(Rank& rank, const Tensor& dy, const Tensor& y, Slot<T> dx) {
  const i64 n = y.cols();
  const T *g = dy.as<T>(), *p = y.as<T>();
  cuda_each<1>(rank, y.rows(), [=] __device__(i64 r) {
    T mean = 0;
    block_each(n, [&](i64 i) { mean += g[r * n + i] * p[r * n + i]; });
    mean = block_sum(mean);
    block_each(n, [&](i64 i) { dx.put(r * n + i, p[r * n + i] * (g[r * n + i] - mean)); });
  });
}

template <class T>
struct Pick {
  T value;
  int id;
  __device__ bool before(Pick b) const {
    return above(value, b.value) || (!above(b.value, value) && id < b.id);
  }
};

// The first after the last pick, k times.
template <class T>
void OnCuda<T>::top_k(Rank& rank, const Tensor& x, int k, const Tensor& values, const Tensor& ids) {
  const i64 n = x.cols();
  const T* from = x.as<T>();
  T* value = values.as<T>();
  int* id = ids.i32();
  cuda_each<1>(rank, x.rows(), [=] __device__(i64 r) {
    Pick<T> last{NAN, -1};
    for (i64 j = r * k; j < (r + 1) * k; j++) {
      Pick<T> best{-INFINITY, INT32_MAX};
      block_each(n, [&](i64 i) {
        const Pick<T> one{from[r * n + i], int(i)};
        if (last.before(one) && one.before(best)) best = one;
      });
      last = block_fold(best, [](Pick<T> a, Pick<T> b) { return b.before(a) ? b : a; });
      if (threadIdx.x) continue;
      value[j] = last.value;
      id[j] = last.id;
    }
  });
}

template <class T>
void OnCuda<T>::top_k_grad(Rank& rank, const Tensor& dy, const Tensor& ids, const Tensor& dx) {
  const i64 n = dx.cols(), k = ids.cols();
  const int* id = ids.i32();
  const T* g = dy.as<T>();
  T* to = dx.as<T>();
  cuda_each(rank, ids.numel(), [=] __device__(i64 i) { to[i / k * n + id[i]] += g[i]; });
}

template struct OnCuda<float>;
template struct OnCuda<double>;

}
