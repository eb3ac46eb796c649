// attention: softmax(scale q k^T + bias) v over the keys that a mask lets each query see. Vaswani
// et al. 2017, arXiv:1706.03762, eq. 1; grouped queries: Ainslie et al. 2023, arXiv:2305.13245.
//   in     qkv [B*S, (H+2K)*N]; or q [B,S,H,N], k [B,Z,K,N], v [B,Z,K,M], bias or visible
//          [1|B, 1|H, S, Z]; f32|f64                           out    [B*S, H*N] or [B,S,H,M]
//   keeps  inputs, out, the mask, and lse [B,H,S] = log sum exp of each query's scores
//   grad   bx: with p = exp(score - lse), dv = p^T dout, ds = p (dout v^T - <dout, out>),
//          dq = scale ds k, dk = scale ds^T q, dbias = ds.  Dao et al. 2022, arXiv:2205.14135
//   errors shapes that do not fit; order or a row of doc_ends that descends; dtypes differ; with
//          cp > 1: another order than the rank's chunks, a bias or mask tensor, S != Z
//   bitwise run-to-run: yes, for any number of threads
#include <algorithm>

#include "ops/layer_parts.h"
#include "ops/ring_attention.h"

namespace pith {
namespace {

// What a node keeps. In the packed form q, k and v are all qkv.
enum Keep { kQ, kK, kV, kOut, kLse, kTable, kBias, kVisible };

// The numbers of a call. Packed: the heads and the batch of qkv; else heads.size = 0.
struct Numbers {
  double scale;
  bool causal;
  int window;
  Heads heads = {};
  int64_t batch = 0;
  bool packed() const { return heads.size > 0; }
};

// Views of q, k and v in `data`: of three tensors or, packed, three times of one.
AttentionGrads head_views(const AttentionCore& core, bool packed, const Tensor (&data)[3]) {
  const int64_t S = core.query.count, Z = core.key.count, q = core.heads * core.size;
  const int64_t k = core.kv_heads * core.size, v = core.kv_heads * core.v_size;
  const auto view = [&](const Tensor& t, int64_t count, int64_t first, int64_t own, int size) {
    const int64_t width = packed ? q + k + v : own;
    char* from = t.data + (packed ? first : 0) * size_of(core.dtype);
    return HeadView{t.data ? from : nullptr, count * width, width, size};
  };
  return {view(data[0], S, 0, q, core.size),
          view(data[1], Z, q, k, core.size),
          view(data[2], Z, q + k, v, core.v_size),
          {}};
}
HeadView out_view(const AttentionCore& core, const Tensor& out) {
  const int64_t width = core.heads * core.v_size;
  return {out.data, core.query.count * width, width, core.v_size};
}
HeadView score_view(const Tensor& t) {  // of [1|B, 1|H, S, Z]
  const int64_t head = t.dim[2] * t.dim[3];
  return {t.data, t.dim[0] > 1 ? t.dim[1] * head : 0, t.dim[3], t.dim[1] > 1 ? head : 0};
}

AttentionCore core_of(const TensorList& t, const Numbers& c) {
  const Tensor &q = t[kQ], &k = t[kK], &v = t[kV], &table = t[kTable];
  const Heads& h = c.heads;
  const int64_t S = c.packed() ? table.dim[1] : q.dim[1], Z = c.packed() ? S : k.dim[1];
  AttentionCore core{q.dtype, c.batch, h.query, h.kv, h.size, h.size};
  if (!c.packed())
    core = {q.dtype, q.dim[0], int(q.dim[2]), int(k.dim[2]), int(q.dim[3]), int(v.dim[3])};
  core.scale = c.scale;
  core.causal = c.causal;
  core.window = c.window;
  // Queries and keys end together; the table covers the longer of them.
  core.query = positions_of(table, table.dim[1] - S, S);
  core.key = positions_of(table, table.dim[1] - Z, Z);
  const AttentionGrads views = head_views(core, c.packed(), {q, k, v});
  core.q = views.q;
  core.k = views.k;
  core.v = views.v;
  core.bias = score_view(t[kBias]);
  core.visible = score_view(t[kVisible]);
  return core;
}

void attention_bx(Rank& rank, Node& node) {
  const TensorList& t = node.bx_keep;
  const int64_t* i = node.i;
  const Numbers numbers{node.f[0], i[0] != 0, int(i[1]), {int(i[2]), int(i[3]), int(i[4])}, i[5]};
  const AttentionCore core = core_of(t, numbers);
  const bool packed = numbers.packed();
  Tensor d[3];
  for (int k = 0; k < 3; k++) d[k] = packed && k > 0 ? d[0] : zeroed(rank, node, k);
  AttentionGrads grads = head_views(core, packed, d);
  if (!packed) grads.bias = score_view(zeroed(rank, node, 3));
  ring_backward(rank, core, out_view(core, t[kOut]), t[kLse], out_view(core, node.grad[0]), grads,
                node.at);
}

// Both forms, once checked. `dims`: of out; `in`: where gradients go.
Tensor attend(Rank& rank, const Tensor (&x)[3], const Numbers& c, const Tensor& table,
              const AttentionBias& bias, Dims dims, std::initializer_list<Tensor> in, At at) {
  Tensor out = empty(rank, dims, x[0].dtype, at);
  TensorList all = {x[0], x[1], x[2], out, {}, table, bias.bias, bias.visible};
  const AttentionCore core = core_of(all, c);
  all[kLse] = empty(rank, {core.batch, core.heads, core.query.count}, out.dtype, at);
  ring_forward(rank, core, out_view(core, out), all[kLse], at);
  if (Node* node = record(rank, "attention", at, in, {&out})) {
    const int64_t numbers[] = {c.causal,   c.window,     c.heads.query,
                               c.heads.kv, c.heads.size, c.batch};
    std::copy(std::begin(numbers), std::end(numbers), node->i);
    node->f[0] = c.scale;
    node->bx_keep = all;
    node->bx = attention_bx;
  }
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
Tensor mask_table(Rank& rank, const AttentionMask& mask, int64_t batch, int64_t queries,
                  int64_t keys, At at) {
  const Tensor &order = mask.order, &ends = mask.doc_ends;
  const auto fits = [](const Tensor& t, Dims dims) {
    return !t.defined() || (t.dtype == DType::I32 && t.dim == dims);
  };
  check(rank, "attention", at,
        {{"mask.order i32 [S]", fits(order, {queries})},
         {"mask.doc_ends i32 [B, S]", fits(ends, {batch, queries})},
         {"S == Z where mask.order or mask.doc_ends is given",
          queries == keys || !(order.defined() || ends.defined())},
         {"mask.window >= 0", mask.window >= 0}},
        {&order, &ends});
  check(rank, "attention", at,
        {{"mask.order that ascends", rows_ascend(order)},
         {"mask.doc_ends that ascend in a row", rows_ascend(ends)},
         {"mask.order of this rank's chunks r and 2*cp-1-r of the row",
          rank.mesh.cp == 1 || (order.defined() && is_zigzag_part(rank, order.i32(), queries))}},
        {&order, &ends});
  const int64_t count = std::max(queries, keys), first = std::min<int64_t>(0, keys - queries);
  Tensor table = empty(rank, {1 + (ends.defined() ? batch : 0), count}, DType::I32, at);
  for (int64_t i = 0; i < count; i++) table.i32()[i] = order.defined() ? order.i32()[i] : first + i;
  if (ends.defined()) std::copy_n(ends.i32(), ends.numel(), table.i32() + count);
  return table;
}

}  // namespace

Tensor attention(Rank& rank, Tensor qkv, Heads heads, int64_t batch, AttentionMask mask, At at) {
  const int64_t N = heads.size, width = N * (heads.query + 2 * int64_t{heads.kv});
  check(rank, "attention", at,
        {{"heads.query a multiple of heads.kv >= 1",
          heads.kv >= 1 && heads.query >= 1 && heads.query % heads.kv == 0},
         {"heads.size >= 1", N >= 1},
         {"qkv [B*S, (H+2K)*N]", qkv.dim.rank == 2 && qkv.dim[1] == width},
         {"batch that divides qkv.dim[0]",
          batch > 0 ? qkv.dim[0] % batch == 0 : batch == 0 && qkv.dim[0] == 0}},
        {&qkv});
  const int64_t S = batch ? qkv.dim[0] / batch : 0;
  const Tensor table = mask_table(rank, mask, batch, S, S, at);
  const Numbers numbers{1 / std::sqrt(double(N)), mask.causal, mask.window, heads, batch};
  return attend(rank, {qkv, qkv, qkv}, numbers, table, {}, {qkv.dim[0], heads.query * N}, {qkv},
                at);
}

Tensor attention(Rank& rank, Tensor q, Tensor k, Tensor v, double scale, AttentionMask mask,
                 AttentionBias bias, At at) {
  const Tensor &extra = bias.bias, &visible = bias.visible;
  check(rank, "attention", at,
        {{"q, k and v of rank 4", q.dim.rank == 4 && k.dim.rank == 4 && v.dim.rank == 4},
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
  check(rank, "attention", at,
        {{"bias [1|B, 1|H, S, Z] of q's dtype", fits(extra, q.dtype)},
         {"visible u8 [1|B, 1|H, S, Z]", fits(visible, DType::U8)},
         {"no bias, no visible and S == Z where cp > 1",
          rank.mesh.cp == 1 || (!extra.defined() && !visible.defined() && S == Z)}},
        {&q, &k, &extra, &visible});
  const Tensor table = mask_table(rank, mask, B, S, Z, at);
  return attend(rank, {q, k, v}, {scale, mask.causal, mask.window}, table, bias,
                {B, S, H, v.dim[3]}, {q, k, v, extra}, at);
}

}  // namespace pith
