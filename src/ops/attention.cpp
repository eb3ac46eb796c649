// attention: softmax(scale q k^T + bias) v over the keys that a mask lets each query see.
//   in     f32|f64, one dtype     keeps  inputs, out, lse [B,H,S] and the table of positions
//   grad   bx: with p = exp(score - lse), dv = p^T dout, ds = p (dout v^T - <dout, out>),
//          dq = scale ds k, dk = scale ds^T q, dbias = ds.  Dao et al. 2022, arXiv:2205.14135
//   errors shapes; dtypes differ; order or a row of doc_ends that descends; with cp > 1: another
//          order than the rank's chunks, a bias or mask tensor, S != Z                 bitwise yes
#include "ops/attention.h"

#include <algorithm>
#include <cmath>

#include "ops/ops.h"

namespace pith {
namespace {

// What a node keeps. In the packed form q, k and v are qkv from their first element on.
enum Keep { kQ, kK, kV, kOut, kLse, kTable, kBias, kVisible };
enum Number { kBatch, kHeads, kKvHeads, kSize, kVSize, kCausal, kWindow };

// Heads of x, [B*S, ...] or [B, S, heads, size].
HeadView heads_of(const Tensor& x, int64_t positions, int64_t size) {
  const int64_t width = x.dim.rank == 2 ? x.dim[1] : x.dim[2] * x.dim[3];
  return {x.data, positions * width, width, size};
}
HeadView scores_of(const Tensor& t) {  // of [1|B, 1|H, S, Z]
  const int64_t head = t.dim[2] * t.dim[3];
  return {t.data, t.dim[0] > 1 ? t.dim[1] * head : 0, t.dim[3], t.dim[1] > 1 ? head : 0};
}
// qkv from its element `first` on.
Tensor packed_part(Tensor qkv, int64_t first) {
  if (qkv.data) qkv.data += first * size_of(qkv.dtype);
  qkv.home_offset += first;
  return qkv;
}

AttentionCore core_of(const TensorList& t, const int64_t* i, double scale) {
  const Tensor& table = t[kTable];
  const int64_t S = t[kLse].dim[2], Z = t[kK].dim.rank == 2 ? S : t[kK].dim[1];
  AttentionCore core{t[kQ].dtype, i[kBatch], i[kHeads], i[kKvHeads], i[kSize], i[kVSize]};
  core.scale = scale;
  core.causal = i[kCausal];
  core.window = i[kWindow];
  // Queries and keys end together; the table covers the longer of them.
  core.query = positions_of(table, table.dim[1] - S, S);
  core.key = positions_of(table, table.dim[1] - Z, Z);
  core.in = {heads_of(t[kQ], S, core.size), heads_of(t[kK], Z, core.size),
             heads_of(t[kV], Z, core.v_size), scores_of(t[kBias])};
  core.visible = scores_of(t[kVisible]);
  return core;
}

void attention_bx(const auto& b) {
  const TensorList& t = b.keep;
  const AttentionCore core = core_of(t, b.node.i, b.node.f[0]);
  const int64_t S = core.query.count, Z = core.key.count, k_end = core.heads + core.kv_heads;
  const bool packed = t[kQ].dim.rank == 2;
  const Tensor dq = b.zeroed(0);
  const Tensor dk = packed ? packed_part(dq, core.heads * core.size) : b.zeroed(1);
  const Tensor dv = packed ? packed_part(dq, k_end * core.size) : b.zeroed(2);
  AttentionViews grads{
      heads_of(dq, S, core.size), heads_of(dk, Z, core.size), heads_of(dv, Z, core.v_size), {}};
  if (!packed) grads.bias = scores_of(b.zeroed(3));
  ring_backward(b.op(), core, heads_of(t[kOut], S, core.v_size), t[kLse],
                heads_of(b.dy(), S, core.v_size), grads);
}

// Both forms, once checked. `x`: q, k, v; `in`: where gradients go.
Tensor attend(const Op& op, const TensorList& x, const AttentionCore& c, const Tensor& table,
              const AttentionBias& bias, const Dims& dims, std::initializer_list<Tensor> in) {
  const int64_t S = dims.rank == 4 ? dims[1] : c.batch ? dims[0] / c.batch : 0;
  Tensor out = op.empty(dims, x[0].dtype);
  const Tensor lse = op.empty({c.batch, c.heads, S}, out.dtype);
  const TensorList all = {x[0], x[1], x[2], out, lse, table, bias.bias, bias.visible};
  const int64_t i[] = {c.batch, c.heads, c.kv_heads, c.size, c.v_size, c.causal, c.window};
  ring_forward(op, core_of(all, i, c.scale), heads_of(out, S, c.v_size), lse);
  op.record(in, {&out})
      .numbers({i[0], i[1], i[2], i[3], i[4], i[5], i[6]}, {c.scale})
      .bx(all, [](const auto& b) { attention_bx(b); });
  return out;
}

bool rows_ascend(const Tensor& x) {
  bool good = true;
  for (int64_t r = 0; x.defined() && r < x.rows(); r++)
    good &= std::is_sorted(x.i32() + r * x.cols(), x.i32() + (r + 1) * x.cols());
  return good;
}

// Checks the mask and makes a table of max(queries, keys) positions: their row coordinates, which
// end with the last key's, and with documents, the ends of these by row of the batch.
Tensor mask_table(const Op& op, const AttentionMask& mask, int64_t batch, int64_t queries,
                  int64_t keys) {
  const Tensor &order = mask.order, &ends = mask.doc_ends;
  const auto fits = [](const Tensor& t, Dims dims) {
    return !t.defined() || (t.dtype == DType::I32 && t.dim == dims);
  };
  op.check({{"mask.order i32 [S]", fits(order, {queries})},
            {"mask.doc_ends i32 [B, S]", fits(ends, {batch, queries})},
            {"S == Z where mask.order or mask.doc_ends is given",
             queries == keys || !(order.defined() || ends.defined())},
            {"mask.window >= 0", mask.window >= 0}},
           {&order, &ends});
  op.check({{"mask.order that ascends", rows_ascend(order)},
            {"mask.doc_ends that ascend in a row", rows_ascend(ends)},
            {"mask.order of this rank's chunks r and 2*cp-1-r of the row",
             op.rank.mesh.cp == 1 ||
                 (order.defined() && is_zigzag_part(op.rank, order.i32(), queries))}},
           {&order, &ends});
  const int64_t count = std::max(queries, keys), first = std::min<int64_t>(0, keys - queries);
  const Tensor table = op.empty({1 + (ends.defined() ? batch : 0), count}, DType::I32);
  for (int64_t i = 0; i < count; i++) table.i32()[i] = order.defined() ? order.i32()[i] : first + i;
  if (ends.defined()) std::copy_n(ends.i32(), ends.numel(), table.i32() + count);
  return table;
}

}  // namespace

Tensor attention(Rank& rank, Tensor qkv, Heads heads, int64_t batch, AttentionMask mask, At at) {
  const Op op{rank, "attention", at};
  const int64_t H = heads.query, K = heads.kv, N = heads.size;
  op.check({{"heads.query a multiple of heads.kv >= 1", K >= 1 && H >= 1 && H % K == 0},
            {"heads.size >= 1", N >= 1},
            {"qkv [B*S, (H+2K)*N]", qkv.dim.rank == 2 && qkv.dim[1] == (H + 2 * K) * N},
            {"batch that divides qkv.dim[0]",
             batch > 0 ? qkv.dim[0] % batch == 0 : batch == 0 && qkv.dim[0] == 0}},
           {&qkv});
  const int64_t S = batch ? qkv.dim[0] / batch : 0;
  const Tensor table = mask_table(op, mask, batch, S, S);
  const TensorList x = {qkv, packed_part(qkv, H * N), packed_part(qkv, (H + K) * N)};
  return attend(op, x,
                {qkv.dtype, batch, H, K, N, N, 1 / std::sqrt(double(N)), mask.causal, mask.window},
                table, {}, {qkv.dim[0], H * N}, {qkv});
}

Tensor attention(Rank& rank, Tensor q, Tensor k, Tensor v, double scale, AttentionMask mask,
                 AttentionBias bias, At at) {
  const Op op{rank, "attention", at};
  const Tensor &extra = bias.bias, &visible = bias.visible;
  op.check({{"q, k and v of rank 4", q.dim.rank == 4 && k.dim.rank == 4 && v.dim.rank == 4},
            {"k [B,Z,K,N] for q [B,S,H,N]", k.dim[0] == q.dim[0] && k.dim[3] == q.dim[3]},
            {"v [B,Z,K,M] for k [B,Z,K,N]",
             v.dim[0] == k.dim[0] && v.dim[1] == k.dim[1] && v.dim[2] == k.dim[2]},
            {"heads of q a multiple of those of k",
             k.dim[2] >= 1 && q.dim[2] >= 1 && q.dim[2] % k.dim[2] == 0},
            {"equal dtypes", q.dtype == k.dtype && q.dtype == v.dtype}},
           {&q, &k, &v});
  const int64_t B = q.dim[0], S = q.dim[1], H = q.dim[2], N = q.dim[3];
  const int64_t Z = k.dim[1], K = k.dim[2], M = v.dim[3];
  const auto fits = [&](const Tensor& t, DType dtype) {
    return !t.defined() || (t.dtype == dtype && (t.dim == Dims{t.dim[0], t.dim[1], S, Z}) &&
                            (t.dim[0] == 1 || t.dim[0] == B) && (t.dim[1] == 1 || t.dim[1] == H));
  };
  op.check({{"bias [1|B, 1|H, S, Z] of q's dtype", fits(extra, q.dtype)},
            {"visible u8 [1|B, 1|H, S, Z]", fits(visible, DType::U8)},
            {"no bias, no visible and S == Z where cp > 1",
             rank.mesh.cp == 1 || (!extra.defined() && !visible.defined() && S == Z)}},
           {&q, &k, &extra, &visible});
  const Tensor table = mask_table(op, mask, B, S, Z);
  return attend(op, {q, k, v}, {q.dtype, B, H, K, N, M, scale, mask.causal, mask.window}, table,
                bias, {B, S, H, M}, {q, k, v, extra});
}

}  // namespace pith
