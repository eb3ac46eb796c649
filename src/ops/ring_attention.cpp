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
#include <vector>

#include "comm/communicator.h"
#include "ops/cpu.h"
#include "ops/cpu_rows.h"

namespace pith {
namespace {

std::vector<int32_t> zigzag_coords(int members, int member, int64_t count) {
    const int64_t half = count / 2;
    std::vector<int32_t> coord(count);
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

// ---- What travels: keys and values [B, count, K*N + K*M], and a table of their positions. -------

// Views of the two parts of `packed`.
struct KeyViews {
    HeadView k, v;
};
KeyViews key_views(const AttentionCore& core, const Tensor& packed) {
    const int64_t width = packed.dim[2], batch = packed.dim[1] * width;
    char* const v = packed.data + core.kv_heads * core.size * size_of(core.dtype);
    return {{packed.data, batch, width, core.size}, {v, batch, width, core.v_size}};
}

// f(packed elements, local elements, their number) for each head of the local positions `range`, as
// they lie in `packed`.
template <class T, class F>
void each_head(const AttentionCore& core, KeyRange range, const Tensor& packed, KeyViews local,
               F&& f) {
    T* at = packed.as<T>();
    for (int64_t b = 0; b < core.batch; b++)
        for (int64_t i = range.begin; i < range.end; i++) {
            for (int h = 0; h < core.kv_heads; h++, at += core.size)
                if (local.k.data) f(at, local.k.at<T>(b, h, i), core.size);
            for (int h = 0; h < core.kv_heads; h++, at += core.v_size)
                if (local.v.data) f(at, local.v.at<T>(b, h, i), core.v_size);
        }
}

struct Keys {
    Tensor packed, table;
};
Keys empty_keys(Rank& rank, const AttentionCore& core, KeyRange range, At at) {
    const int64_t count = range.count(), width = core.kv_heads * (core.size + core.v_size);
    return {empty(rank, {core.batch, count, width}, core.dtype, at),
            empty(rank, {1 + (core.key.doc_end ? core.batch : 0), count}, DType::I32, at)};
}

Keys pack_keys(Rank& rank, const AttentionCore& core, KeyRange range, At at) {
    const Keys keys = empty_keys(rank, core, range, at);
    float_kernel(rank, "attention", at, keys.packed, [&]<class T>(T*) {
        each_head<T>(core, range, keys.packed, {core.k, core.v},
                     [](T* packed, const T* local, int n) { std::copy_n(local, n, packed); });
    });
    int32_t* to = std::copy_n(core.key.coord + range.begin, range.count(), keys.table.i32());
    for (int64_t b = 0; b + 1 < keys.table.dim[0]; b++)
        to = std::copy_n(core.key.doc_end + b * core.key.doc_stride + range.begin, range.count(),
                         to);
    return keys;
}

// ---- The ring. ----------------------------------------------------------------------------------

enum MessageKind { kKeys = 1, kKeyGrads, kPositions };

// One step: whose keys are here, and who has this member's.
struct Step {
    int number, owner, reader;
    KeyRange theirs, mine;  // positions that travel
    Keys keys;              // the owner's

    Step(Rank& rank, const AttentionCore& core, int step, At at) : number(step) {
        const int n = group_size(rank, Group::Cp), me = group_rank(rank, Group::Cp);
        owner = (me + n - step) % n;
        reader = (me + step) % n;
        theirs = traveling(core, n, owner, me);
        mine = traveling(core, n, me, reader);
        keys = empty_keys(rank, core, theirs, at);
        const Keys sent = pack_keys(rank, core, mine, at);
        exchange(rank, kPositions, sent.table, reader, keys.table, owner, at);
        exchange(rank, kKeys, sent.packed, reader, keys.packed, owner, at);
    }
    // Sends to one member and receives from another; an empty message is not sent.
    void exchange(Rank& rank, MessageKind kind, const Tensor& out, int to, const Tensor& in,
                  int from, At at) const {
        const MessageTag tag{kind, number, 0};
        std::vector<Transfer> list;
        if (out.numel() > 0) list.push_back({Transfer::Send, to, out, tag});
        if (in.numel() > 0) list.push_back({Transfer::Recv, from, in, tag});
        send_recv(rank, Group::Cp, list.data(), static_cast<int>(list.size()),
                  kind == kKeyGrads ? "gradients of keys and values" : "keys and values", at);
    }
    // The same queries against the owner's keys.
    AttentionCore core_of(AttentionCore core) const {
        const KeyViews views = key_views(core, keys.packed);
        core.key = positions_of(keys.table, 0, theirs.count());
        core.k = views.k;
        core.v = views.v;
        return core;
    }
};

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

// Adds gradients to those of the local keys and values of `range`.
template <class T>
void add_key_grads_cpu(const AttentionCore& core, KeyRange range, const Tensor& from,
                       const AttentionGrads& grads) {
    each_head<T>(core, range, from, {grads.k, grads.v}, [](const T* packed, T* local, int n) {
        for (int j = 0; j < n; j++) local[j] += packed[j];
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
        const Step step(rank, core, number, at);
        attention_forward(rank, step.core_of(core), part_out, part_lse, at);
        float_kernel(rank, "attention", at, lse, [&]<class T>(T*) {
            merge_cpu(core, out, lse.as<T>(), part_out, part_lse.as<T>());
        });
    }
}

void ring_backward(Rank& rank, const AttentionCore& core, HeadView out, const Tensor& lse,
                   HeadView dout, const AttentionGrads& grads, At at) {
    attention_backward(rank, core, out, lse, dout, grads, at);
    for (int number = 1; number < group_size(rank, Group::Cp); number++) {
        const Step step(rank, core, number, at);
        const Tensor theirs = zeros(rank, step.keys.packed.dim, core.dtype, at);
        const Tensor mine = empty_keys(rank, core, step.mine, at).packed;
        const KeyViews d = key_views(core, theirs);
        attention_backward(rank, step.core_of(core), out, lse, dout, {grads.q, d.k, d.v, {}}, at);
        step.exchange(rank, kKeyGrads, theirs, step.owner, mine, step.reader, at);
        float_kernel(rank, "attention", at, lse,
                     [&]<class T>(T*) { add_key_grads_cpu<T>(core, step.mine, mine, grads); });
    }
}

}  // namespace pith
