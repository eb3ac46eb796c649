// attention: checks and tape node of both forms.
//   grad   p = exp(score - lse), dv = p^T dout, ds = p (dout v^T - <dout, out>), dq = scale ds k,
//          dk = scale ds^T q, dbias = ds.  Dao et al. 2022, arXiv:2205.14135
#include "ops/attention.h"

#include <algorithm>

#include "ops/cpu.h"
#include "ops/ops.h"

namespace pith {
namespace {

// q, k and v are [B, positions, heads, size], positions `width` apart in a packed projection.
enum Keep { kQ, kK, kV, kOut, kLse, kTable, kBias };
enum Number { kWidth, kCausal, kWindow };

// Heads [first, first + count) of a packed projection.
Tensor packed_part(Tensor qkv, int64_t batch, int64_t first, int64_t count, int64_t size) {
  if (qkv.data) qkv.data += first * size * size_of(qkv.dtype);
  qkv.home_offset += first * size;
  qkv.dim = {batch, batch ? qkv.dim[0] / batch : 0, count, size};
  return qkv;
}
HeadView heads_of(const Tensor& t, int64_t width) {
  if (width == 0) width = t.dim[2] * t.dim[3];
  return {t.data, t.dim[1] * width, width, t.dim[3]};
}
HeadView out_of(const AttentionCore& core, const Tensor& out) {
  return heads_of(out.view({core.batch, core.query.count, core.heads, core.v_size}), 0);
}
HeadView scores_of(const Tensor& t) {  // of [1|B, 1|H, S, Z]
  const int64_t head = t.dim[2] * t.dim[3];
  return {t.data, t.dim[0] > 1 ? t.dim[1] * head : 0, t.dim[3], t.dim[1] > 1 ? head : 0};
}

AttentionCore core_of(const TensorList& t, const int64_t* i, double scale) {
  const Dims &q = t[kQ].dim, &k = t[kK].dim, &v = t[kV].dim;
  const int64_t width = i[kWidth];
  AttentionCore core{t[kQ].dtype, q[0], q[2], k[2], q[3], v[3], scale, i[kCausal] != 0, i[kWindow]};
  core.query = positions_of(t[kTable], q[1]);
  core.key = positions_of(t[kTable], k[1]);
  core.in = {heads_of(t[kQ], width), heads_of(t[kK], width), heads_of(t[kV], width),
             scores_of(t[kBias])};
  return core;
}

void attention_bx(const auto& b) {
  const TensorList& t = b.keep;
  const AttentionCore core = core_of(t, b.node.i, b.node.f[0]);
  const int64_t width = b.node.i[kWidth], H = core.heads, K = core.kv_heads, N = core.size;
  Tensor d[3] = {b.zeroed(0)};
  for (int k = 1; k < 3; k++)
    d[k] = width ? packed_part(d[0], core.batch, k == 1 ? H : H + K, K, N) : b.zeroed(k);
  if (width) d[0] = packed_part(d[0], core.batch, 0, H, N);
  ring_backward(b.op(), core, out_of(core, t[kOut]), t[kLse], out_of(core, b.dy()),
                {heads_of(d[0], width), heads_of(d[1], width), heads_of(d[2], width),
                 width ? HeadView{} : scores_of(b.zeroed(3))});
}

// Checks the mask and makes the table of max(queries, keys) positions, see positions_of.
Tensor mask_table(const Op& op, const AttentionMask& mask, int64_t batch, int64_t queries,
                  int64_t keys) {
  const Tensor& ends = mask.doc_ends;
  const bool documents = ends.defined();
  op.check(
      {{"mask.doc_ends i32 [B, S]", !documents || is_i32(ends, {batch, queries})},
       {"S == Z where mask.doc_ends is given", queries == keys || !documents},
       {"chunks r and 2*cp-1-r of a row, of equal size", op.rank.mesh.cp == 1 || queries % 2 == 0},
       {"mask.window >= 0", mask.window >= 0}},
      {&ends});
  bool ascend = true;
  for (int64_t r = 0; documents && r < batch; r++)
    ascend &= std::is_sorted(row_of<int32_t>(ends, r), row_of<int32_t>(ends, r + 1));
  op.check({{"mask.doc_ends that ascend in a row", ascend}}, {&ends});
  const int64_t count = std::max(queries, keys), first = std::min<int64_t>(0, keys - queries);
  const Tensor table = op.empty({1 + (documents ? batch : 0), count}, DType::I32);
  const auto coord = local_coords(op.rank, count);
  for (int64_t i = 0; i < count; i++) table.i32()[i] = int32_t(first + coord[i]);
  if (documents) std::copy_n(ends.i32(), ends.numel(), table.i32() + count);
  return table;
}

Tensor attend(const Op& op, const Tensor& q, const Tensor& k, const Tensor& v, int64_t width,
              double scale, const AttentionMask& mask, const Tensor& bias, const Dims& dims,
              std::initializer_list<Tensor> in) {
  const Tensor table = mask_table(op, mask, q.dim[0], q.dim[1], k.dim[1]);
  Tensor out = op.empty(dims, q.dtype);
  const Tensor lse = op.empty({q.dim[0], q.dim[2], q.dim[1]}, q.dtype);
  const TensorList all = {q, k, v, out, lse, table, bias};
  const int64_t numbers[] = {width, mask.causal, mask.window};
  const AttentionCore core = core_of(all, numbers, scale);
  ring_forward(op, core, out_of(core, out), lse);
  record(op, in, {&out})
      .numbers({width, mask.causal, mask.window}, {scale})
      .bx(all, [](const auto& b) { attention_bx(b); });
  return out;
}

}  // namespace

Tensor attention(Rank& rank, Tensor qkv, Heads heads, int64_t batch, AttentionMask mask, At at) {
  const Op op{rank, "attention", at};
  const int64_t H = heads.query, K = heads.kv, N = heads.size;
  op.check({{"heads.query a multiple of heads.kv >= 1", K >= 1 && H >= 1 && H % K == 0},
            {"heads.size >= 1", N >= 1},
            {"qkv [B*S, (H+2K)*N]", qkv.dim.rank == 2 && qkv.dim[1] == heads.width()},
            {"batch that divides qkv.dim[0]",
             batch > 0 ? qkv.dim[0] % batch == 0 : batch == 0 && qkv.dim[0] == 0}},
           {&qkv});
  return attend(op, packed_part(qkv, batch, 0, H, N), packed_part(qkv, batch, H, K, N),
                packed_part(qkv, batch, H + K, K, N), heads.width(), 1 / std::sqrt(double(N)), mask,
                {}, {qkv.dim[0], H * N}, {qkv});
}

Tensor attention(Rank& rank, Tensor q, Tensor k, Tensor v, double scale, AttentionMask mask,
                 AttentionBias bias, At at) {
  const Op op{rank, "attention", at};
  Tensor &extra = bias.bias, &visible = bias.visible;
  op.check({{"q, k and v of rank 4", q.dim.rank == 4 && k.dim.rank == 4 && v.dim.rank == 4},
            {"k [B,Z,K,N] for q [B,S,H,N]", k.dim[0] == q.dim[0] && k.dim[3] == q.dim[3]},
            {"v [B,Z,K,M] for k [B,Z,K,N]",
             v.dim[0] == k.dim[0] && v.dim[1] == k.dim[1] && v.dim[2] == k.dim[2]},
            {"heads of q a multiple of those of k",
             k.dim[2] >= 1 && q.dim[2] >= 1 && q.dim[2] % k.dim[2] == 0},
            {"equal dtypes", q.dtype == k.dtype && q.dtype == v.dtype}},
           {&q, &k, &v});
  const int64_t B = q.dim[0], S = q.dim[1], H = q.dim[2], Z = k.dim[1];
  const auto fits = [&](const Tensor& t, DType dtype) {
    return !t.defined() || (t.dtype == dtype && (t.dim == Dims{t.dim[0], t.dim[1], S, Z}) &&
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

}  // namespace pith
