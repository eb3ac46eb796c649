// ring_attention: attention over rows that a cp group shares, cut into 2*cp chunks of which member
// r holds r and 2*cp-1-r, so that all members have the same work under a causal mask (Brandon et
// al. 2023, arXiv:2311.09431).
//
// At step s member r computes with the keys of member r-s, which come straight from their owner:
// handed from neighbour to neighbour, a chunk would have to pass members that have no use for it.
// So only keys travel that a query there may see, whatever the documents: under a causal mask the
// first chunk alone goes to higher members, and with a sliding window only the keys just before
// another's chunks. Parts of a softmax are merged by their lse (Liu et al. 2023, arXiv:2310.01889;
// the sigmoid form is that of Zhu, github.com/zhuzilin/ring-flash-attention):
//     out = out + sigmoid(lse' - lse) (out' - out),  lse = log(e^lse + e^lse')
// Backward needs the final lse only; keys travel again and their gradients go back to their owner,
// who adds them in the order of steps.
#include "ops/ring_attention.h"

#include <algorithm>
#include <cmath>

#include "comm/communicator.h"
#include "ops/cpu.h"
#include "ops/cpu_rows.h"

namespace pith {
namespace {

vector<int32_t> zigzag_coords(int members, int member, int64_t count) {
  const int64_t half = count / 2;
  vector<int32_t> coord(count);
  for (int64_t i = 0; i < count; i++)
    coord[i] = (i < half ? member : 2 * members - 2 - member) * half + i;
  return coord;
}

// Positions of `owner` that some query of `reader` may see.
KeyRange traveling(const AttentionCore& core, int members, int owner, int reader) {
  const int64_t count = core.key.count;
  const auto keys = zigzag_coords(members, owner, count);
  const auto queries = zigzag_coords(members, reader, count);
  AttentionCore rule;
  rule.causal = core.causal;
  rule.window = core.window;
  rule.query = {count, queries.data()};
  rule.key = {count, keys.data()};
  KeyRange all;
  for (int64_t i = 0; i < count; i++) all.cover(visible_keys(rule, 0, i));
  return all;
}

// Keys and values [B, count, K*N] and [B, count, K*M], and a table of their positions.
struct Keys {
  Tensor k, v, table;
};
Keys empty_keys(Rank& rank, const AttentionCore& core, KeyRange range, At at) {
  const int64_t count = range.count(), tables = 1 + (core.key.doc_end ? core.batch : 0);
  return {empty(rank, {core.batch, count, core.kv_heads * core.size}, core.dtype, at),
          empty(rank, {core.batch, count, core.kv_heads * core.v_size}, core.dtype, at),
          empty(rank, {tables, count}, DType::I32, at)};
}
HeadView view_of(const Tensor& keys, int size) {
  return {keys.data, keys.dim[1] * keys.dim[2], keys.dim[2], size};
}

// f(from `part`, local, n) for the n elements of each of the local positions `range`, which `part`
// [B, count, n] holds.
template <class T, class F>
void each_position(const Tensor& part, HeadView local, KeyRange range, F&& f) {
  const int64_t n = part.dim[2];
  T* at = part.as<T>();
  for (int64_t b = 0; local.data && b < part.dim[0]; b++)
    for (int64_t i = range.begin; i < range.end; i++, at += n) f(at, local.at<T>(b, 0, i), n);
}

Keys pack_keys(Rank& rank, const AttentionCore& core, KeyRange range, At at) {
  const Keys keys = empty_keys(rank, core, range, at);
  float_kernel(rank, "attention", at, keys.k, [&]<class T>(T*) {
    const auto copy = [](T* to, const T* local, int64_t n) { std::copy_n(local, n, to); };
    each_position<T>(keys.k, core.k, range, copy);
    each_position<T>(keys.v, core.v, range, copy);
  });
  int32_t* to = std::copy_n(core.key.coord + range.begin, range.count(), keys.table.i32());
  for (int64_t b = 0; b + 1 < keys.table.dim[0]; b++)
    to = std::copy_n(core.key.doc_end + b * core.key.doc_stride + range.begin, range.count(), to);
  return keys;
}

// One step: whose keys are here, and who has this member's.
struct Step {
  int number, owner, reader;
  KeyRange mine;       // positions that the reader has
  Keys keys;           // the owner's
  AttentionCore core;  // the queries of before against them
};

// Sends to one member and receives from another; an empty message is not sent.
void exchange(Rank& rank, const char* what, int step, const TensorList& out, int to,
              const TensorList& in, int from, At at) {
  vector<Transfer> list;
  for (int i = 0; i < out.count; i++) {
    const MessageTag tag{i, step, 0};
    if (out[i].numel() > 0) list.push_back({Transfer::Send, to, out[i], tag});
    if (in[i].numel() > 0) list.push_back({Transfer::Recv, from, in[i], tag});
  }
  send_recv(rank, Group::Cp, list.data(), int(list.size()), what, at);
}

Step take_step(Rank& rank, const AttentionCore& core, int number, At at) {
  const int n = group_size(rank, Group::Cp), me = group_rank(rank, Group::Cp);
  const int owner = (me + n - number) % n, reader = (me + number) % n;
  const KeyRange theirs = traveling(core, n, owner, me), mine = traveling(core, n, me, reader);
  Step step{number, owner, reader, mine, empty_keys(rank, core, theirs, at), core};
  const Keys sent = pack_keys(rank, core, mine, at);
  exchange(rank, "keys and values", number, {sent.k, sent.v, sent.table}, reader,
           {step.keys.k, step.keys.v, step.keys.table}, owner, at);
  step.core.key = positions_of(step.keys.table, 0, theirs.count());
  step.core.k = view_of(step.keys.k, core.size);
  step.core.v = view_of(step.keys.v, core.v_size);
  return step;
}

// Adds a part of the softmax over other keys to out and lse.
template <class T>
void merge_cpu(const AttentionCore& core, HeadView out, T* lse, HeadView part_out,
               const T* part_lse) {
  const int64_t S = core.query.count;
  parallel_rows(core.batch * core.heads * S, core.v_size, [&](int64_t row) {
    const int64_t b = row / S / core.heads, h = row / S % core.heads, i = row % S;
    const T a = lse[row], c = part_lse[row];
    if (c == -std::numeric_limits<T>::infinity()) return;
    const T weight = logistic(c - a);
    T* y = out.at<T>(b, h, i);
    const T* x = part_out.at<T>(b, h, i);
    for (int64_t n = 0; n < core.v_size; n++) y[n] += weight * (x[n] - y[n]);
    lse[row] = std::max(a, c) + std::log1p(std::exp(-std::abs(a - c)));
  });
}

}  // namespace

bool is_zigzag_part(const Rank& rank, const int32_t* coord, int64_t count) {
  const int n = group_size(rank, Group::Cp), me = group_rank(rank, Group::Cp);
  const auto want = zigzag_coords(n, me, count);
  return (n == 1 || count % 2 == 0) && std::equal(want.begin(), want.end(), coord);
}

void ring_forward(Rank& rank, const AttentionCore& core, HeadView out, const Tensor& lse, At at) {
  attention_forward(rank, core, out, lse, at);
  const int members = group_size(rank, Group::Cp);
  if (members == 1) return;
  const int64_t S = core.query.count, H = core.heads, M = core.v_size;
  const Tensor part = empty(rank, {core.batch, S, H, M}, core.dtype, at);
  const Tensor part_lse = empty(rank, lse.dim, core.dtype, at);
  const HeadView part_out{part.data, S * H * M, H * M, M};
  for (int number = 1; number < members; number++) {
    const Step step = take_step(rank, core, number, at);
    attention_forward(rank, step.core, part_out, part_lse, at);
    float_kernel(rank, "attention", at, lse, [&]<class T>(T*) {
      merge_cpu(core, out, lse.as<T>(), part_out, part_lse.as<T>());
    });
  }
}

void ring_backward(Rank& rank, const AttentionCore& core, HeadView out, const Tensor& lse,
                   HeadView dout, const AttentionGrads& grads, At at) {
  attention_backward(rank, core, out, lse, dout, grads, at);
  for (int number = 1; number < group_size(rank, Group::Cp); number++) {
    const Step step = take_step(rank, core, number, at);
    const Tensor dk = zeros(rank, step.keys.k.dim, core.dtype, at);
    const Tensor dv = zeros(rank, step.keys.v.dim, core.dtype, at);
    attention_backward(rank, step.core, out, lse, dout,
                       {grads.q, view_of(dk, core.size), view_of(dv, core.v_size), {}}, at);
    const Keys mine = empty_keys(rank, core, step.mine, at);
    exchange(rank, "gradients of keys and values", number, {dk, dv}, step.owner, {mine.k, mine.v},
             step.reader, at);
    float_kernel(rank, "attention", at, lse, [&]<class T>(T*) {
      const auto add = [](const T* from, T* local, int64_t n) {
        for (int64_t j = 0; j < n; j++) local[j] += from[j];
      };
      each_position<T>(mine.k, grads.k, step.mine, add);
      each_position<T>(mine.v, grads.v, step.mine, add);
    });
  }
}

}  // namespace pith
