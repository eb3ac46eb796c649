#include "core/cuda.cuh"

#include "ops/cpu.h"

namespace pith {

template <class T>
constexpr DType kDType = sizeof(T) == 2   ? DType::BF16
                         : sizeof(T) == 4 ? DType::F32
                                          : DType::F64;

// g, a, b, c and the output in one index space. Dimensions that all cross as one are one: whole
// tensors need no division.
struct Walk {
  int rank = 0;
  i64 size[kMaxDims], step[kMaxDims][5];
  char* data[5];
  double scalar[5];
  DType dtype[5];
  template <class A>
  __device__ A at(int k, i64 i) const {
    if (!data[k]) return A(scalar[k]);
    if (dtype[k] == DType::U8) return A(u8(data[k][i]));
    if (dtype[k] == DType::BF16) return A(float(reinterpret_cast<BF16*>(data[k])[i]));
    if (dtype[k] == DType::F64) return A(reinterpret_cast<double*>(data[k])[i]);
    return A(reinterpret_cast<float*>(data[k])[i]);
  }
};

// Tensors of one dtype and shape, and scalars. kKnown: of a formula that is compiled in.
template <class T, int N, bool kKnown = false, Formula kFormula = Formula::Copy>
static void alike(Rank& rank, i64 packs, const Walk& w, bool add, Formula f) {
  using A = Wide<T>;
  cuda_each(rank, packs, [=] __device__(i64 i) {
    Pack<T, N> x[4], out;
    for (int k = 0; k < 4; k++)
      if (w.data[k])
        x[k] = pack<N>(reinterpret_cast<T*>(w.data[k]), i);
      else
        for (int j = 0; j < N; j++) x[k].x[j] = T(A(w.scalar[k]));
    T* to = reinterpret_cast<T*>(w.data[4]);
    if (add) out = pack<N>(to, i);
    for (int j = 0; j < N; j++) {
      A y = evaluate<A>(kKnown ? kFormula : f, x[0].x[j], x[1].x[j], x[2].x[j], x[3].x[j]);
      out.x[j] = T(add ? A(out.x[j]) + y : y);
    }
    pack<N>(to, i) = out;
  });
}

template <class T>
void OnCuda<T>::elementwise(Rank& rank, const Dims& space, const View* v, bool add, Formula f) {
  Walk w;
  for (int k = 0; k < 5; k++) {
    const Tensor& x = v[k].x;
    w.data[k] = x.data ? x.data + v[k].begin * size_of(x.dtype) : nullptr;
    w.dtype[k] = x.dtype;
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
  i64 n = space.numel();
  bool same = w.rank <= 1 && v[4].x.dtype == kDType<T>;
  for (int k = 0; k < 5; k++)
    same = same && (!w.data[k] || (v[k].x.dtype == v[4].x.dtype && v[k].begin == 0 &&
                                      (w.rank == 0 || w.step[0][k] == 1)));
  if (same)
    return with_packs<T>(n, [&](auto width) {
      constexpr int N = width;
      if (f == Formula::Add) return alike<T, N, true, Formula::Add>(rank, n / N, w, add, f);
      if (f == Formula::Pass) return alike<T, N, true, Formula::Pass>(rank, n / N, w, add, f);
      alike<T, N>(rank, n / N, w, add, f);
    });
  using A = Wide<T>;
  const AnyFloat out(v[4].x);
  i64 begin = v[4].begin;
  cuda_each(rank, n, [=] __device__(i64 i) {
    i64 at[5] = {};
    for (int d = w.rank - 1; d >= 0; d--) {
      i64 size = w.size[d];
      i64 next = d == 0 ? 0 : n >> 32 ? i / size : u32(i) / u32(size);
#pragma unroll
      for (int k = 0; k < 5; k++) at[k] += (i - next * size) * w.step[d][k];
      i = next;
    }
    auto x = [&](int k) { return w.at<A>(k, at[k]); };
    A y = evaluate<A>(f, x(0), x(1), x(2), x(3));
    out.put(begin + at[4], add ? y + x(4) : y);
  });
}

// A block adds up `width` neighbours; every `width`-th thread the same.
void cuda_sum(Rank& rank, const Extent& e, const Tensor& x, const Tensor& y) {
  const AnyFloat from(x), to(y);
  int width = 1;
  while (width < 32 && width < e.inner) width *= 2;
  i64 tiles = (e.inner + width - 1) / width;
  cuda_each<1>(rank, e.outer * tiles, [=] __device__(i64 b) {
    i64 o = b / tiles, c = b % tiles * width + threadIdx.x % width;
    double sum = 0;
    for (i64 i = threadIdx.x / width; c < e.inner && i < e.n; i += kBlock / width)
      sum += from.get((o * e.n + i) * e.inner + c);
    sum = block_sum(sum, width);
    if (threadIdx.x < width && c < e.inner) to.put(o * e.inner + c, sum);
  });
}

template <int N>
static void narrow(Rank& rank, i64 packs, const float* from, BF16* to) {
  cuda_each(rank, packs, [=] __device__(i64 i) {
    const Pack<float, N> a = pack<N>(from, i);
    Pack<BF16, N> b;
    for (int j = 0; j < N; j++) b.x[j] = BF16(a.x[j]);
    pack<N>(to, i) = b;
  });
}

void cuda_cast(Rank& rank, const Tensor& from, const Tensor& to) {
  i64 n = from.numel();
  if (from.dtype == DType::F32 && to.dtype == DType::BF16 && n % 4 == 0)
    return narrow<4>(rank, n / 4, from.f32(), to.as<BF16>());
  const AnyFloat a(from), b(to);
  cuda_each(rank, n, [=] __device__(i64 i) { b.put(i, a.get(i)); });
}

void cuda_count(Rank& rank, const Tensor& ids, const Tensor& counts) {
  i64 groups = counts.dim[0], E = counts.dim[1], n = ids.numel() / max<i64>(1, groups);
  const int* id = ids.i32();
  double* to = counts.as<double>();
  cuda_each<1>(rank, groups * E, [=] __device__(i64 at) {
    double count = 0;
    block_each(n, [&](i64 i) { count += id[at / E * n + i] == at % E; });
    count = block_sum(count);
    if (threadIdx.x == 0) to[at] += count;
  });
}

// Row p of `from`, or row[p], goes to row p of `to`, or place[p]; of `packs` times 16 bytes.
static void copy_rows(
    Rank& rank, i64 rows, i64 packs, const void* from, const int* row, void* to, const int* place) {
  constexpr int kAtOnce = 4, kLanes = 32;
  const auto* source = static_cast<const int4*>(from);
  auto* target = static_cast<int4*>(to);
  auto copy = [=] __device__(i64 p, Team team) {
    const int4* x = source + (row ? row[p] : p) * packs;
    int4* y = target + (place ? place[p] : p) * packs;
    for (i64 first = team.id(); first < packs; first += kAtOnce * kLanes) {
      int4 part[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; j++)
        if (first + j * kLanes < packs) part[j] = x[first + j * kLanes];
#pragma unroll
      for (int j = 0; j < kAtOnce; j++)
        if (first + j * kLanes < packs) y[first + j * kLanes] = part[j];
    }
  };
  cuda_rows(rank, rows, packs, copy, kLanes);
}

template <class T, int N>
struct RowSum {
  const T* from;
  const int* index;
  i64 n;
  AnyFloat to;
  // Row `row` of `to` = or += the sum of rows index[first], ..., index[end - 1] of `from`.
  __device__ void run(Team team, i64 row, i64 first, i64 end, bool add) const {
    using A = Wide<T>;
    team.each(n / N, [&](i64 j) {
      i64 at = row * n + j * N;
      A sum[N] = {};
      for (int l = 0; add && l < N; l++) sum[l] = to.get(at + l);
      for (i64 i = first; i < end; i++) {
        const Pack<T, N> a = pack<N>(from + index[i] * n, j);
        for (int l = 0; l < N; l++) sum[l] += A(a.x[l]);
      }
      bool same = to.dtype == kDType<T>;
      Pack<T, N> out;
      for (int l = 0; l < N; l++) out.x[l] = T(sum[l]);
      if (same) pack<N>(reinterpret_cast<T*>(to.data) + row * n, j) = out;
      for (int l = 0; !same && l < N; l++) to.put(at + l, sum[l]);
    });
  }
};

template <class T, int N>
static void gather(Rank& rank, i64 rows, const RowSum<T, N>& sum, const int* cut, bool add) {
  cuda_rows(rank, rows, sum.n / N, [=] __device__(i64 r, Team team) {
    sum.run(team, r, cut ? cut[r] : r, cut ? cut[r + 1] : r + 1, add);
  });
}

template <class T>
void OnCuda<T>::gather_rows(Rank& rank, const Tensor& x, i64 n, const Tensor& index,
    const Tensor& begin, const GradSlot& y) {
  i64 rows = begin.defined() ? begin.dim[0] - 1 : index.numel(), bytes = n * i64(sizeof(T));
  if (!begin.defined() && !y.add && y.grad.dtype == x.dtype && bytes % 16 == 0)
    return copy_rows(rank, rows, bytes / 16, x.data, index.i32(), y.grad.data, nullptr);
  with_packs<T>(n, [&](auto width) {
    const RowSum<T, width> sum{x.as<T>(), index.i32(), n, AnyFloat(y.grad)};
    gather(rank, rows, sum, begin.i32(), y.add);
  });
}

struct Cuts {
  const int* of[TensorList::kMax];
  int count;
  explicit Cuts(const TensorList& offsets) : count(offsets.count) {
    for (int i = 0; i < count; i++) of[i] = offsets[i].i32();
  }
};

Tensor cuda_join_offsets(Rank& rank, const TensorList& offsets) {
  Tensor all = empty(rank, offsets[0].dim, DType::I32);
  const Cuts cuts(offsets);
  int* sum = all.i32();
  cuda_each(rank, all.numel(), [=] __device__(i64 e) {
    int first = 0;
    for (int i = 0; i < cuts.count; i++) first += cuts.of[i][e];
    sum[e] = first;
  });
  return all;
}

// A pair's place grows by the pairs that the parts before its own have up to its expert, and those
// after it have of earlier experts.
Tensor cuda_join(
    Rank& rank, const TensorList& x, const TensorList& index, const TensorList& offsets) {
  i64 total = 0, experts = offsets[0].dim[0] - 1;
  auto pairs = [&](int i) { return index[i].defined() ? index[i].numel() : x[i].dim[0]; };
  for (int i = 0; i < x.count; i++) total += pairs(i);
  Tensor all = empty(rank, {total, x[0].cols()}, x[0].dtype);
  const Cuts cuts(offsets);
  for (int part = 0; part < x.count; part++) {
    Tensor places = empty(rank, {pairs(part)}, DType::I32);
    int* to = places.i32();
    cuda_each(rank, pairs(part), [=] __device__(i64 p) {
      i64 expert = 0, end = experts;
      while (end - expert > 1) {
        i64 middle = (expert + end) / 2;
        (cuts.of[part][middle] <= p ? expert : end) = middle;
      }
      int place = int(p);
      for (int i = 0; i < cuts.count; i++)
        if (i != part) place += cuts.of[i][expert + (i < part)];
      to[p] = place;
    });
    i64 packs = x[part].cols() * size_of(all.dtype) / 16;
    copy_rows(rank, pairs(part), packs, x[part].data, index[part].i32(), all.data, to);
  }
  return all;
}

// Equal ids stand together once sorted; the first of them adds all.
template <class T, int N>
static void scatter(Rank& rank, i64 count, const RowSum<T, N>& sum, const int* id) {
  cuda_rows(rank, count, sum.n / N, [=] __device__(i64 first, Team team) {
    if (first > 0 && id[first - 1] == id[first]) return;
    i64 end = first + 1;
    while (end < count && id[end] == id[first]) end++;
    sum.run(team, id[first], first, end, true);
  });
}

template <class T>
void OnCuda<T>::scatter_rows(
    Rank& rank, const Tensor& x, i64 n, const Tensor& ids, const Tensor& y) {
  if (ids.numel() == 0 || n == 0) return;
  Tensor sorted = empty(rank, ids.dim, DType::I32), order = empty(rank, ids.dim, DType::I32);
  cuda_sort(rank, ids, y.numel() / n, sorted, order);
  with_packs<T>(n, [&](auto width) {
    const RowSum<T, width> sum{x.as<T>(), order.i32(), n, AnyFloat(y)};
    scatter(rank, ids.numel(), sum, sorted.i32());
  });
}

template <class T>
void OnCuda<T>::cumsum(Rank& rank, const Tensor& x, const GradSlot& slot, bool reverse) {
  const AnyFloat to(slot.grad);
  bool add = slot.add;
  i64 n = x.cols();
  const T* from = x.as<T>();
  cuda_each<1>(rank, x.rows(), [=] __device__(i64 r) {
    __shared__ Wide<T> part[kBlock];
    Wide<T> before = 0;
    for (i64 first = 0; first < n; first += kBlock) {
      i64 i = first + threadIdx.x, at = r * n + (reverse ? n - 1 - i : i);
      Wide<T> sum = i < n ? from[at] : T(0);
      for (int back = 1; back < 2 * kBlock; back *= 2) {
        __syncthreads();
        part[threadIdx.x] = sum;
        __syncthreads();
        if (threadIdx.x >= back) sum += part[threadIdx.x - back];
      }
      if (i < n) to.put(at, before + sum, add);
      before += part[kBlock - 1];
    }
  });
}

template <class T>
void OnCuda<T>::softmax(Rank& rank, const Tensor& x, const Tensor& y) {
  i64 n = x.cols();
  const T* from = x.as<T>();
  T* to = y.as<T>();
  cuda_each<1>(rank, x.rows(), [=] __device__(i64 r) {
    using A = Wide<T>;
    const auto larger = [](A a, A b) { return b > a ? b : a; };
    A top = -INFINITY, sum = 0;
    block_each(n, [&](i64 i) { top = larger(top, A(from[r * n + i])); });
    top = block_fold(top, larger);
    block_each(n, [&](i64 i) { sum += exp_negative(A(from[r * n + i]) - top); });
    sum = block_sum(sum);
    block_each(n, [&](i64 i) { to[r * n + i] = T(exp_negative(A(from[r * n + i]) - top) / sum); });
  });
}

template <class T>
void OnCuda<T>::softmax_grad(Rank& rank, const Tensor& dy, const Tensor& y, const GradSlot& slot) {
  const AnyFloat dx(slot.grad);
  bool add = slot.add;
  i64 n = y.cols();
  const T *g = dy.as<T>(), *p = y.as<T>();
  cuda_each<1>(rank, y.rows(), [=] __device__(i64 r) {
    Wide<T> mean = 0;
    block_each(n, [&](i64 i) { mean += g[r * n + i] * p[r * n + i]; });
    mean = block_sum(mean);
    block_each(n, [&](i64 i) { dx.put(r * n + i, p[r * n + i] * (g[r * n + i] - mean), add); });
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
  i64 n = x.cols();
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
  i64 n = dx.cols(), k = ids.cols();
  const int* id = ids.i32();
  const T* g = dy.as<T>();
  const AnyFloat to(dx);
  cuda_each(rank, ids.numel(), [=] __device__(i64 i) { to.put(i / k * n + id[i], g[i], true); });
}

template struct OnCuda<float>;
template struct OnCuda<double>;
template struct OnCuda<BF16>;

}
