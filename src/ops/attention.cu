// attention: the GPU's plain form, a warp a row of scores, in any dtype: the oracle of the fast
// ones.
#include "core/cuda.cuh"
#include "ops/attention.h"
#include "ops/cuda.h"

namespace pith {
namespace {

// What a lane holds of a head: elements lane, lane + 32, ...
constexpr int kMaxSize = 256, kEach = kMaxSize / 32;

template <class T>
struct Scores {
  using A = Wide<T>;
  AttentionCore core;

  __device__ bool sees(i64 b, i64 i, i64 j) const {
    int at = core.query.coord ? core.query.coord[i] : int(i + core.key.count - core.query.count);
    int to = core.key.coord ? core.key.coord[j] : int(j);
    if ((core.causal && to > at) || (core.window > 0 && at - to >= core.window)) return false;
    return !core.query.doc_end || core.query.doc_end[b * core.query.doc_stride + i] ==
                                      core.key.doc_end[b * core.key.doc_stride + j];
  }
  static __device__ T* row(const HeadView& x, i64 b, i64 h, i64 i) {
    return reinterpret_cast<T*>(x.data) + b * x.batch + h * x.head + i * x.position;
  }
  __device__ i64 kv(i64 h) const { return h / (core.heads / core.kv_heads); }
  static __device__ void load(const T* from, i64 n, A (&x)[kEach]) {
    for (int l = 0; l < kEach; l++) {
      i64 at = threadIdx.x % 32 + l * 32;
      x[l] = at < n ? A(from[at]) : A(0);
    }
  }
  static __device__ A dot(const A (&x)[kEach], const A (&y)[kEach]) {
    A sum = 0;
    for (int l = 0; l < kEach; l++) sum += x[l] * y[l];
    return Team{32}.sum(sum);
  }
  __device__ A bias(i64 b, i64 h, i64 i, i64 j) const {
    return core.in.bias.data ? A(row(core.in.bias, b, h, i)[j]) : A(0);
  }
};

template <class T>
void plain_attention(Rank& rank, const Scores<T> s, HeadView out, const Tensor& lse) {
  using A = Wide<T>;
  const AttentionCore& c = s.core;
  i64 S = c.query.count, H = c.heads;
  A* sums = lse.as<A>();
  cuda_rows(rank, c.batch * H * S, 1, [=] __device__(i64 row, Team team) {
    i64 b = row / S / H, h = row / S % H, i = row % S;
    A q[kEach], k[kEach], v[kEach], y[kEach] = {}, top = -INFINITY, sum = 0;
    s.load(s.row(s.core.in.q, b, h, i), s.core.size, q);
    for (i64 j = 0; j < s.core.key.count; j++) {
      if (!s.sees(b, i, j)) continue;
      s.load(s.row(s.core.in.k, b, s.kv(h), j), s.core.size, k);
      A score = s.dot(q, k) * A(s.core.scale) + s.bias(b, h, i, j);
      if (score == -INFINITY) continue;
      s.load(s.row(s.core.in.v, b, s.kv(h), j), s.core.v_size, v);
      A next = score > top ? score : top, keep = std::exp(top - next), p = std::exp(score - next);
      sum = sum * keep + p;
      for (int l = 0; l < kEach; l++) y[l] = y[l] * keep + p * v[l];
      top = next;
    }
    for (int l = 0; l < kEach; l++) {
      i64 at = team.id() + l * 32;
      if (at < s.core.v_size) s.row(out, b, h, i)[at] = T(sum == 0 ? A(0) : y[l] / sum);
    }
    if (team.id() == 0) sums[row] = sum == 0 ? A(-INFINITY) : top + std::log(sum);
  });
}

// Of one score: its probability, and the gradient of the scaled score.
template <class T>
struct Slopes : Scores<T> {
  using A = Wide<T>;
  HeadView out, dout;
  const A* lse;
  // q and g: the query and its output's gradient.
  __device__ A slope(
      i64 b, i64 h, i64 i, i64 j, const A (&q)[kEach], const A (&g)[kEach], A mean, A& p) const {
    A k[kEach], v[kEach];
    const AttentionCore& c = this->core;
    A sum = lse[(b * c.heads + h) * c.query.count + i];
    this->load(this->row(c.in.k, b, this->kv(h), j), c.size, k);
    this->load(this->row(c.in.v, b, this->kv(h), j), c.v_size, v);
    A score = this->dot(q, k) * A(c.scale) + this->bias(b, h, i, j);
    p = sum == -INFINITY ? A(0) : std::exp(score - sum);
    return p * (this->dot(g, v) - mean);
  }
  __device__ A query(i64 b, i64 h, i64 i, A (&q)[kEach], A (&g)[kEach]) const {
    A y[kEach];
    const AttentionCore& c = this->core;
    this->load(this->row(c.in.q, b, h, i), c.size, q);
    this->load(this->row(dout, b, h, i), c.v_size, g);
    this->load(this->row(out, b, h, i), c.v_size, y);
    return this->dot(g, y);
  }
};

template <class T>
__device__ void add_to(T* to, i64 n, const Wide<T> (&x)[kEach], Wide<T> scale) {
  for (int l = 0; l < kEach; l++) {
    i64 at = threadIdx.x % 32 + l * 32;
    if (at < n) to[at] = T(Wide<T>(to[at]) + scale * x[l]);
  }
}

template <class T>
void plain_attention_grad(Rank& rank, const Slopes<T> s, const AttentionViews d) {
  using A = Wide<T>;
  const AttentionCore& c = s.core;
  i64 S = c.query.count, Z = c.key.count, H = c.heads, K = c.kv_heads;
  if (d.q.data)
    cuda_rows(rank, c.batch * H * S, 1, [=] __device__(i64 row, Team) {
      i64 b = row / S / H, h = row / S % H, i = row % S;
      A q[kEach], g[kEach], k[kEach], dq[kEach] = {}, p;
      A mean = s.query(b, h, i, q, g);
      for (i64 j = 0; j < Z; j++) {
        if (!s.sees(b, i, j)) continue;
        A ds = s.slope(b, h, i, j, q, g, mean, p);
        s.load(s.row(s.core.in.k, b, s.kv(h), j), s.core.size, k);
        for (int l = 0; l < kEach; l++) dq[l] += ds * k[l];
      }
      add_to(s.row(d.q, b, h, i), s.core.size, dq, A(s.core.scale));
    });
  if (d.k.data || d.v.data)
    cuda_rows(rank, c.batch * K * Z, 1, [=] __device__(i64 row, Team) {
      i64 b = row / Z / K, kv = row / Z % K, j = row % Z, group = H / K;
      A q[kEach], g[kEach], dk[kEach] = {}, dv[kEach] = {}, p;
      for (i64 i = 0; i < S; i++) {
        if (!s.sees(b, i, j)) continue;
        for (i64 h = kv * group; h < (kv + 1) * group; h++) {
          A mean = s.query(b, h, i, q, g), ds = s.slope(b, h, i, j, q, g, mean, p);
          for (int l = 0; l < kEach; l++) {
            dk[l] += ds * q[l];
            dv[l] += p * g[l];
          }
        }
      }
      if (d.k.data) add_to(s.row(d.k, b, kv, j), s.core.size, dk, A(s.core.scale));
      if (d.v.data) add_to(s.row(d.v, b, kv, j), s.core.v_size, dv, A(1));
    });
  if (!d.bias.data) return;
  // A warp an element of the bias, which several rows and heads may share.
  i64 B = d.bias.batch ? c.batch : 1, heads = d.bias.head ? H : 1;
  cuda_rows(rank, B * heads * S * Z, 1, [=] __device__(i64 at, Team team) {
    i64 j = at % Z, i = at / Z % S, first_h = at / Z / S % heads, first_b = at / Z / S / heads;
    A q[kEach], g[kEach], sum = 0, p;
    for (i64 b = first_b; b < s.core.batch; b += B)
      for (i64 h = first_h; h < H && s.sees(b, i, j); h += heads) {
        A mean = s.query(b, h, i, q, g);
        sum += s.slope(b, h, i, j, q, g, mean, p);
      }
    T* to = s.row(d.bias, first_b, first_h, i) + j;
    if (team.id() == 0) *to = T(A(*to) + sum);
  });
}

template <class T>
Scores<T> scores_of(const AttentionCore& core) {
  if (max(core.size, core.v_size) > kMaxSize)
    failed("attention", text("heads of %ld on a GPU (need <= %d)", core.size, kMaxSize));
  return {core};
}

template <class F>
void typed(DType dtype, F f) {
  if (dtype == DType::F64) return f((double*)nullptr);
  if (dtype == DType::BF16) return f((BF16*)nullptr);
  f((float*)nullptr);
}

}

void cuda_attention(Rank& rank, const AttentionCore& core, HeadView out, const Tensor& lse) {
  typed(core.dtype, [&]<class T>(T*) { plain_attention(rank, scores_of<T>(core), out, lse); });
}

void cuda_attention_grad(Rank& rank, const AttentionCore& core, HeadView out, const Tensor& lse,
    HeadView dout, const AttentionViews& grads) {
  typed(core.dtype, [&]<class T>(T*) {
    plain_attention_grad<T>(rank, {scores_of<T>(core), out, dout, lse.as<Wide<T>>()}, grads);
  });
}

}
