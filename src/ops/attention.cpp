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
#include <cstring>

#include "ops/cpu.h"
#include "ops/cpu_rows.h"
#include "ops/ring_attention.h"

namespace pith {
namespace {

// Row 0: row coordinates of the positions, `first` and up unless the mask has an order; with
// documents, rows 1 to B: the ends of the positions' documents.  I32 [1 or 1+B, count]
Tensor mask_table(Rank& rank, const AttentionMask& mask, int64_t first, int64_t count, At at) {
    const int64_t documents = mask.doc_ends.defined() ? mask.doc_ends.dim[0] : 0;
    Tensor table = empty(rank, {1 + documents, count}, DType::I32, at);
    for (int64_t i = 0; i < count; i++)
        table.i32()[i] = mask.order.defined() ? mask.order.i32()[i] : first + i;
    if (documents > 0 && count > 0)
        std::memcpy(table.i32() + count, mask.doc_ends.data, mask.doc_ends.bytes());
    return table;
}

// The positions [begin, begin + count) of a mask table.
Positions positions_of(const Tensor& table, int64_t begin, int64_t count) {
    const int32_t* ends = table.dim[0] > 1 ? table.i32() + table.dim[1] + begin : nullptr;
    return {count, table.i32() + begin, ends, table.dim[1]};
}

bool rows_ascend(const Tensor& x) {
    bool good = true;
    for (int64_t r = 0; r < x.rows(); r++)
        good &= std::is_sorted(x.i32() + r * x.cols(), x.i32() + (r + 1) * x.cols());
    return good;
}

void check_mask(const Rank& rank, At at, const AttentionMask& mask, int64_t batch,
                int64_t queries) {
    const Tensor &order = mask.order, &ends = mask.doc_ends;
    if (order.defined())
        check(rank, "attention", at,
              {{"mask.order i32 [S]", order.dtype == DType::I32 && order.dim == Dims{queries}}},
              {&order});
    if (ends.defined())
        check(rank, "attention", at,
              {{"mask.doc_ends i32 [B, S]",
                ends.dtype == DType::I32 && ends.dim == Dims{batch, queries}}},
              {&ends});
    check(rank, "attention", at,
          {{"mask.window >= 0", mask.window >= 0},
           {"mask.order that ascends", !order.defined() || rows_ascend(order)},
           {"mask.doc_ends that ascend in a row", !ends.defined() || rows_ascend(ends)},
           {"mask.order of this rank's chunks r and 2*cp-1-r of the row",
            rank.mesh.cp == 1 || (order.defined() && is_zigzag_part(rank, order.i32(), queries))}},
          {&order, &ends});
}

template <class T>
HeadView<T> view_of(const Tensor& t) {  // of [B, S, H, N]
    return {t.as<T>(), t.dim[1] * t.dim[2] * t.dim[3], t.dim[2] * t.dim[3], t.dim[3]};
}
template <class T>
HeadView<T> score_view(const Tensor& t) {  // of [1|B, 1|H, S, Z]
    if (!t.defined()) return {};
    const int64_t head = t.dim[2] * t.dim[3];
    return {t.as<T>(), t.dim[0] > 1 ? t.dim[1] * head : 0, t.dim[3], t.dim[1] > 1 ? head : 0};
}
template <class T>
HeadView<const T> read_only(HeadView<T> v) {
    return {v.data, v.batch, v.position, v.head};
}

// ---- Packed form.
// --------------------------------------------------------------------------------

// Views of the heads of q, k and v in `data`, which is laid out like the projection.
template <class T>
AttentionGrads<T> packed_views(T* data, Heads heads, int64_t positions) {
    const int64_t N = heads.size, width = N * (heads.query + 2 * heads.kv);
    if (!data) return {};
    T *k = data + N * heads.query, *v = k + N * heads.kv;
    const int64_t batch = positions * width;
    return {{data, batch, width, N}, {k, batch, width, N}, {v, batch, width, N}, {}};
}

template <class T>
AttentionCore<T> packed_core(const Tensor& qkv, Heads heads, int64_t batch, bool causal, int window,
                             const Tensor& table) {
    const int64_t S = table.dim[1];
    const auto views = packed_views(qkv.as<T>(), heads, S);
    AttentionCore<T> core{batch, heads.query, heads.kv, heads.size, heads.size};
    core.scale = 1 / std::sqrt(static_cast<double>(heads.size));
    core.causal = causal;
    core.window = window;
    core.query = core.key = positions_of(table, 0, S);
    core.q = read_only(views.q);
    core.k = read_only(views.k);
    core.v = read_only(views.v);
    return core;
}

// The view of out [B*S, H*N] and its gradient.
template <class T>
HeadView<T> packed_out(const Tensor& out, Heads heads, int64_t positions) {
    const int64_t width = heads.query * heads.size;
    return {out.as<T>(), positions * width, width, heads.size};
}

enum PackedKeep { kQkv, kPackedOut, kPackedLse, kPackedTable };

void packed_bx(Rank& rank, Node& node) {
    const TensorList& kept = node.bx_keep;
    const Heads heads{int(node.i[0]), int(node.i[1]), int(node.i[2])};
    const Tensor& table = kept[kPackedTable];
    const int64_t S = table.dim[1];
    float_kernel(rank, node.op, node.at, kept[kQkv], [&]<class T>(T*) {
        const auto core =
            packed_core<T>(kept[kQkv], heads, node.i[3], node.i[4], int(node.i[5]), table);
        const auto grads = packed_views(zeroed<T>(rank, node.in[0], node.at), heads, S);
        ring_backward(rank, core, read_only(packed_out<T>(kept[kPackedOut], heads, S)),
                      kept[kPackedLse].as<T>(), read_only(packed_out<T>(node.grad[0], heads, S)),
                      grads, node.at);
    });
}

}  // namespace

Tensor attention(Rank& rank, Tensor qkv, Heads heads, int64_t batch, AttentionMask mask, At at) {
    const int64_t width = int64_t{heads.size} * (heads.query + 2 * heads.kv);
    check(rank, "attention", at,
          {{"heads.query a multiple of heads.kv >= 1",
            heads.kv >= 1 && heads.query >= 1 && heads.query % heads.kv == 0},
           {"heads.size >= 1", heads.size >= 1},
           {"qkv [B*S, (H+2K)*N]", qkv.dim.rank == 2 && qkv.dim[1] == width},
           {"batch that divides qkv.dim[0]",
            batch > 0 ? qkv.dim[0] % batch == 0 : batch == 0 && qkv.dim[0] == 0}},
          {&qkv});
    const int64_t S = batch ? qkv.dim[0] / batch : 0;
    check_mask(rank, at, mask, batch, S);
    const Tensor table = mask_table(rank, mask, 0, S, at);
    Tensor out = empty(rank, {qkv.dim[0], int64_t{heads.query} * heads.size}, qkv.dtype, at);
    Tensor lse = empty(rank, {batch, heads.query, S}, qkv.dtype, at);
    float_kernel(rank, "attention", at, qkv, [&]<class T>(T*) {
        ring_forward(rank, packed_core<T>(qkv, heads, batch, mask.causal, mask.window, table),
                     packed_out<T>(out, heads, S), lse.as<T>(), at);
    });
    if (Node* node = record(rank, "attention", at, {qkv}, {&out})) {
        node->bx_keep = {qkv, out, lse, table};
        const int64_t numbers[] = {heads.query, heads.kv,    heads.size,
                                   batch,       mask.causal, mask.window};
        std::copy(std::begin(numbers), std::end(numbers), node->i);
        node->bx = packed_bx;
    }
    return out;
}

// ---- General form.
// -------------------------------------------------------------------------------

namespace {

enum GeneralKeep { kQ, kK, kV, kOut, kLse, kTable, kBias, kVisible };

// `t` holds q, k and v and, under their numbers, the mask table, bias and visible.
template <class T>
AttentionCore<T> general_core(const TensorList& t, double scale, bool causal, int window) {
    const Tensor &q = t[kQ], &k = t[kK], &v = t[kV], &table = t[kTable];
    const int64_t S = q.dim[1], Z = k.dim[1];
    AttentionCore<T> core{q.dim[0], int(q.dim[2]), int(k.dim[2]), int(q.dim[3]), int(v.dim[3])};
    core.scale = scale;
    core.causal = causal;
    core.window = window;
    // Queries and keys end together; the table covers the longer of them.
    core.query = positions_of(table, table.dim[1] - S, S);
    core.key = positions_of(table, table.dim[1] - Z, Z);
    core.q = view_of<const T>(q);
    core.k = view_of<const T>(k);
    core.v = view_of<const T>(v);
    core.bias = score_view<const T>(t[kBias]);
    core.visible = score_view<const uint8_t>(t[kVisible]);
    return core;
}

// The view of an input's gradient, or none if it is not wanted.
template <class T>
HeadView<T> grad_view(Rank& rank, const Tensor& t, At at, HeadView<T> (*view)(const Tensor&)) {
    if (!t.needs_grad()) return {};
    HeadView<T> grad = view(t);
    grad.data = zeroed<T>(rank, t, at);
    return grad;
}

void general_bx(Rank& rank, Node& node) {
    const TensorList& kept = node.bx_keep;
    float_kernel(rank, node.op, node.at, kept[kQ], [&]<class T>(T*) {
        const auto core = general_core<T>(kept, node.f[0], node.i[0], int(node.i[1]));
        const AttentionGrads<T> grads{grad_view<T>(rank, node.in[0], node.at, view_of),
                                      grad_view<T>(rank, node.in[1], node.at, view_of),
                                      grad_view<T>(rank, node.in[2], node.at, view_of),
                                      grad_view<T>(rank, node.in[3], node.at, score_view)};
        ring_backward(rank, core, view_of<const T>(kept[kOut]), kept[kLse].as<T>(),
                      view_of<const T>(node.grad[0]), grads, node.at);
    });
}

bool fits_scores(const Tensor& t, const Tensor& q, const Tensor& k) {
    return t.dim.rank == 4 && (t.dim[0] == 1 || t.dim[0] == q.dim[0]) &&
           (t.dim[1] == 1 || t.dim[1] == q.dim[2]) && t.dim[2] == q.dim[1] && t.dim[3] == k.dim[1];
}

void check_general(const Rank& rank, At at, const Tensor& q, const Tensor& k, const Tensor& v,
                   const AttentionMask& mask, const AttentionBias& bias) {
    check(rank, "attention", at,
          {{"q, k and v of rank 4", q.dim.rank == 4 && k.dim.rank == 4 && v.dim.rank == 4},
           {"k [B,Z,K,N] for q [B,S,H,N]", k.dim[0] == q.dim[0] && k.dim[3] == q.dim[3]},
           {"v [B,Z,K,M] for k [B,Z,K,N]",
            v.dim[0] == k.dim[0] && v.dim[1] == k.dim[1] && v.dim[2] == k.dim[2]},
           {"heads of q a multiple of those of k",
            k.dim[2] >= 1 && q.dim[2] >= 1 && q.dim[2] % k.dim[2] == 0},
           {"equal dtypes", q.dtype == k.dtype && q.dtype == v.dtype},
           {"S == Z where mask.order or mask.doc_ends is given",
            q.dim[1] == k.dim[1] || !(mask.order.defined() || mask.doc_ends.defined())}},
          {&q, &k, &v});
    if (bias.bias.defined())
        check(rank, "attention", at,
              {{"bias [1|B, 1|H, S, Z]", fits_scores(bias.bias, q, k)},
               {"bias of q's dtype", bias.bias.dtype == q.dtype}},
              {&bias.bias, &q, &k});
    if (bias.visible.defined())
        check(rank, "attention", at,
              {{"visible u8 [1|B, 1|H, S, Z]",
                bias.visible.dtype == DType::U8 && fits_scores(bias.visible, q, k)}},
              {&bias.visible, &q, &k});
    const bool extra = bias.bias.defined() || bias.visible.defined();
    check(rank, "attention", at,
          {{"no bias, no visible and S == Z where cp > 1",
            rank.mesh.cp == 1 || (!extra && q.dim[1] == k.dim[1])}},
          {&q, &k, &bias.bias, &bias.visible});
    check_mask(rank, at, mask, q.dim[0], q.dim[1]);
}

}  // namespace

Tensor attention(Rank& rank, Tensor q, Tensor k, Tensor v, double scale, AttentionMask mask,
                 AttentionBias bias, At at) {
    check_general(rank, at, q, k, v, mask, bias);
    const int64_t B = q.dim[0], S = q.dim[1], H = q.dim[2], Z = k.dim[1];
    const Tensor table = mask_table(rank, mask, std::min<int64_t>(0, Z - S), std::max(S, Z), at);
    Tensor out = empty(rank, {B, S, H, v.dim[3]}, q.dtype, at);
    Tensor lse = empty(rank, {B, H, S}, q.dtype, at);
    const TensorList all = {q, k, v, out, lse, table, bias.bias, bias.visible};
    float_kernel(rank, "attention", at, q, [&]<class T>(T*) {
        ring_forward(rank, general_core<T>(all, scale, mask.causal, mask.window), view_of<T>(out),
                     lse.as<T>(), at);
    });
    if (Node* node = record(rank, "attention", at, {q, k, v, bias.bias}, {&out})) {
        node->bx_keep = all;
        node->f[0] = scale;
        node->i[0] = mask.causal;
        node->i[1] = mask.window;
        node->bx = general_bx;
    }
    return out;
}

}  // namespace pith
