#include <algorithm>

#include "ops/attention.h"
#include "ops/cpu.h"

namespace pith {
namespace {

// Queries a block: their scores against every key stay in a core's cache.
constexpr i64 kBlockRows = 64;

// What a thread works on: queries [first, first + rows) of head h of batch row b; `seen`, the keys
// that each sees; `hull`, those that any of them sees.
template <class T>
struct Block {
  static constexpr T kHidden = -std::numeric_limits<T>::infinity();
  const AttentionCore& core;
  vector<T> scores = vector<T>(kBlockRows * core.key.count), dscores = {};
  i64 b = 0, first = 0, rows = 0, h = 0, kv = 0, n = 0;
  KeyRange seen[kBlockRows] = {}, hull = {};

  void take(i64 row, i64 begin, i64 head) {
    b = row;
    first = begin;
    h = head;
    kv = head / (core.heads / core.kv_heads);
    rows = min(kBlockRows, core.query.count - begin);
    hull = {};
    for (i64 r = 0; r < rows; r++) hull.cover(seen[r] = visible_keys(core, b, first + r));
    n = hull.count();
  }
  T* lse_of(const Tensor& lse) const {
    return lse.as<T>() + (b * core.heads + h) * core.query.count + first;
  }
  T* query(const HeadView& x, i64 r = 0) const { return x.at<T>(b, h, first + r); }
  T* key(const HeadView& x) const { return x.at<T>(b, kv, hull.begin); }
  Matrix<T> queries(const HeadView& x) const { return {query(x), x.position}; }
  Matrix<T> keys(const HeadView& x, Layout layout = kNormal) const {
    return {key(x), x.position, layout};
  }

  // scores [rows, hull] = scale q k^T + bias, -inf where a query sees no key.
  void make_scores() {
    T* s = scores.data();
    gemm<T>(rows, n, core.size, queries(core.in.q), keys(core.in.k, kTransposed), 0, s, n,
        T(core.scale));
    for (i64 r = 0; r < rows; r++, s += n) {
      if (core.in.bias.data) {
        const T* bias = query(core.in.bias, r) + hull.begin;
        for (i64 j = 0; j < n; j++) s[j] += bias[j];
      }
      i64 count = seen[r].count(), from = count ? seen[r].begin - hull.begin : n;
      std::fill(s, s + from, kHidden);
      std::fill(s + from + count, s + n, kHidden);
    }
  }

  void forward(HeadView out, T* lse) {
    T scale[kBlockRows], *s = scores.data(), *y = query(out);
    make_scores();
    for (i64 r = 0; r < rows; r++) {
      // The sum is 0 where all is hidden, and NaN for NaNs, which `top` does not show.
      T top = max_of(s + r * n, n), shift = top == kHidden ? 0 : top;
      T sum = exp_sum(s + r * n, n, shift);
      scale[r] = sum == 0 ? 0 : 1 / sum;
      lse[r] = shift + std::log(sum);
    }
    gemm<T>(rows, core.v_size, n, {s, n}, keys(core.in.v), 0, y, out.position);
    for (i64 r = 0; r < rows; r++)
      for (i64 j = 0; j < core.v_size; j++) y[r * out.position + j] *= scale[r];
  }

  // p = exp(score - lse), ds = p (dout v^T - <dout, out>): dv = p^T dout, dq = scale ds k,
  // dk = scale ds^T q, dbias = ds.  Dao et al. 2022, arXiv:2205.14135
  void backward(HeadView out, const T* lse, HeadView dout, const AttentionViews& d) {
    make_scores();
    dscores.resize(scores.size());
    T *s = scores.data(), *ds = dscores.data();
    gemm<T>(rows, n, core.v_size, queries(dout), keys(core.in.v, kTransposed), 0, ds, n);
    for (i64 r = 0; r < rows; r++, s += n, ds += n) {
      if (lse[r] == kHidden)
        std::fill_n(s, n, T(0));
      else
        exp_sum(s, n, lse[r]);
      T mean = dot(query(dout, r), query(out, r), core.v_size);
      for (i64 j = 0; j < n; j++) ds[j] = s[j] * (ds[j] - mean);
      T* dbias = d.bias.data ? query(d.bias, r) + hull.begin : nullptr;
      for (i64 j = 0; dbias && j < n; j++) dbias[j] += ds[j];
    }
    T scale = T(core.scale);
    const Matrix<T> p_t{scores.data(), n, kTransposed}, d_s{dscores.data(), n};
    const Matrix<T> d_s_t{dscores.data(), n, kTransposed};
    if (d.v.data) gemm<T>(n, core.v_size, rows, p_t, queries(dout), 1, key(d.v), d.v.position);
    if (d.q.data)
      gemm<T>(rows, core.size, n, d_s, keys(core.in.k), 1, query(d.q), d.q.position, scale);
    if (d.k.data)
      gemm<T>(n, core.size, rows, d_s_t, queries(core.in.q), 1, key(d.k), d.k.position, scale);
  }
};

bool worth_threads(const AttentionCore& core) {
  return core.batch * core.heads * core.query.count * core.key.count * (core.size + core.v_size) >
         kParallelProduct;
}

}

KeyRange visible_keys(const AttentionCore& core, i64 b, i64 i) {
  int at = core.query.coord[i];
  const int *first = core.key.coord, *last = first + core.key.count;
  KeyRange seen{0, core.key.count};
  if (core.causal) seen.end = std::upper_bound(first, last, at) - first;
  if (core.window > 0) seen.begin = std::upper_bound(first, last, at - core.window) - first;
  if (core.query.doc_end && core.key.doc_end) {
    int doc = core.query.doc_end[b * core.query.doc_stride + i];
    const int* ends = core.key.doc_end + b * core.key.doc_stride;
    auto same = std::equal_range(ends, ends + core.key.count, doc);
    seen.begin = max<i64>(seen.begin, same.first - ends);
    seen.end = min<i64>(seen.end, same.second - ends);
  }
  return seen;
}

void attention_forward(const Op& op, const AttentionCore& core, HeadView out, const Tensor& lse) {
  if (lse.on_gpu()) return cuda_attention(op.rank, core, out, lse);
  i64 H = core.heads, blocks = (core.query.count + kBlockRows - 1) / kBlockRows;
  op.on_cpu(lse, [&]<class T>(T*) {
#pragma omp parallel if (worth_threads(core))
    {
      Block<T> block{core};
#pragma omp for schedule(dynamic)
      for (i64 task = 0; task < core.batch * blocks * H; task++) {
        block.take(task / H / blocks, task / H % blocks * kBlockRows, task % H);
        block.forward(out, block.lse_of(lse));
      }
    }
  });
}

// A task writes all gradients of a key/value head; only a bias's may be shared between tasks.
void attention_backward(const Op& op, const AttentionCore& core, HeadView out, const Tensor& lse,
    HeadView dout, const AttentionViews& grads) {
  if (lse.on_gpu()) return cuda_attention_grad(op.rank, core, out, lse, dout, grads);
  i64 K = core.kv_heads, group = K ? core.heads / K : 0;
  op.on_cpu(lse, [&]<class T>(T*) {
#pragma omp parallel if (!grads.bias.data && worth_threads(core))
    {
      Block<T> block{core};
#pragma omp for schedule(dynamic)
      for (i64 task = 0; task < core.batch * K; task++)
        for (i64 first = 0; first < core.query.count; first += kBlockRows)
          for (i64 h = task % K * group; h < (task % K + 1) * group; h++) {
            block.take(task / K, first, h);
            block.backward(out, block.lse_of(lse), dout, grads);
          }
    }
  });
}

}
