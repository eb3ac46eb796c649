// fused: the GPU's forms of norm.cpp, experts.cpp, cross_entropy.cpp and optimizer.cpp.
#include "core/cuda.cuh"
#include "core/rng.h"
#include "ops/cpu.h"

namespace pith {

// to[c] = or += the sum over rows r of what f(r, i, sum) adds for the columns of pack i, N of them:
// of pieces of rows first, then of these.
template <class A, int N, class F>
static void add_columns_of(Rank& rank, i64 rows, i64 cols, const GradSlot& to, F f) {
  if (!to.grad.data || cols == 0) return;
  constexpr int kTile = 16, kDown = kBlock / kTile;
  i64 packs = cols / N, tiles = (packs + kTile - 1) / kTile;
  i64 pieces = std::clamp<i64>(rows / kDown, 1, max<i64>(1, 528 / tiles));
  Tensor partial = empty(rank, {pieces, cols}, sizeof(A) == 8 ? DType::F64 : DType::F32);
  A* sums = partial.as<A>();
  cuda_each<1>(rank, tiles * pieces, [=] __device__(i64 b) {
    i64 i = b % tiles * kTile + threadIdx.x % kTile, piece = b / tiles;
    A sum[N] = {};
    for (i64 r = piece + threadIdx.x / kTile * pieces; i < packs && r < rows; r += kDown * pieces)
      f(r, i, sum);
    for (int j = 0; j < N; j++) {
      A all = block_sum(sum[j], kTile);
      if (threadIdx.x < kTile && i < packs) sums[piece * cols + i * N + j] = all;
    }
  });
  const AnyFloat out(to.grad);
  bool add = to.add;
  cuda_each<1>(rank, (cols + kTile - 1) / kTile, [=] __device__(i64 b) {
    i64 c = b * kTile + threadIdx.x % kTile;
    A sum = 0;
    for (i64 p = threadIdx.x / kTile; c < cols && p < pieces; p += kDown) sum += sums[p * cols + c];
    sum = block_sum(sum, kTile);
    if (threadIdx.x < kTile && c < cols) out.put(c, sum, add);
  });
}

template <class T, int N>
static void norm_rows(Rank& rank, i64 rows, i64 n, const T* x, const T* more, const T* w,
    Wide<T> eps, T* sum, T* normed, Wide<T>* rstd) {
  using A = Wide<T>;
  cuda_rows(rank, rows, n / N, [=] __device__(i64 r, Team team) {
    const T* row = (more ? sum : x) + r * n;
    A squares = 0;
    team.each(n / N, [&](i64 i) {
      Pack<T, N> a = pack<N>(x + r * n, i);
      if (more) {
        const Pack<T, N> b = pack<N>(more + r * n, i);
        for (int j = 0; j < N; j++) a.x[j] = T(A(a.x[j]) + A(b.x[j]));
        pack<N>(sum + r * n, i) = a;
      }
      for (int j = 0; j < N; j++) squares += A(a.x[j]) * A(a.x[j]);
    });
    A scale = 1 / std::sqrt(team.sum(squares) / n + eps);
    if (team.id() == 0) rstd[r] = scale;
    team.each(n / N, [&](i64 i) {
      Pack<T, N> a = pack<N>(row, i);
      const Pack<T, N> b = pack<N>(w, i);
      for (int j = 0; j < N; j++) a.x[j] = T(A(a.x[j]) * scale * A(b.x[j]));
      pack<N>(normed + r * n, i) = a;
    });
  });
}

template <class T>
void OnCuda<T>::rms_norm(Rank& rank, const Tensor& x, const Tensor& residual, const Tensor& w,
    double eps, const AddRmsNorm& y, const Tensor& rstd) {
  with_packs<T>(w.numel(), [&](auto width) {
    norm_rows<T, width>(rank, x.rows(), w.numel(), x.as<T>(), residual.as<T>(), w.as<T>(), eps,
        y.sum.as<T>(), y.normed.as<T>(), rstd.as<Wide<T>>());
  });
}

template <class T, int N>
static void norm_grad_rows(Rank& rank, i64 rows, i64 n, const T* dy, const T* dsum, const T* x,
    const T* w, const Wide<T>* rstd, T* dx, T* copy) {
  using A = Wide<T>;
  cuda_rows(rank, rows, n / N, [=] __device__(i64 r, Team team) {
    A s = rstd[r];
    A along = 0;
    if (dy)
      team.each(n / N, [&](i64 i) {
        const Pack<T, N> g = pack<N>(dy + r * n, i), a = pack<N>(x + r * n, i), b = pack<N>(w, i);
        for (int j = 0; j < N; j++) along += A(g.x[j]) * A(b.x[j]) * A(a.x[j]);
      });
    A c = team.sum(along) * s * s * s / n;
    team.each(n / N, [&](i64 i) {
      A to[N] = {};
      if (dy) {
        const Pack<T, N> g = pack<N>(dy + r * n, i), a = pack<N>(x + r * n, i), b = pack<N>(w, i);
        for (int j = 0; j < N; j++) to[j] = A(g.x[j]) * A(b.x[j]) * s - A(a.x[j]) * c;
      }
      if (dsum) {
        const Pack<T, N> more = pack<N>(dsum + r * n, i);
        for (int j = 0; j < N; j++) to[j] += A(more.x[j]);
      }
      Pack<T, N> out;
      for (int j = 0; j < N; j++) out.x[j] = T(to[j]);
      pack<N>(dx + r * n, i) = out;
      if (copy) pack<N>(copy + r * n, i) = out;
    });
  });
}

template <class T>
void OnCuda<T>::rms_norm_grad(Rank& rank, const Tensor& dy, const Tensor& dsum,
    const TensorList& keep, const Tensor& dx, const Tensor& copy) {
  i64 n = dx.cols();
  with_packs<T>(n, [&](auto width) {
    norm_grad_rows<T, width>(rank, dx.rows(), n, dy.as<T>(), dsum.as<T>(), keep[0].as<T>(),
        keep[1].as<T>(), keep[2].as<Wide<T>>(), dx.as<T>(), copy.as<T>());
  });
}

template <class T, int N>
static void norm_weight(
    Rank& rank, const Tensor& dy, const Tensor& x, const Tensor& rstd, const GradSlot& dw) {
  using A = Wide<T>;
  i64 n = x.cols();
  const T *g = dy.as<T>(), *row = x.as<T>();
  const A* scale = rstd.as<A>();
  add_columns_of<A, N>(rank, x.rows(), n, dw, [=] __device__(i64 r, i64 i, A * sum) {
    const Pack<T, N> a = pack<N>(g + r * n, i), b = pack<N>(row + r * n, i);
    for (int j = 0; j < N; j++) sum[j] += A(a.x[j]) * (A(b.x[j]) * scale[r]);
  });
}

template <class T>
void OnCuda<T>::rms_norm_weight(
    Rank& rank, const Tensor& dy, const Tensor& x, const Tensor& rstd, const GradSlot& dw) {
  with_packs<T>(x.cols(), [&](auto width) { norm_weight<T, width>(rank, dy, x, rstd, dw); });
}

template <class T>
void OnCuda<T>::rope_tables(Rank& rank, const Rope& rope, int size, double theta) {
  i64 half = size / 2;
  T *cos_to = rope.cos.as<T>(), *sin_to = rope.sin.as<T>();
  cuda_each(rank, rope.cos.numel(), [=] __device__(i64 at) {
    double turn = double(at / half) * pow(theta, -2.0 * double(at % half) / size);
    cos_to[at] = T(cos(turn));
    sin_to[at] = T(sin(turn));
  });
}

// Pack i of a head's low half and of its high half, which turn together.
template <class T, int N>
struct Halves {
  Wide<T> a[N], b[N];
  __device__ Halves(const T* head, i64 packs, i64 i) {
    const Pack<T, N> low = pack<N>(head, i), high = pack<N>(head, packs + i);
    for (int j = 0; j < N; j++) {
      a[j] = low.x[j];
      b[j] = high.x[j];
    }
  }
  __device__ void put(T* head, i64 packs, i64 i) const {
    Pack<T, N> low, high;
    for (int j = 0; j < N; j++) {
      low.x[j] = T(a[j]);
      high.x[j] = T(b[j]);
    }
    pack<N>(head, i) = low;
    pack<N>(head, packs + i) = high;
  }
};

// For qk_norm_rope: a team a head.
template <class T>
struct HeadTurns {
  using A = Wide<T>;
  int query, turned, all;
  i64 n, half;
  const A *cosines, *sines;
  const int* positions;
  const T *x, *q_norm, *k_norm;
  A* rstd;
  HeadTurns(const Heads& heads, const TensorList& keep, const Tensor& qkv)
      : query(heads.query),
        turned(heads.query + heads.kv),
        all(turned + heads.kv),
        n(heads.size),
        half(heads.size / 2),
        cosines(keep[0].as<A>()),
        sines(keep[1].as<A>()),
        positions(keep[2].i32()),
        x(qkv.as<T>()),
        q_norm(keep[5].as<T>()),
        k_norm(keep[6].as<T>()),
        rstd(keep[4].as<A>()) {}
  __device__ const T* weight(int head) const { return head < query ? q_norm : k_norm; }
  __device__ int token(u32 row) const { return row / u32(all); }
  __device__ int head(u32 row) const { return row % u32(all); }
  __device__ A* scale_of(i64 row) const { return rstd + token(row) * i64(turned) + head(row); }
  // By the angle of the token of head `row` of the whole projection, times `sign`.
  template <int N>
  __device__ void turn(i64 row, i64 i, A sign, Halves<T, N>& v) const {
    i64 at = positions[token(row)] * half;
    const Pack<A, N> c = pack<N>(cosines + at, i), s = pack<N>(sines + at, i);
    for (int j = 0; j < N; j++) {
      A before = v.a[j], sine = sign * s.x[j];
      v.a[j] = before * c.x[j] - v.b[j] * sine;
      v.b[j] = v.b[j] * c.x[j] + before * sine;
    }
  }
};

// Of half a head.
static int team_of(i64 packs) { return packs > 16 ? 32 : packs > 8 ? 16 : 8; }

template <class T, int N>
static void turn_heads(Rank& rank, i64 rows, const HeadTurns<T>& h, Wide<T> eps, T* out) {
  using A = Wide<T>;
  i64 packs = h.half / N;
  auto one = [=] __device__(i64 row, Team team) {
    int head = h.head(row);
    const T *from = h.x + row * h.n, *w = h.weight(head);
    T* to = out + row * h.n;
    if (head >= h.turned)
      return team.each(2 * packs, [&](i64 i) { pack<N>(to, i) = pack<N>(from, i); });
    A scale = 1, squares = 0;
    if (w) {
      team.each(packs, [&](i64 i) {
        const Halves<T, N> v(from, packs, i);
        for (int j = 0; j < N; j++) squares += v.a[j] * v.a[j] + v.b[j] * v.b[j];
      });
      scale = 1 / std::sqrt(team.sum(squares) / h.n + eps);
      if (team.id() == 0) *h.scale_of(row) = scale;
    }
    team.each(packs, [&](i64 i) {
      Halves<T, N> v(from, packs, i);
      if (w) {
        const Halves<T, N> by(w, packs, i);
        for (int j = 0; j < N; j++) {
          v.a[j] *= scale * by.a[j];
          v.b[j] *= scale * by.b[j];
        }
      }
      h.turn(row, i, 1, v);
      v.put(to, packs, i);
    });
  };
  cuda_rows(rank, rows, packs, one, team_of(packs));
}

template <class T>
void OnCuda<T>::qk_norm_rope(Rank& rank, const Heads& heads, const TensorList& keep,
    const Tensor& qkv, double eps, const Tensor& y) {
  const HeadTurns<T> h(heads, keep, qkv);
  with_packs<T>(h.half,
      [&](auto width) { turn_heads<T, width>(rank, qkv.dim[0] * h.all, h, eps, y.as<T>()); });
}

template <class T, int N>
static void turn_back(Rank& rank, i64 rows, const HeadTurns<T>& h, const T* grad, T* out) {
  using A = Wide<T>;
  i64 packs = h.half / N;
  auto one = [=] __device__(i64 row, Team team) {
    int head = h.head(row);
    const T *g = grad + row * h.n, *x = h.x + row * h.n, *w = h.weight(head);
    T* to = out + row * h.n;
    if (head >= h.turned)
      return team.each(2 * packs, [&](i64 i) { pack<N>(to, i) = pack<N>(g, i); });
    A s = w ? *h.scale_of(row) : 1, along = 0;
    if (w)
      team.each(packs, [&](i64 i) {
        Halves<T, N> v(g, packs, i);
        const Halves<T, N> by(w, packs, i), of(x, packs, i);
        h.turn(row, i, -1, v);
        for (int j = 0; j < N; j++)
          along += v.a[j] * by.a[j] * of.a[j] + v.b[j] * by.b[j] * of.b[j];
      });
    A c = team.sum(along) * s * s * s / h.n;
    team.each(packs, [&](i64 i) {
      Halves<T, N> v(g, packs, i);
      h.turn(row, i, -1, v);
      if (w) {
        const Halves<T, N> by(w, packs, i), of(x, packs, i);
        for (int j = 0; j < N; j++) {
          v.a[j] = v.a[j] * by.a[j] * s - of.a[j] * c;
          v.b[j] = v.b[j] * by.b[j] * s - of.b[j] * c;
        }
      }
      v.put(to, packs, i);
    });
  };
  cuda_rows(rank, rows, packs, one, team_of(packs));
}

template <class T>
void OnCuda<T>::qk_norm_rope_grad(
    Rank& rank, const Heads& heads, const TensorList& keep, const Tensor& dy, const Tensor& dx) {
  const HeadTurns<T> h(heads, keep, keep[3]);
  with_packs<T>(h.half,
      [&](auto width) { turn_back<T, width>(rank, dy.dim[0] * h.all, h, dy.as<T>(), dx.as<T>()); });
}

// Of the weight of heads [first, first + count).
template <class T, int N>
static void turn_weight(Rank& rank, i64 tokens, const HeadTurns<T>& h, const T* grad, int first,
    u32 count, const GradSlot& dw) {
  using A = Wide<T>;
  i64 packs = h.half / N;
  add_columns_of<A, N>(rank, tokens * count, h.n, dw, [=] __device__(i64 r, i64 i, A * sum) {
    i64 row = i64(u32(r) / count) * h.all + first + u32(r) % count, turning = i % packs;
    Halves<T, N> v(grad + row * h.n, packs, turning);
    const Pack<T, N> x = pack<N>(h.x + row * h.n, i);
    h.turn(row, turning, -1, v);
    for (int j = 0; j < N; j++)
      sum[j] += (i < packs ? v.a[j] : v.b[j]) * (A(x.x[j]) * *h.scale_of(row));
  });
}

template <class T>
void OnCuda<T>::qk_norm_weight(Rank& rank, const Heads& heads, const TensorList& keep,
    const Tensor& dy, int first, int end, const GradSlot& dw) {
  const HeadTurns<T> h(heads, keep, keep[3]);
  with_packs<T>(h.half, [&](auto width) {
    turn_weight<T, width>(rank, dy.dim[0], h, dy.as<T>(), first, end - first, dw);
  });
}

template <class T>
void OnCuda<T>::route(Rank& rank, const RouterOptions& o, const Routing& out) {
  using A = Wide<T>;
  i64 k = o.top_k, E = out.probs.dim[1];
  A *probs = out.probs.as<A>(), *weights = out.weights.as<A>();
  int* ids = out.ids.i32();
  const int* forced = o.forced_ids.i32();
  bool balanced = o.force_balanced, normalize = o.normalize;
  cuda_rows(rank, out.probs.dim[0], 1, [=] __device__(i64 t, Team team) {
    const auto larger = [](A a, A b) { return b > a ? b : a; };
    A *p = probs + t * E, top = -INFINITY, sum = 0;
    team.each(E, [&](i64 e) { top = larger(top, p[e]); });
    top = team.fold(top, larger);
    team.each(E, [&](i64 e) { sum += p[e] = exp_negative(p[e] - top); });
    A scale = 1 / team.sum(sum);
    team.each(E, [&](i64 e) { p[e] *= scale; });
    __syncwarp();
    A last = INFINITY, total = 0;
    int id = -1;
    for (i64 j = 0; j < k; j++) {
      if (forced) {
        id = forced[t * k + j];
      } else if (balanced) {
        id = (t + j * (E / k)) % E;
      } else {  // the largest after the last one; ties go to the lower id
        A best = -1;
        int at = INT_MAX;
        team.each(E, [&](i64 e) {
          bool after = p[e] < last || (p[e] == last && e > id);
          if (after && p[e] > best) {
            best = p[e];
            at = e;
          }
        });
        last = team.fold(best, larger);
        id = team.fold(best == last ? at : INT_MAX, [](int a, int b) { return a < b ? a : b; });
        if (id == INT_MAX) id = j;  // NaNs alone
      }
      total += p[id];
      if (team.id() != 0) continue;
      ids[t * k + j] = id;
      weights[t * k + j] = p[id];
    }
    __syncwarp();
    if (normalize) team.each(k, [&](i64 j) { weights[t * k + j] /= total; });
  });
}

template <class T>
void OnCuda<T>::route_grad(Rank& rank, bool normalize, const TensorList& keep,
    const Tensor& dweights, const Tensor& dprobs, const Tensor& dlogits) {
  using A = Wide<T>;
  const A *probs = keep[1].as<A>(), *dw = dweights.as<A>(), *dp = dprobs.as<A>();
  const int* ids = keep[2].i32();
  i64 E = keep[1].dim[1], k = keep[2].dim[1];
  T* out = dlogits.as<T>();
  cuda_rows(rank, dlogits.dim[0], 1, [=] __device__(i64 t, Team team) {
    const A* p = probs + t * E;
    const int* id = ids + t * k;
    A total = normalize ? 0 : 1, mean = 0, along = 0;
    for (i64 j = 0; normalize && j < k; j++) total += p[id[j]];
    for (i64 j = 0; normalize && dw && j < k; j++) mean += dw[t * k + j] * (p[id[j]] / total);
    auto grad = [&](i64 e) {
      A g = dp ? dp[t * E + e] : 0;
      for (i64 j = 0; dw && j < k; j++)
        if (id[j] == e) g += (dw[t * k + j] - mean) / total;
      return g;
    };
    team.each(E, [&](i64 e) { along += grad(e) * p[e]; });
    along = team.sum(along);
    team.each(E, [&](i64 e) { out[t * E + e] = T(p[e] * (grad(e) - along)); });
  });
}

template <class T, int N>
static void swiglu_rows(
    Rank& rank, i64 rows, i64 F, const T* gate_up, const Wide<T>* weights, T* out) {
  using A = Wide<T>;
  i64 packs = F / N;
  cuda_each(rank, rows * packs, [=] __device__(i64 at) {
    i64 p = at / packs, i = at % packs;
    const Pack<T, N> gate = pack<N>(gate_up, p * 2 * packs + i);
    Pack<T, N> up = pack<N>(gate_up, p * 2 * packs + packs + i);
    A weight = weights ? weights[p] : 1;
    for (int j = 0; j < N; j++) {
      A g = gate.x[j];
      up.x[j] = T(g * logistic(g) * A(up.x[j]) * weight);
    }
    pack<N>(out, at) = up;
  });
}

template <class T>
void OnCuda<T>::swiglu(Rank& rank, const Tensor& gate_up, const Tensor& weights, const Tensor& y) {
  with_packs<T>(y.dim[1], [&](auto width) {
    swiglu_rows<T, width>(
        rank, y.dim[0], y.dim[1], gate_up.as<T>(), weights.as<Wide<T>>(), y.as<T>());
  });
}

template <class T, int N>
static void swiglu_grad_rows(Rank& rank, i64 rows, i64 F, const T* dy, const T* gate_up,
    const Wide<T>* weights, T* dgate_up, Wide<T>* dweights) {
  using A = Wide<T>;
  i64 packs = F / N;
  cuda_rows(rank, rows, packs, [=] __device__(i64 p, Team team) {
    A weight = weights ? weights[p] : 1;
    A dweight = 0;
    team.each(packs, [&](i64 i) {
      const Pack<T, N> g = pack<N>(dy + p * F, i);
      Pack<T, N> gate = pack<N>(gate_up + p * 2 * F, i), up = pack<N>(gate_up + p * 2 * F + F, i);
      for (int j = 0; j < N; j++) {
        A a = gate.x[j], u = up.x[j], s = logistic(a), d = A(g.x[j]) * weight;
        dweight += A(g.x[j]) * (a * s * u);
        up.x[j] = T(d * (a * s));
        gate.x[j] = T(d * u * (s + a * s * (1 - s)));
      }
      pack<N>(dgate_up + p * 2 * F, i) = gate;
      pack<N>(dgate_up + p * 2 * F + F, i) = up;
    });
    dweight = team.sum(dweight);
    if (dweights && team.id() == 0) dweights[p] = dweight;
  });
}

template <class T>
void OnCuda<T>::swiglu_grad(Rank& rank, const Tensor& dy, const TensorList& keep,
    const Tensor& dgate_up, const Tensor& dweights) {
  with_packs<T>(dy.dim[1], [&](auto width) {
    swiglu_grad_rows<T, width>(rank, dy.dim[0], dy.dim[1], dy.as<T>(), keep[0].as<T>(),
        keep[1].as<Wide<T>>(), dgate_up.as<T>(), dweights.as<Wide<T>>());
  });
}

// PERF: the GPU's own exponential, whose error BF16 does not see.
template <class T>
__device__ Wide<T> exp_of(Wide<T> x) {
  if constexpr (sizeof(T) == 2)
    return __expf(x);
  else
    return exp_negative(x);
}

constexpr int kLossThreads = 1024;
constexpr int kKept = 200 << 10;  // bytes of a row, in shared memory

// PERF: most of a row of many logits is read once: a block, alone on its processor, keeps it.
template <class T, int N>
__global__ void __launch_bounds__(kLossThreads) loss_kernel(
    i64 rows, int packs, T* logits, const int* labels, Wide<T> scale, bool grad, double* losses) {
  using A = Wide<T>;
  extern __shared__ int4 shared[];
  constexpr int kPackBytes = N * sizeof(T), kAtOnce = 2;
  const Team team{kLossThreads};
  T* kept = reinterpret_cast<T*>(shared);
  int held = min(packs, kKept / kPackBytes);
  for (i64 r = blockIdx.x; r < rows; r += gridDim.x) {
    T* row = logits + r * packs * N;
    int label = labels[r];
    bool counts = label != kIgnoreLabel;
    A top = -INFINITY, sum = 0;
    for (int i = team.id(); counts && i < packs; i += kAtOnce * kLossThreads) {
      Pack<T, N> a[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; k++)
        if (i + k * kLossThreads < packs) a[k] = pack<N>(row, i + k * kLossThreads);
#pragma unroll
      for (int k = 0; k < kAtOnce; k++) {
        int at = i + k * kLossThreads;
        if (at >= packs) break;
        if (at < held) pack<N>(kept, at) = a[k];
        A most = top;
        for (int j = 0; j < N; j++) most = A(a[k].x[j]) > most ? A(a[k].x[j]) : most;
        if (most > top) sum *= exp_of<T>(top - most);
        top = most;
        for (int j = 0; j < N; j++) sum += exp_of<T>(A(a[k].x[j]) - top);
      }
    }
    A all = team.fold(top, [](A a, A b) { return b > a ? b : a; });
    sum = team.sum(top > -INFINITY ? sum * exp_of<T>(top - all) : sum);
    if (team.id() == 0)
      losses[r] = counts ? std::log(double(sum)) + double(all - A(row[label])) : 0;
    __syncthreads();
    A factor = counts ? scale / sum : 0;
    for (int i = team.id(); grad && i < packs; i += kLossThreads) {
      Pack<T, N> a = counts && i < held ? pack<N>(kept, i) : pack<N>(row, i);
      for (int j = 0; j < N; j++) {
        A p = exp_of<T>(A(a.x[j]) - all) * factor;
        a.x[j] = counts ? T(i * N + j == label ? p - scale : p) : T(0);
      }
      pack<N>(row, i) = a;
    }
  }
}

template <class T, int N>
static void loss_rows(Rank& rank, i64 rows, i64 V, T* logits, const int* labels, Wide<T> scale,
    bool grad, double* losses) {
  if (rows == 0) return;
  const Cuda& cuda = cuda_of(rank);
  const auto kernel = loss_kernel<T, N>;
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kKept));
  kernel<<<min<i64>(rows, cuda.processors), kLossThreads, kKept, cuda.stream>>>(
      rows, V / N, logits, labels, scale, grad, losses);
  cuda_check(cudaGetLastError());
}

template <class T>
void OnCuda<T>::row_losses(Rank& rank, const Tensor& logits, const Tensor& labels, double scale,
    bool grad, const Tensor& losses) {
  with_packs<T>(logits.dim[1], [&](auto width) {
    loss_rows<T, width>(rank, logits.dim[0], logits.dim[1], logits.as<T>(), labels.i32(), scale,
        grad, losses.as<double>());
  });
}

template <class T, int N>
static void adamw_packs(
    Rank& rank, i64 packs, T* w, const T* g, T* m, T* v, const AdamWFactors<T>& o) {
  cuda_each(rank, packs, [=] __device__(i64 i) {
    const Pack<T, N> grad = pack<N>(g, i);
    Pack<T, N> weight = pack<N>(w, i), first = pack<N>(m, i), second = pack<N>(v, i);
    for (int j = 0; j < N; j++) o.step(grad.x[j], weight.x[j], first.x[j], second.x[j]);
    pack<N>(w, i) = weight;
    pack<N>(m, i) = first;
    pack<N>(v, i) = second;
  });
}

template <class T>
void OnCuda<T>::adamw(Rank& rank, const Tensor& w, const Tensor& g, const Tensor& m,
    const Tensor& v, const AdamW& options) {
  const AdamWFactors<T> o(options);
  with_packs<T>(w.numel(), [&](auto width) {
    adamw_packs<T, width>(rank, w.numel() / width, w.as<T>(), g.as<T>(), m.as<T>(), v.as<T>(), o);
  });
}

template <class T>
double OnCuda<T>::sum_squares(Rank& rank, const Tensor& x) {
  i64 n = x.numel(), blocks = cuda_of(rank).processors * 8;
  const T* from = x.as<T>();
  Tensor sums = empty(rank, {blocks}, DType::F64);
  double* to = sums.as<double>();
  cuda_each<1>(rank, blocks, [=] __device__(i64 b) {
    double sum = 0;
    for (i64 i = b * kBlock + threadIdx.x; i < n; i += blocks * kBlock)
      sum += double(from[i]) * double(from[i]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) to[b] = sum;
  });
  vector<char> bytes;
  Tensor host = on_host(rank, sums, bytes);
  double total = 0;
  for (i64 b = 0; b < blocks; b++) total += host.as<double>()[b];
  return total;
}

template <class T>
void OnCuda<T>::fill_normal(Rank& rank, const Tensor& x, u64 key, u64 first, double std) {
  T* to = x.as<T>();
  cuda_each(rank, x.numel(), [=] __device__(i64 i) { to[i] = T(std * normal_at(key, first + i)); });
}

template struct OnCuda<float>;
template struct OnCuda<double>;
template struct OnCuda<BF16>;

}
