// ring_attention: attention over rows that a cp group shares, cut into 2*cp chunks of which member
// r holds r and 2*cp-1-r, so that all members have the same work under a causal mask (Brandon et
// al. 2023, arXiv:2311.09431).
//
// At step s member r computes with the keys of member r-s, which come straight from their owner:
// handed from neighbour to neighbour, a chunk would have to pass members that have no use for it.
// So only keys travel that a query there sees: under a causal mask the first chunk alone goes to
// higher members, and with a sliding window only the keys just before another's chunks. Parts of a
// softmax are merged by their lse (Liu et al. 2023, arXiv:2310.01889; the sigmoid form is that of
// Zhu, github.com/zhuzilin/ring-flash-attention):
//     out = out + sigmoid(lse' - lse) (out' - out),  lse = log(e^lse + e^lse')
// Backward needs the final lse only; keys travel again and their gradients go back to their owner,
// who adds them in the order of steps.
//
// With documents, keys are gathered whole and their gradients reduce-scattered: a document may lie
// anywhere in the row.
#include "ops/ring_attention.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "comm/communicator.h"
#include "ops/cpu.h"
#include "ops/cpu_rows.h"

namespace pith {
namespace {

// Row coordinate of local position i of a member's `count`.
int32_t zigzag_coord(int members, int member, int64_t count, int64_t i) {
    const int64_t half = count / 2;
    return i < half ? member * half + i : (2 * members - 2 - member) * half + i;
}

std::vector<int32_t> zigzag_coords(int members, int member, int64_t count) {
    std::vector<int32_t> coord(count);
    for (int64_t i = 0; i < count; i++) coord[i] = zigzag_coord(members, member, count, i);
    return coord;
}

// ---- Keys and values as they travel: [B, count, K*N + K*M].
// --------------------------------------

template <class T>
struct KeyViews {
    HeadView<T> k, v;
};
template <class T>
int64_t width_of(const AttentionCore<T>& core) {
    return int64_t{core.kv_heads} * (core.size + core.v_size);
}
// Of `count` positions a row in `data`.
template <class T>
KeyViews<T> key_views(const AttentionCore<T>& core, T* data, int64_t count) {
    const int64_t width = width_of(core);
    return {{data, count * width, width, core.size},
            {data ? data + core.kv_heads * core.size : data, count * width, width, core.v_size}};
}

template <class T>
constexpr DType kDType = sizeof(T) == sizeof(double) ? DType::F64 : DType::F32;

template <class T>
Tensor key_buffer(Rank& rank, const AttentionCore<T>& core, int64_t count, At at) {
    return empty(rank, {core.batch, count, width_of(core)}, kDType<T>, at);
}

// f(k, v, b, h, i) for each head of `buffer`, which holds the local positions i of `range`.
template <class T, class F>
void each_key_head(const AttentionCore<T>& core, KeyRange range, T* buffer, F&& f) {
    const auto views = key_views(core, buffer, range.count());
    for (int64_t b = 0; b < core.batch; b++)
        for (int64_t i = 0; i < range.count(); i++)
            for (int64_t h = 0; h < core.kv_heads; h++)
                f(views.k.at(b, h, i), views.v.at(b, h, i), b, h, range.begin + i);
}

// Copies the local keys and values of `range`.
template <class T>
Tensor pack_keys(Rank& rank, const AttentionCore<T>& core, KeyRange range, At at) {
    Tensor packed = key_buffer(rank, core, range.count(), at);
    each_key_head(core, range, packed.as<T>(), [&](T* k, T* v, int64_t b, int64_t h, int64_t i) {
        std::memcpy(k, core.k.at(b, h, i), core.size * sizeof(T));
        std::memcpy(v, core.v.at(b, h, i), core.v_size * sizeof(T));
    });
    return packed;
}

// Adds gradients to those of the local keys and values of `range`.
template <class T>
void add_key_grads(const AttentionCore<T>& core, KeyRange range, const Tensor& from,
                   const AttentionGrads<T>& grads) {
    each_key_head(core, range, from.as<T>(), [&](T* k, T* v, int64_t b, int64_t h, int64_t i) {
        T* dk = grads.k.data ? grads.k.at(b, h, i) : nullptr;
        T* dv = grads.v.data ? grads.v.at(b, h, i) : nullptr;
        for (int64_t n = 0; dk && n < core.size; n++) dk[n] += k[n];
        for (int64_t n = 0; dv && n < core.v_size; n++) dv[n] += v[n];
    });
}

// The same queries against the keys and values in `packed`.
template <class T>
AttentionCore<T> with_keys(AttentionCore<T> core, const Tensor& packed, Positions positions) {
    const auto views = key_views(core, packed.as<T>(), positions.count);
    core.key = positions;
    core.k = {views.k.data, views.k.batch, views.k.position, views.k.head};
    core.v = {views.v.data, views.v.batch, views.v.position, views.v.head};
    return core;
}

// ---- The ring.
// -----------------------------------------------------------------------------------

enum MessageKind { kKeys = 1, kKeyGrads };

template <class T>
struct Ring {
    Rank& rank;
    const AttentionCore<T>& core;
    At at;
    int members = group_size(rank, Group::Cp), me = group_rank(rank, Group::Cp);

    // Positions of the owner that some query of the reader sees.
    KeyRange seen(int owner, int reader) const {
        const int64_t count = core.key.count;
        const auto keys = zigzag_coords(members, owner, count);
        const auto queries = zigzag_coords(members, reader, count);
        AttentionCore<T> rule;
        rule.causal = core.causal;
        rule.window = core.window;
        rule.query = {count, queries.data()};
        rule.key = {count, keys.data()};
        KeyRange all;
        for (int64_t i = 0; i < count; i++) all.cover(visible_keys(rule, 0, i));
        return all;
    }

    // Sends to one member and receives from another; an empty message is not sent.
    void exchange(MessageKind kind, int step, const Tensor& out, int to, const Tensor& in,
                  int from) {
        const MessageTag tag{kind, step, 0};
        std::vector<Transfer> list;
        if (out.numel() > 0) list.push_back({Transfer::Send, to, out, tag});
        if (in.numel() > 0) list.push_back({Transfer::Recv, from, in, tag});
        send_recv(rank, Group::Cp, list.data(), static_cast<int>(list.size()),
                  kind == kKeys ? "keys and values" : "gradients of keys and values", at);
    }
};

// One step: whose keys are here, and who has this member's.
template <class T>
struct Step {
    int owner, reader;
    KeyRange theirs, mine;  // positions that travel
    Tensor packed;          // the owner's
    std::vector<int32_t> coord;
    Positions positions() const { return {theirs.count(), coord.data() + theirs.begin}; }
};

template <class T>
Step<T> take_step(Ring<T>& ring, int step) {
    const int n = ring.members;
    Step<T> s{(ring.me + n - step) % n, (ring.me + step) % n, {}, {}, {}, {}};
    s.theirs = ring.seen(s.owner, ring.me);
    s.mine = ring.seen(ring.me, s.reader);
    s.coord = zigzag_coords(n, s.owner, ring.core.key.count);
    s.packed = key_buffer(ring.rank, ring.core, s.theirs.count(), ring.at);
    const Tensor sent = pack_keys(ring.rank, ring.core, s.mine, ring.at);
    ring.exchange(kKeys, step, sent, s.reader, s.packed, s.owner);
    return s;
}

// Adds a part of the softmax over other keys to out and lse.
template <class T>
void merge(const AttentionCore<T>& core, HeadView<T> out, T* lse, HeadView<T> part_out,
           const T* part_lse) {
    constexpr T nothing = -std::numeric_limits<T>::infinity();
    const int64_t S = core.query.count;
    parallel_rows(core.batch * core.heads * S, core.v_size, [&](int64_t row) {
        const int64_t b = row / S / core.heads, h = row / S % core.heads, i = row % S;
        const T a = lse[row], c = part_lse[row];
        if (c == nothing) return;
        const T weight = logistic(c - a);
        T* y = out.at(b, h, i);
        const T* x = part_out.at(b, h, i);
        for (int64_t n = 0; n < core.v_size; n++) y[n] += weight * (x[n] - y[n]);
        lse[row] = std::max(a, c) + std::log1p(std::exp(-std::abs(a - c)));
    });
}

// ---- Documents: the whole rows' keys.
// ------------------------------------------------------------

// Between [members, B, count, ...], each member's part, and [B, members * count, ...], the rows.
enum class Direction { ToRows, ToMembers };
void reorder(Direction direction, int members, int64_t batch, int64_t count, int64_t bytes,
             char* by_member, char* rows) {
    const int64_t half = count / 2, length = half * bytes;
    for (int m = 0; m < members && length > 0; m++)
        for (int64_t b = 0; b < batch; b++)
            for (int side = 0; side < 2; side++) {
                const int64_t at = zigzag_coord(members, m, count, side * half);
                char* part = by_member + (m * batch + b) * 2 * length + side * length;
                char* row = rows + (b * members * count + at) * bytes;
                std::memcpy(direction == Direction::ToRows ? row : part,
                            direction == Direction::ToRows ? part : row, length);
            }
}

// The members' parts [B, count, ...] of a tensor as rows [B, members * count, ...].
Tensor gather_rows(Rank& rank, const Tensor& local, const char* what, At at) {
    const int n = group_size(rank, Group::Cp);
    Dims flat = local.dim, whole = local.dim;
    flat[0] *= n;
    whole[1] *= n;
    Tensor parts = empty(rank, flat, local.dtype, at), rows = empty(rank, whole, local.dtype, at);
    all_gather(rank, Group::Cp, local, parts, what, nullptr, at);
    const int64_t positions = local.dim[0] * local.dim[1];
    reorder(Direction::ToRows, n, local.dim[0], local.dim[1],
            positions ? local.bytes() / positions : 0, parts.data, rows.data);
    return rows;
}

// This member's part [B, count, ...] of the sum over members of rows [B, members * count, ...].
Tensor reduce_rows(Rank& rank, const Tensor& rows, const char* what, At at) {
    const int n = group_size(rank, Group::Cp);
    Dims flat = rows.dim, part = rows.dim;
    flat[0] *= n;
    flat[1] = part[1] = rows.dim[1] / n;
    Tensor parts = empty(rank, flat, rows.dtype, at), local = empty(rank, part, rows.dtype, at);
    const int64_t positions = rows.dim[0] * rows.dim[1];
    reorder(Direction::ToMembers, n, part[0], part[1], positions ? rows.bytes() / positions : 0,
            parts.data, rows.data);
    reduce_scatter(rank, Group::Cp, parts, local, what, nullptr, at);
    return local;
}

// The keys, values, coordinates and document ends of the whole rows.
template <class T>
struct GatheredKeys {
    Tensor keys, ends;
    std::vector<int32_t> coord;
    Positions positions() const {
        const int64_t count = keys.dim[1];
        return {count, coord.data(), ends.i32(), count};
    }
};
template <class T>
GatheredKeys<T> gather_keys(Rank& rank, const AttentionCore<T>& core, At at) {
    const int64_t count = core.key.count;
    Tensor ends = empty(rank, {core.batch, count}, DType::I32, at);
    for (int64_t b = 0; b < core.batch; b++)
        for (int64_t i = 0; i < count; i++)
            ends.i32()[b * count + i] = core.key.doc_end[b * core.key.doc_stride + i];
    const Tensor packed = pack_keys(rank, core, {0, count}, at);
    GatheredKeys<T> all{gather_rows(rank, packed, "keys and values", at),
                        gather_rows(rank, ends, "document ends", at),
                        {}};
    for (int64_t i = 0; i < all.keys.dim[1]; i++) all.coord.push_back(i);
    return all;
}

template <class T>
bool gathers(const Rank& rank, const AttentionCore<T>& core) {
    return core.key.doc_end && group_size(rank, Group::Cp) > 1;
}

}  // namespace

bool is_zigzag_part(const Rank& rank, const int32_t* coord, int64_t count) {
    const int n = group_size(rank, Group::Cp), me = group_rank(rank, Group::Cp);
    bool good = n == 1 || count % 2 == 0;
    for (int64_t i = 0; good && i < count; i++) good = coord[i] == zigzag_coord(n, me, count, i);
    return good;
}

template <class T>
void ring_forward(Rank& rank, const AttentionCore<T>& core, HeadView<T> out, T* lse, At at) {
    if (gathers(rank, core)) {
        const auto all = gather_keys(rank, core, at);
        return attention_forward(with_keys(core, all.keys, all.positions()), out, lse);
    }
    attention_forward(core, out, lse);
    Ring<T> ring{rank, core, at};
    if (ring.members == 1) return;
    const int64_t S = core.query.count, H = core.heads, M = core.v_size;
    const Tensor part = empty(rank, {core.batch, S, H, M}, kDType<T>, at);
    const Tensor part_lse = empty(rank, {core.batch, H, S}, kDType<T>, at);
    const HeadView<T> part_out{part.as<T>(), S * H * M, H * M, M};
    for (int step = 1; step < ring.members; step++) {
        const auto s = take_step(ring, step);
        if (s.theirs.empty()) continue;
        attention_forward(with_keys(core, s.packed, s.positions()), part_out, part_lse.as<T>());
        merge(core, out, lse, part_out, part_lse.as<T>());
    }
}

template <class T>
void ring_backward(Rank& rank, const AttentionCore<T>& core, HeadView<const T> out, const T* lse,
                   HeadView<const T> dout, const AttentionGrads<T>& grads, At at) {
    if (gathers(rank, core)) {
        const auto all = gather_keys(rank, core, at);
        const Tensor sums = zeros(rank, all.keys.dim, all.keys.dtype, at);
        const auto d = key_views(core, sums.as<T>(), all.keys.dim[1]);
        attention_backward(with_keys(core, all.keys, all.positions()), out, lse, dout,
                           {grads.q, d.k, d.v, {}});
        add_key_grads(core, {0, core.key.count},
                      reduce_rows(rank, sums, "gradients of keys and values", at), grads);
        return;
    }
    attention_backward(core, out, lse, dout, grads);
    Ring<T> ring{rank, core, at};
    for (int step = 1; step < ring.members; step++) {
        const auto s = take_step(ring, step);
        const Tensor theirs = zeros(rank, s.packed.dim, s.packed.dtype, at);
        const Tensor mine = key_buffer(rank, core, s.mine.count(), at);
        const auto d = key_views(core, theirs.as<T>(), s.theirs.count());
        if (!s.theirs.empty())
            attention_backward(with_keys(core, s.packed, s.positions()), out, lse, dout,
                               {grads.q, d.k, d.v, {}});
        ring.exchange(kKeyGrads, step, theirs, s.owner, mine, s.reader);
        add_key_grads(core, s.mine, mine, grads);
    }
}

template void ring_forward(Rank&, const AttentionCore<float>&, HeadView<float>, float*, At);
template void ring_forward(Rank&, const AttentionCore<double>&, HeadView<double>, double*, At);
template void ring_backward(Rank&, const AttentionCore<float>&, HeadView<const float>, const float*,
                            HeadView<const float>, const AttentionGrads<float>&, At);
template void ring_backward(Rank&, const AttentionCore<double>&, HeadView<const double>,
                            const double*, HeadView<const double>, const AttentionGrads<double>&,
                            At);

}  // namespace pith
