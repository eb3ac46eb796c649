#include <algorithm>

#include "ops/attention.h"
#include "ops/cpu.h"

namespace pith {
namespace {

// Queries a block: few enough that their scores against every key stay in a core's cache.
constexpr int64_t kBlockRows = 64;

template <class T>
constexpr T kHidden = -std::numeric_limits<T>::infinity();

// Queries [first, first + rows) of head h of batch row b, kv its key head; the keys that each sees,
// and `hull`, those that any of them sees.
struct Block {
  int64_t b, first, rows, h = 0, kv = 0;
  KeyRange seen[kBlockRows] = {}, hull = {};
  Block(const AttentionCore& core, int64_t row, int64_t begin)
      : b(row), first(begin), rows(std::min(kBlockRows, core.query.count - begin)) {
    for (int64_t r = 0; r < rows; r++) hull.cover(seen[r] = visible_keys(core, b, first + r));
  }
  void take_head(const AttentionCore& core, int64_t head) {
    h = head;
    kv = head / (core.heads / core.kv_heads);
  }
  // The block's queries in a view of q's kind, and its keys in one of k's.
  template <class T>
  T* queries(const HeadView& x, int64_t r = 0) const {
    return x.at<T>(b, h, first + r);
  }
  template <class T>
  T* keys(const HeadView& x) const {
    return x.at<T>(b, kv, hull.begin);
  }
};

// s [rows, hull] = scale q k^T + bias, -inf where a query sees no key.
template <class T>
void block_scores(const AttentionCore& core, const Block& x, T* s) {
  const int64_t n = x.hull.count(), begin = x.hull.begin;
  gemm<T>(x.rows, n, core.size, {x.queries<T>(core.in.q), core.in.q.position},
          {x.keys<T>(core.in.k), core.in.k.position, Layout::Transposed}, 0, s, n, T(core.scale));
  for (int64_t r = 0; r < x.rows; r++, s += n) {
    if (core.in.bias.data) {
      const T* bias = x.queries<T>(core.in.bias, r) + begin;
      for (int64_t j = 0; j < n; j++) s[j] += bias[j];
    }
    if (core.visible.data) {
      const uint8_t* seen = x.queries<uint8_t>(core.visible, r) + begin;
      for (int64_t j = 0; j < n; j++) s[j] = seen[j] ? s[j] : kHidden<T>;
    }
    const int64_t keys = x.seen[r].count(), from = keys ? x.seen[r].begin - begin : n;
    std::fill(s, s + from, kHidden<T>);
    std::fill(s + from + keys, s + n, kHidden<T>);
  }
}

template <class T>
void forward_block(const AttentionCore& core, const Block& x, T* s, HeadView out, T* lse) {
  const int64_t n = x.hull.count();
  T scale[kBlockRows];
  block_scores(core, x, s);
  for (int64_t r = 0; r < x.rows; r++) {
    // A row whose scores are all hidden has the sum 0; one of NaNs, which `top` does not show,
    // has a NaN.
    const T top = max_of(s + r * n, n), shift = top == kHidden<T> ? 0 : top;
    const T sum = exp_sum(s + r * n, n, shift);
    scale[r] = sum == 0 ? 0 : 1 / sum;
    lse[r] = shift + std::log(sum);
  }
  T* y = x.queries<T>(out);
  gemm<T>(x.rows, core.v_size, n, {s, n}, {x.keys<T>(core.in.v), core.in.v.position}, 0, y,
          out.position);
  for (int64_t r = 0; r < x.rows; r++)
    for (int64_t j = 0; j < core.v_size; j++) y[r * out.position + j] *= scale[r];
}

// dp = the gradients of a block's scores, s = their probabilities.
template <class T>
void score_grads(const AttentionCore& core, const Block& x, HeadView out, const T* lse,
                 HeadView dout, T* s, T* dp) {
  const int64_t n = x.hull.count();
  block_scores(core, x, s);
  gemm<T>(x.rows, n, core.v_size, {x.queries<T>(dout), dout.position},
          {x.keys<T>(core.in.v), core.in.v.position, Layout::Transposed}, 0, dp, n);
  for (int64_t r = 0; r < x.rows; r++, s += n, dp += n) {
    if (lse[r] == kHidden<T>)
      std::fill_n(s, n, T(0));
    else
      exp_sum(s, n, lse[r]);
    const T mean = dot(x.queries<T>(dout, r), x.queries<T>(out, r), core.v_size);
    for (int64_t j = 0; j < n; j++) dp[j] = s[j] * (dp[j] - mean);
  }
}

// Adds what a block's probabilities p and its scores' gradients ds give.
template <class T>
void add_grads(const AttentionCore& core, const Block& x, HeadView dout, const T* p, const T* ds,
               const AttentionViews& d) {
  const int64_t n = x.hull.count();
  const AttentionViews& in = core.in;
  const T scale = T(core.scale);
  if (d.v.data)
    gemm<T>(n, core.v_size, x.rows, {p, n, Layout::Transposed}, {x.queries<T>(dout), dout.position},
            1, x.keys<T>(d.v), d.v.position);
  if (d.q.data)
    gemm<T>(x.rows, core.size, n, {ds, n}, {x.keys<T>(in.k), in.k.position}, 1, x.queries<T>(d.q),
            d.q.position, scale);
  if (d.k.data)
    gemm<T>(n, core.size, x.rows, {ds, n, Layout::Transposed}, {x.queries<T>(in.q), in.q.position},
            1, x.keys<T>(d.k), d.k.position, scale);
  for (int64_t r = 0; d.bias.data && r < x.rows; r++) {
    T* dbias = x.queries<T>(d.bias, r) + x.hull.begin;
    for (int64_t c = 0; c < n; c++) dbias[c] += ds[r * n + c];
  }
}

bool worth_threads(const AttentionCore& core) {
  return core.batch * core.heads * core.query.count * core.key.count * (core.size + core.v_size) >
         kParallelProduct;
}

template <class T>
void forward_cpu(const AttentionCore& core, HeadView out, T* lse) {
  const int64_t S = core.query.count, H = core.heads, blocks = (S + kBlockRows - 1) / kBlockRows;
#pragma omp parallel if (worth_threads(core))
  {
    vector<T> s(kBlockRows * core.key.count);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < core.batch * blocks * H; task++) {
      const int64_t h = task % H, b = task / H / blocks;
      Block x(core, b, task / H % blocks * kBlockRows);
      x.take_head(core, h);
      forward_block(core, x, s.data(), out, lse + (b * H + h) * S + x.first);
    }
  }
}

// One task writes all gradients of one key/value head. Only a bias's may be shared between tasks.
template <class T>
void backward_cpu(const AttentionCore& core, HeadView out, const T* lse, HeadView dout,
                  const AttentionViews& grads) {
  const int64_t S = core.query.count, group = core.kv_heads ? core.heads / core.kv_heads : 0;
#pragma omp parallel if (!grads.bias.data && worth_threads(core))
  {
    vector<T> s(kBlockRows * core.key.count), dp(s.size());
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < core.batch * core.kv_heads; task++) {
      const int64_t b = task / core.kv_heads, kv = task % core.kv_heads;
      for (int64_t first = 0; first < S; first += kBlockRows) {
        Block x(core, b, first);
        for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
          x.take_head(core, h);
          score_grads(core, x, out, lse + (b * core.heads + h) * S + first, dout, s.data(),
                      dp.data());
          add_grads(core, x, dout, s.data(), dp.data(), grads);
        }
      }
    }
  }
}

}  // namespace

KeyRange visible_keys(const AttentionCore& core, int64_t b, int64_t i) {
  const int32_t at = core.query.coord[i];
  const int32_t *first = core.key.coord, *last = first + core.key.count;
  KeyRange seen{0, core.key.count};
  if (core.causal) seen.end = std::upper_bound(first, last, at) - first;
  if (core.window > 0) seen.begin = std::upper_bound(first, last, at - core.window) - first;
  if (core.query.doc_end && core.key.doc_end) {
    const int32_t doc = core.query.doc_end[b * core.query.doc_stride + i];
    const int32_t* ends = core.key.doc_end + b * core.key.doc_stride;
    const auto same = std::equal_range(ends, ends + core.key.count, doc);
    seen.begin = std::max<int64_t>(seen.begin, same.first - ends);
    seen.end = std::min<int64_t>(seen.end, same.second - ends);
  }
  return seen;
}

void attention_forward(const Op& op, const AttentionCore& core, HeadView out, const Tensor& lse) {
  op.on_cpu(lse, [&]<class T>(T*) { forward_cpu(core, out, lse.as<T>()); });
}

void attention_backward(const Op& op, const AttentionCore& core, HeadView out, const Tensor& lse,
                        HeadView dout, const AttentionViews& grads) {
  op.on_cpu(lse, [&]<class T>(T*) { backward_cpu(core, out, lse.as<T>(), dout, grads); });
}

}  // namespace pith
