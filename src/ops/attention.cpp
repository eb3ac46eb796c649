// attention: both forms, and the ring of a cp group, whose member r holds the chunks r and 2*cp-1-r
// of each row (Brandon et al. 2023, arXiv:2311.09431).
#include "ops/attention.h"

#include <algorithm>

#include "comm/communicator.h"
#include "ops/cpu.h"
#include "ops/cudnn_attention.h"

namespace pith {
namespace {

// Heads of x [B, positions, heads, size], positions `width` apart if that is not 0.
HeadView heads_of(const Tensor& t, i64 width) {
  if (width == 0) width = t.dim[2] * t.dim[3];
  return {t.data, t.dim[1] * width, width, t.dim[3]};
}
HeadView out_of(const AttentionCore& core, const Tensor& out) {
  return heads_of(out.view({core.batch, core.query.count, core.heads, core.v_size}), 0);
}

// The ring: at step s member r gets the keys of member r-s that its queries see and merges what
// they give (Liu et al. 2023, arXiv:2310.01889):
//   out = out + sigmoid(lse' - lse) (out' - out), lse = log(e^lse + e^lse')
vector<int> zigzag_coords(int members, int member, i64 count) {
  i64 half = count / 2;
  vector<int> coord(count);
  for (i64 i = 0; i < count; i++)
    coord[i] = (i < half ? member : 2 * members - 2 - member) * half + i;
  return coord;
}

// Positions of `owner` that some query of `reader` may see.
KeyRange traveling(AttentionCore rule, int members, int owner, int reader) {
  i64 count = rule.key.count;
  auto keys = zigzag_coords(members, owner, count);
  auto queries = zigzag_coords(members, reader, count);
  rule.query = {count, queries.data()};
  rule.key = {count, keys.data()};
  KeyRange all;
  for (i64 i = 0; i < count; i++) all.cover(visible_keys(rule, 0, i));
  return all;
}

// Keys and then values of some positions, [B, count, K*(N+M)], and the table of these.
struct Keys {
  Tensor kv, table;
  AttentionViews views(const AttentionCore& core) const {
    i64 width = kv.dim[2], batch = kv.dim[1] * width, k = core.kv_heads * core.size;
    char* v = kv.data ? kv.data + k * size_of(kv.dtype) : nullptr;
    return {{}, {kv.data, batch, width, core.size}, {v, batch, width, core.v_size}, {}};
  }
};
Keys empty_keys(const Op& op, const AttentionCore& core, i64 count) {
  i64 width = core.kv_heads * (core.size + core.v_size);
  return {op.empty({core.batch, count, width}, core.dtype),
      op.empty({1 + (core.key.doc_end ? core.batch : 0), count}, DType::I32)};
}

// Copies the positions `range` of `local` to `packed` or, if `home`, adds them from there.
void move_keys(const Op& op, const AttentionCore& core, const Keys& packed,
    const AttentionViews& local, KeyRange range, bool home) {
  const auto view = [](const HeadView& x, i64 first) {
    View v{{}, first * x.position, {x.batch, x.position, 1}};
    v.x.data = x.data;
    return v;
  };
  const AttentionViews views = packed.views(core);
  for (const auto part : {&AttentionViews::k, &AttentionViews::v}) {
    View there = view(views.*part, 0), here = view(local.*part, range.begin);
    Dims space{core.batch, range.count(), core.kv_heads * (views.*part).head};
    op.on_cpu(packed.kv, [&]<class T>(T*) {
      if (here.x.data) copy_elements<T>(op, space, home ? there : here, home ? here : there, home);
    });
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
  int n = group_size(op.rank, Group::Cp), me = group_rank(op.rank, Group::Cp);
  int owner = (me + n - number) % n, reader = (me + number) % n;
  const KeyRange theirs = traveling(core, n, owner, me), mine = traveling(core, n, me, reader);
  const Keys sent = empty_keys(op, core, mine.count());
  move_keys(op, core, sent, core.in, mine, false);
  int* to = std::copy_n(core.key.coord + mine.begin, mine.count(), sent.table.i32());
  for (i64 b = 0; b + 1 < sent.table.dim[0]; b++)
    to = std::copy_n(core.key.doc_end + b * core.key.doc_stride + mine.begin, mine.count(), to);
  Step step{owner, reader, mine, empty_keys(op, core, theirs.count()), core};
  exchange(op, "keys and values", number, {sent.kv, sent.table}, reader,
      {step.keys.kv, step.keys.table}, owner);
  const AttentionViews views = step.keys.views(core);
  step.core.key = positions_of(step.keys.table, theirs.count());
  step.core.in = {core.in.q, views.k, views.v, {}};
  return step;
}

void ring_forward(const Op& op, const AttentionCore& core, HeadView out, const Tensor& lse) {
  attention_forward(op, core, out, lse);
  i64 S = core.query.count, H = core.heads, M = core.v_size;
  for (int number = 1; number < group_size(op.rank, Group::Cp); number++) {
    const Step step = take_step(op, core, number);
    Tensor part = op.empty({core.batch, S, H, M}, core.dtype), part_lse = op.like(lse);
    const HeadView part_out = out_of(core, part);
    attention_forward(op, step.core, part_out, part_lse);
    op.on_cpu(lse, [&]<class T>(T*) {
      parallel_rows(lse.numel(), M, [&](i64 row) {
        i64 b = row / S / H, h = row / S % H, i = row % S;
        T mine = lse.as<T>()[row], other = part_lse.as<T>()[row];
        if (other == -std::numeric_limits<T>::infinity()) return;
        T *y = out.at<T>(b, h, i), *x = part_out.at<T>(b, h, i);
        T weight = logistic(other - mine);
        for (i64 n = 0; n < M; n++) y[n] += weight * (x[n] - y[n]);
        lse.as<T>()[row] = max(mine, other) + std::log1p(std::exp(-std::abs(mine - other)));
      });
    });
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
    move_keys(op, core, mine, grads, step.mine, true);
  }
}

enum Keep { kQ, kK, kV, kOut, kLse, kTable, kBias };
enum Number { kWidth, kCausal, kWindow };

// Heads [first, first + count) of a packed projection.
Tensor packed_part(Tensor qkv, i64 batch, i64 first, i64 count, i64 size) {
  if (qkv.data) qkv.data += first * size * size_of(qkv.dtype);
  qkv.home_offset += first * size;
  qkv.dim = {batch, batch ? qkv.dim[0] / batch : 0, count, size};
  return qkv;
}
HeadView scores_of(const Tensor& t) {  // of [1|B, 1|H, S, Z]
  i64 head = t.dim[2] * t.dim[3];
  return {t.data, t.dim[0] > 1 ? t.dim[1] * head : 0, t.dim[3], t.dim[1] > 1 ? head : 0};
}

AttentionCore core_of(const TensorList& t, const i64* i, double scale) {
  const Dims &q = t[kQ].dim, &k = t[kK].dim, &v = t[kV].dim;
  i64 width = i[kWidth];
  AttentionCore core{t[kQ].dtype, q[0], q[2], k[2], q[3], v[3], scale, i[kCausal] != 0, i[kWindow]};
  const Tensor& table = t[kTable];
  if (t[kQ].on_gpu()) {
    core.query = {q[1], nullptr, table.i32(), q[1]};
    core.key = {k[1], nullptr, table.i32(), k[1]};
  } else {
    core.query = positions_of(table, q[1]);
    core.key = positions_of(table, k[1]);
  }
  core.in = {
      heads_of(t[kQ], width), heads_of(t[kK], width), heads_of(t[kV], width), scores_of(t[kBias])};
  return core;
}

// What cuDNN takes: a packed projection in BF16.
[[gnu::always_inline]] inline bool by_cudnn(
    const TensorList& t, const i64* numbers, const AttentionShape& s) {
  return t[kQ].on_gpu() && t[kQ].dtype == DType::BF16 && numbers[kWidth] &&
         cudnn_attention_fits(s, t[kTable].defined());
}
AttentionShape shape_of(const AttentionCore& c) {
  return {c.batch, c.query.count, c.heads, c.kv_heads, c.size, c.causal, c.window, c.scale};
}

void attention_bx(const auto& b) {
  const TensorList& t = b.keep;
  const AttentionCore core = core_of(t, b.node.i, b.node.f[0]);
  i64 width = b.node.i[kWidth], H = core.heads, K = core.kv_heads, N = core.size;
  bool gpu = t[kQ].on_gpu();
  if (by_cudnn(t, b.node.i, shape_of(core))) {
    Tensor dqkv = b.op().empty(b.node.in[0].dim, DType::BF16);
    cudnn_attention_backward(
        b.rank, shape_of(core), {t[kQ], t[kTable], t[kOut], t[kLse], b.dy(), dqkv});
    return add_grad(b.rank, b.node.in[0], dqkv);
  }
  // On a GPU a weight's gradient is of another dtype than what is computed.
  Tensor made[4];
  auto grad = [&](int input) {
    const Tensor& in = b.node.in[input];
    if (!gpu) return b.zeroed(input);
    if (in.needs_grad()) made[input] = zeros(b.rank, in.dim, in.dtype, b.node.at);
    return made[input];
  };
  Tensor d[3] = {grad(0)};
  for (int k = 1; k < 3; k++)
    d[k] = width ? packed_part(d[0], core.batch, k == 1 ? H : H + K, K, N) : grad(k);
  if (width) d[0] = packed_part(d[0], core.batch, 0, H, N);
  ring_backward(b.op(), core, out_of(core, t[kOut]), t[kLse], out_of(core, b.dy()),
      {heads_of(d[0], width), heads_of(d[1], width), heads_of(d[2], width),
          width ? HeadView{} : scores_of(grad(3))});
  for (int k = 0; k < b.node.in.count; k++)
    if (made[k].defined()) add_grad(b.rank, b.node.in[k], made[k]);
}

// Checks the mask and makes the table of max(queries, keys) positions, see positions_of; on a GPU,
// where a position is its coordinate, the ends of documents.
Tensor mask_table(const Op& op, const AttentionMask& mask, i64 batch, i64 queries, i64 keys) {
  const Tensor& ends = mask.doc_ends;
  bool documents = ends.defined();
  op.check({{"mask.doc_ends i32 [B, S] on the rank's device",
                !documents || (is_i32(ends, {batch, queries}) && ends.device == op.rank.device)},
               {"S == Z where mask.doc_ends is given", queries == keys || !documents},
               {"chunks r and 2*cp-1-r of a row, of equal size",
                   op.rank.mesh.cp == 1 || queries % 2 == 0},
               {"cp = 1 on a GPU", op.rank.mesh.cp == 1 || op.rank.device == Device::CPU},
               {"mask.window >= 0", mask.window >= 0}},
      {&ends});
  if (op.rank.device == Device::CUDA) return ends;
  bool ascend = true;
  for (i64 r = 0; documents && r < batch; r++)
    ascend &= std::is_sorted(row_of<int>(ends, r), row_of<int>(ends, r + 1));
  op.check({{"mask.doc_ends that ascend in a row", ascend}}, {&ends});
  i64 count = max(queries, keys), first = min<i64>(0, keys - queries);
  Tensor table = op.empty({1 + (documents ? batch : 0), count}, DType::I32);
  auto coord = zigzag_coords(group_size(op.rank, Group::Cp), group_rank(op.rank, Group::Cp), count);
  for (i64 i = 0; i < count; i++) table.i32()[i] = int(first + coord[i]);
  if (documents) std::copy_n(ends.i32(), ends.numel(), table.i32() + count);
  return table;
}

Tensor attend(const Op& op, const Tensor& q, const Tensor& k, const Tensor& v, i64 width,
    double scale, const AttentionMask& mask, const Tensor& bias, const Dims& dims,
    std::initializer_list<Tensor> in) {
  Tensor table = mask_table(op, mask, q.dim[0], q.dim[1], k.dim[1]);
  Tensor out = op.empty(dims, q.dtype);
  Tensor lse = op.empty({q.dim[0], q.dim[2], q.dim[1]}, wide(q.dtype));
  const TensorList all = {q, k, v, out, lse, table, bias};
  const std::initializer_list<i64> numbers = {width, mask.causal, mask.window};
  const AttentionCore core = core_of(all, numbers.begin(), scale);
  if (by_cudnn(all, numbers.begin(), shape_of(core)))
    cudnn_attention_forward(op.rank, shape_of(core), {q, table, out, lse});
  else
    ring_forward(op, core, out_of(core, out), lse);
  record(op, in, {&out}).numbers(numbers, {scale}).bx(all, [](const auto& b) { attention_bx(b); });
  return out;
}

}

Tensor attention(Rank& rank, Tensor qkv, Heads heads, i64 batch, AttentionMask mask, At at) {
  Op op{rank, "attention", at};
  i64 H = heads.query, K = heads.kv, N = heads.size;
  op.check({{"heads.query a multiple of heads.kv >= 1", K >= 1 && H >= 1 && H % K == 0},
               {"heads.size >= 1", N >= 1},
               {"qkv [B*S, (H+2K)*N]", qkv.dim.rank == 2 && qkv.dim[1] == heads.width()},
               {"batch that divides qkv.dim[0]",
                   batch > 0 ? qkv.dim[0] % batch == 0 : batch == 0 && qkv.dim[0] == 0}},
      {&qkv});
  return attend(op, packed_part(qkv, batch, 0, H, N), packed_part(qkv, batch, H, K, N),
      packed_part(qkv, batch, H + K, K, N), heads.width(), 1 / std::sqrt(double(N)), mask, {},
      {qkv.dim[0], H * N}, {qkv});
}

Tensor attention(Rank& rank, Tensor q, Tensor k, Tensor v, double scale, AttentionMask mask,
    AttentionBias bias, At at) {
  Op op{rank, "attention", at};
  Tensor &extra = bias.bias, &visible = bias.visible;
  op.check({{"q, k and v of rank 4", q.dim.rank == 4 && k.dim.rank == 4 && v.dim.rank == 4},
               {"k [B,Z,K,N] for q [B,S,H,N]", k.dim[0] == q.dim[0] && k.dim[3] == q.dim[3]},
               {"v [B,Z,K,M] for k [B,Z,K,N]",
                   v.dim[0] == k.dim[0] && v.dim[1] == k.dim[1] && v.dim[2] == k.dim[2]},
               {"heads of q a multiple of those of k",
                   k.dim[2] >= 1 && q.dim[2] >= 1 && q.dim[2] % k.dim[2] == 0},
               {"equal dtypes", q.dtype == k.dtype && q.dtype == v.dtype}},
      {&q, &k, &v});
  i64 B = q.dim[0], S = q.dim[1], H = q.dim[2], Z = k.dim[1];
  auto fits = [&](const Tensor& t, DType dtype) {
    return !t.defined() ||
           (t.dtype == dtype && (t.dim == Dims{t.dim[0], t.dim[1], S, Z}) &&
               (t.dim[0] == 1 || t.dim[0] == B) && (t.dim[1] == 1 || t.dim[1] == H));
  };
  op.check({{"bias [1|B, 1|H, S, Z] of q's dtype", fits(extra, q.dtype)},
               {"visible u8 [1|B, 1|H, S, Z]", fits(visible, DType::U8)},
               {"no bias, no visible and S == Z where cp > 1",
                   rank.mesh.cp == 1 || (!extra.defined() && !visible.defined() && S == Z)}},
      {&q, &k, &extra, &visible});
  if (visible.defined()) {
    Tensor hidden = op.empty({1}, q.dtype);
    fill_constant(rank, hidden, -std::numeric_limits<double>::infinity(), at);
    if (!extra.defined()) extra = zeros(rank, {1}, q.dtype, at);
    extra = where(rank, visible, extra, hidden, at);
  }
  return attend(op, q, k, v, 0, scale, mask, extra, {B, S, H, v.dim[3]}, {q, k, v, extra});
}

}
