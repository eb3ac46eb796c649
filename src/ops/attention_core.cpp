#include "ops/attention_core.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "ops/cpu.h"
#include "ops/cpu_rows.h"

namespace pith {
namespace {

// Queries a block: few enough that their scores against every key stay in a core's cache.
constexpr int64_t kBlockRows = 64;

// Queries [first, first + rows) of a batch row and the keys that any of them sees.
struct QueryBlock {
    int64_t b = 0, first = 0, rows = 0;
    KeyRange range[kBlockRows];
    KeyRange hull;
    int64_t keys() const { return hull.count(); }
};

template <class T>
QueryBlock query_block(const AttentionCore<T>& core, int64_t b, int64_t first) {
    QueryBlock block{b, first, std::min(kBlockRows, core.query.count - first), {}, {}};
    for (int64_t r = 0; r < block.rows; r++) {
        block.range[r] = visible_keys(core, b, first + r);
        block.hull.cover(block.range[r]);
    }
    return block;
}

// s [rows, keys] = scale q k^T + bias, -inf where `visible` hides; outside a row's range arbitrary.
template <class T>
void block_scores(const AttentionCore<T>& core, const QueryBlock& block, int64_t h, T* s) {
    const int64_t n = block.keys(), kv = h / (core.heads / core.kv_heads);
    gemm<T>(block.rows, n, core.size, {core.q.at(block.b, h, block.first), core.q.position},
            {core.k.at(block.b, kv, block.hull.begin), core.k.position, Layout::Transposed}, 0, s,
            n, core.scale);
    for (int64_t r = 0; core.bias.data && r < block.rows; r++) {
        const T* bias = core.bias.at(block.b, h, block.first + r) + block.hull.begin;
        for (int64_t j = 0; j < n; j++) s[r * n + j] += bias[j];
    }
    for (int64_t r = 0; core.visible.data && r < block.rows; r++) {
        const uint8_t* seen = core.visible.at(block.b, h, block.first + r) + block.hull.begin;
        for (int64_t j = 0; j < n; j++)
            s[r * n + j] = seen[j] ? s[r * n + j] : -std::numeric_limits<T>::infinity();
    }
}

// Zeroes a row of a block outside what its query sees, and gives that part.
template <class T>
struct SeenPart {
    T* data;
    int64_t n;
};
template <class T>
SeenPart<T> clear_unseen(const QueryBlock& block, int64_t r, T* row) {
    const KeyRange seen = block.range[r];
    const int64_t n = block.keys();
    if (seen.empty()) {
        std::fill(row, row + n, T(0));
        return {row, 0};
    }
    T* begin = row + seen.begin - block.hull.begin;
    T* end = row + seen.end - block.hull.begin;
    std::fill(row, begin, T(0));
    std::fill(end, row + n, T(0));
    return {begin, end - begin};
}

// Whether every score is -inf; a NaN, which `top` does not show, must not pass for one.
template <class T>
bool nothing_seen(const T* s, int64_t n, T top) {
    constexpr T hidden = -std::numeric_limits<T>::infinity();
    return top == hidden && std::all_of(s, s + n, [](T x) { return x == hidden; });
}

template <class T>
void forward_block(const AttentionCore<T>& core, int64_t h, const QueryBlock& block, T* s,
                   HeadView<T> out, T* lse) {
    const int64_t n = block.keys(), kv = h / (core.heads / core.kv_heads);
    T* y = out.at(block.b, h, block.first);
    if (n == 0) {
        for (int64_t r = 0; r < block.rows; r++)
            std::fill_n(y + r * out.position, core.v_size, T(0));
        std::fill_n(lse, block.rows, -std::numeric_limits<T>::infinity());
        return;
    }
    T inverse[kBlockRows];
    block_scores(core, block, h, s);
    for (int64_t r = 0; r < block.rows; r++) {
        const auto seen = clear_unseen(block, r, s + r * n);
        const T top = max_of(seen.data, seen.n);
        const bool none = nothing_seen(seen.data, seen.n, top);
        const T sum = none ? 0 : exp_sum(seen.data, seen.n, top);
        if (none) std::fill(seen.data, seen.data + seen.n, T(0));
        inverse[r] = none ? 0 : 1 / sum;
        lse[r] = none ? top : top + std::log(sum);
    }
    gemm<T>(block.rows, core.v_size, n, {s, n},
            {core.v.at(block.b, kv, block.hull.begin), core.v.position}, 0, y, out.position);
    for (int64_t r = 0; r < block.rows; r++)
        for (int64_t j = 0; j < core.v_size; j++) y[r * out.position + j] *= inverse[r];
}

template <class T>
struct BackwardInputs {
    HeadView<const T> out, dout;
    const T* lse;
};

// From scores s and dp = dout v^T: s becomes the probabilities and dp the scores' gradients.
template <class T>
void score_grads(const AttentionCore<T>& core, int64_t h, const QueryBlock& block,
                 const BackwardInputs<T>& in, T* s, T* dp) {
    const int64_t n = block.keys();
    for (int64_t r = 0; r < block.rows; r++) {
        const int64_t i = block.first + r;
        const T lse = in.lse[(block.b * core.heads + h) * core.query.count + i];
        const auto seen = clear_unseen(block, r, s + r * n);
        const auto dseen = clear_unseen(block, r, dp + r * n);
        if (lse == -std::numeric_limits<T>::infinity())
            std::fill(seen.data, seen.data + seen.n, T(0));
        else
            exp_sum(seen.data, seen.n, lse);
        const T* dy = in.dout.at(block.b, h, i);
        const T mean = dot(dy, in.out.at(block.b, h, i), core.v_size);
        for (int64_t j = 0; j < seen.n; j++) dseen.data[j] = seen.data[j] * (dseen.data[j] - mean);
    }
}

template <class T>
void backward_block(const AttentionCore<T>& core, int64_t h, const QueryBlock& block,
                    const BackwardInputs<T>& in, const AttentionGrads<T>& grads, T* s, T* dp) {
    const int64_t n = block.keys(), kv = h / (core.heads / core.kv_heads);
    const int64_t b = block.b, i = block.first, j = block.hull.begin;
    const Matrix<T> dout{in.dout.at(b, h, i), in.dout.position};
    const Matrix<T> q{core.q.at(b, h, i), core.q.position};
    const Matrix<T> k{core.k.at(b, kv, j), core.k.position};
    const Matrix<T> v{core.v.at(b, kv, j), core.v.position, Layout::Transposed};
    block_scores(core, block, h, s);
    gemm<T>(block.rows, n, core.v_size, dout, v, 0, dp, n);
    score_grads(core, h, block, in, s, dp);
    const Matrix<T> ds{dp, n}, ds_transposed{dp, n, Layout::Transposed};
    if (grads.v.data)
        gemm<T>(n, core.v_size, block.rows, {s, n, Layout::Transposed}, dout, 1,
                grads.v.at(b, kv, j), grads.v.position);
    if (grads.q.data)
        gemm<T>(block.rows, core.size, n, ds, k, 1, grads.q.at(b, h, i), grads.q.position,
                core.scale);
    if (grads.k.data)
        gemm<T>(n, core.size, block.rows, ds_transposed, q, 1, grads.k.at(b, kv, j),
                grads.k.position, core.scale);
    for (int64_t r = 0; grads.bias.data && r < block.rows; r++) {
        T* dbias = grads.bias.at(b, h, i + r) + j;
        for (int64_t c = 0; c < n; c++) dbias[c] += dp[r * n + c];
    }
}

}  // namespace

template <class T>
KeyRange visible_keys(const AttentionCore<T>& core, int64_t b, int64_t i) {
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

// A score costs a few elementary operations, its products included.
template <class T>
static bool worth_threads(const AttentionCore<T>& core) {
    return 4 * core.batch * core.heads * core.query.count * core.key.count > kParallelWork;
}

template <class T>
void attention_forward(const AttentionCore<T>& core, HeadView<T> out, T* lse) {
    const int64_t blocks = (core.query.count + kBlockRows - 1) / kBlockRows;
#pragma omp parallel if (worth_threads(core))
    {
        std::vector<T> scores(kBlockRows * core.key.count);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < core.batch * blocks * core.heads; task++) {
            const int64_t h = task % core.heads, b = task / core.heads / blocks;
            const auto block = query_block(core, b, task / core.heads % blocks * kBlockRows);
            T* block_lse = lse + (b * core.heads + h) * core.query.count + block.first;
            forward_block(core, h, block, scores.data(), out, block_lse);
        }
    }
}

template <class T>
void attention_backward(const AttentionCore<T>& core, HeadView<const T> out, const T* lse,
                        HeadView<const T> dout, const AttentionGrads<T>& grads) {
    const int64_t group = core.kv_heads ? core.heads / core.kv_heads : 0;
    const BackwardInputs<T> in{out, dout, lse};
    // One task writes all gradients of one key/value head. Only a bias's may be shared between
    // tasks.
#pragma omp parallel if (!grads.bias.data && worth_threads(core))
    {
        std::vector<T> scores(kBlockRows * core.key.count), dp(scores.size());
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < core.batch * core.kv_heads; task++) {
            const int64_t b = task / core.kv_heads, kv = task % core.kv_heads;
            for (int64_t first = 0; first < core.query.count; first += kBlockRows) {
                const auto block = query_block(core, b, first);
                if (block.keys() == 0) continue;
                for (int64_t h = kv * group; h < (kv + 1) * group; h++)
                    backward_block(core, h, block, in, grads, scores.data(), dp.data());
            }
        }
    }
}

template KeyRange visible_keys(const AttentionCore<float>&, int64_t, int64_t);
template KeyRange visible_keys(const AttentionCore<double>&, int64_t, int64_t);
template void attention_forward(const AttentionCore<float>&, HeadView<float>, float*);
template void attention_forward(const AttentionCore<double>&, HeadView<double>, double*);
template void attention_backward(const AttentionCore<float>&, HeadView<const float>, const float*,
                                 HeadView<const float>, const AttentionGrads<float>&);
template void attention_backward(const AttentionCore<double>&, HeadView<const double>,
                                 const double*, HeadView<const double>,
                                 const AttentionGrads<double>&);

}  // namespace pith
