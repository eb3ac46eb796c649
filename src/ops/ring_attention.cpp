// ring_attention: a cp group's rows, cut into 2*cp chunks of which member r holds r and 2*cp-1-r
// (Brandon et al. 2023, arXiv:2311.09431). At step s member r gets the keys of member r-s that its
// queries see and merges what they give (Liu et al. 2023, arXiv:2310.01889):
//   out = out + sigmoid(lse' - lse) (out' - out), lse = log(e^lse + e^lse')
// Backward: keys travel again, and their gradients go back.
#include <algorithm>

#include "comm/communicator.h"
#include "ops/attention.h"
#include "ops/views.h"

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
KeyRange traveling(AttentionCore rule, int members, int owner, int reader) {
  const int64_t count = rule.key.count;
  const auto keys = zigzag_coords(members, owner, count);
  const auto queries = zigzag_coords(members, reader, count);
  rule.query = {count, queries.data()};
  rule.key = {count, keys.data()};
  KeyRange all;
  for (int64_t i = 0; i < count; i++) all.cover(visible_keys(rule, 0, i));
  return all;
}

// Keys and then values of some positions, [B, count, K*(N+M)], and the table of these.
struct Keys {
  Tensor kv, table;
  AttentionViews views(const AttentionCore& core) const {
    const int64_t width = kv.dim[2], batch = kv.dim[1] * width, k = core.kv_heads * core.size;
    char* v = kv.data ? kv.data + k * size_of(kv.dtype) : nullptr;
    return {{}, {kv.data, batch, width, core.size}, {v, batch, width, core.v_size}, {}};
  }
};
Keys empty_keys(const Op& op, const AttentionCore& core, int64_t count) {
  const int64_t width = core.kv_heads * (core.size + core.v_size);
  return {op.empty({core.batch, count, width}, core.dtype),
          op.empty({1 + (core.key.doc_end ? core.batch : 0), count}, DType::I32)};
}

// Copies the positions `range` of `local` to `packed` or, if `home`, adds them from there.
template <class T>
void move_keys(const AttentionCore& core, const AttentionViews& packed, const AttentionViews& local,
               KeyRange range, bool home) {
  const auto view = [](const HeadView& x, int64_t first) {
    View v{{}, first * x.position, {x.batch, x.position, 1}};
    v.x.data = x.data;
    return v;
  };
  for (const auto part : {&AttentionViews::k, &AttentionViews::v}) {
    const View there = view(packed.*part, 0), here = view(local.*part, range.begin);
    const Dims space{core.batch, range.count(), core.kv_heads * (packed.*part).head};
    if (here.x.data) copy_elements<T>(space, home ? there : here, home ? here : there, home);
  }
}

// One step: whose keys are here, and who has this member's.
struct Step {
  int owner, reader;
  KeyRange mine;       // positions that the reader has
  Keys keys;           // the owner's
  AttentionCore core;  // the queries of before against them
};

// An empty message is not sent.
void exchange(const Op& op, const char* what, int step, const TensorList& out, int to,
              const TensorList& in, int from) {
  vector<Transfer> list;
  for (int i = 0; i < out.count; i++) {
    const MessageTag tag{i, step, 0};
    if (out[i].numel() > 0) list.push_back({Transfer::Send, to, out[i], tag});
    if (in[i].numel() > 0) list.push_back({Transfer::Recv, from, in[i], tag});
  }
  send_recv(op.rank, Group::Cp, list.data(), int(list.size()), what, op.at);
}

Step take_step(const Op& op, const AttentionCore& core, int number) {
  const int n = group_size(op.rank, Group::Cp), me = group_rank(op.rank, Group::Cp);
  const int owner = (me + n - number) % n, reader = (me + number) % n;
  const KeyRange theirs = traveling(core, n, owner, me), mine = traveling(core, n, me, reader);
  const Keys sent = empty_keys(op, core, mine.count());
  op.on_cpu(sent.kv,
            [&]<class T>(T*) { move_keys<T>(core, sent.views(core), core.in, mine, false); });
  int32_t* to = std::copy_n(core.key.coord + mine.begin, mine.count(), sent.table.i32());
  for (int64_t b = 0; b + 1 < sent.table.dim[0]; b++)
    to = std::copy_n(core.key.doc_end + b * core.key.doc_stride + mine.begin, mine.count(), to);
  Step step{owner, reader, mine, empty_keys(op, core, theirs.count()), core};
  exchange(op, "keys and values", number, {sent.kv, sent.table}, reader,
           {step.keys.kv, step.keys.table}, owner);
  const AttentionViews views = step.keys.views(core);
  step.core.key = positions_of(step.keys.table, theirs.count());
  step.core.in = {core.in.q, views.k, views.v, {}};
  return step;
}

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

vector<int32_t> local_coords(const Rank& rank, int64_t count) {
  return zigzag_coords(group_size(rank, Group::Cp), group_rank(rank, Group::Cp), count);
}

void ring_forward(const Op& op, const AttentionCore& core, HeadView out, const Tensor& lse) {
  attention_forward(op, core, out, lse);
  const int members = group_size(op.rank, Group::Cp);
  if (members == 1) return;
  const int64_t S = core.query.count, H = core.heads, M = core.v_size;
  const Tensor part = op.empty({core.batch, S, H, M}, core.dtype), part_lse = op.like(lse);
  const HeadView part_out{part.data, S * H * M, H * M, M};
  for (int number = 1; number < members; number++) {
    const Step step = take_step(op, core, number);
    attention_forward(op, step.core, part_out, part_lse);
    op.on_cpu(lse,
              [&]<class T>(T*) { merge_cpu(core, out, lse.as<T>(), part_out, part_lse.as<T>()); });
  }
}

void ring_backward(const Op& op, const AttentionCore& core, HeadView out, const Tensor& lse,
                   HeadView dout, const AttentionViews& grads) {
  attention_backward(op, core, out, lse, dout, grads);
  for (int number = 1; number < group_size(op.rank, Group::Cp); number++) {
    const Step step = take_step(op, core, number);
    const Keys theirs{zeros(op.rank, step.keys.kv.dim, core.dtype, op.at), {}};
    AttentionViews d = theirs.views(core);
    d.q = grads.q;
    attention_backward(op, step.core, out, lse, dout, d);
    const Keys mine = empty_keys(op, core, step.mine.count());
    exchange(op, "gradients of keys and values", number, {theirs.kv}, step.owner, {mine.kv},
             step.reader);
    op.on_cpu(mine.kv,
              [&]<class T>(T*) { move_keys<T>(core, mine.views(core), grads, step.mine, true); });
  }
}

}  // namespace pith
