// general: what the ops of the general vocabulary share: recording with weight gradients that can
// wait, several operands walked over one index space, one elementwise loop and one reduction.
// defines: Kept, Pass, record_grad, check_alike, dim_of, broadcast, Steps, Walk, flat_walk,
// elementwise, Extent, extent_of, reduce, SumOf, MaxOf, sum_repeated
#pragma once
#include <limits>
#include <utility>

#include "core/tape.h"
#include "ops/cpu.h"
#include "ops/cpu_rows.h"

namespace pith {

// ---- Recording
// -----------------------------------------------------------------------------------

// A value that gradients need, and the inputs whose gradients need it (bit k: input k).
struct Kept {
    Tensor value;
    unsigned inputs = 1;
};

// One run of a gradient function: over the activations among the inputs (bx) or the weights (bw).
struct Pass {
    Rank& rank;
    Node& node;
    const TensorList& kept;
    bool weights;
    const Tensor& dy() const { return node.grad[0]; }
    // Where to write input k's gradient; undefined unless this pass computes it.
    GradSlot slot(int k) const {
        const Tensor& t = node.in[k];
        if (!t.needs_grad() || t.is_weight() != weights) return {};
        return grad_slot(rank, t, node.at);
    }
    // The same for ops that only add: a fresh gradient begins as zeros.
    Tensor zeroed_slot(int k) const;
};

template <class T>
Slot<T> slot_of(const GradSlot& g) {
    return {g.grad.as<T>(), g.add};
}

// record() for an op of one output whose gradients are all computed by `grad`, called for the
// activations in bx and for the weights, if there are any, in bw. What neither needs is not kept;
// kept values stay at their index in the list. Returns the node, or null.
template <void (*grad)(const Pass&)>
Node* record_grad(Rank& rank, const char* op, At at, std::initializer_list<Tensor> in, Tensor& y,
                  std::initializer_list<Kept> kept = {}) {
    Node* node = record(rank, op, at, in, {&y});
    if (!node) return nullptr;
    unsigned activations = 0, weights = 0;
    for (int k = 0; k < node->in.count; k++) {
        if (!node->in[k].needs_grad()) continue;
        (node->in[k].grad ? weights : activations) |= 1u << k;
    }
    for (const Kept& k : kept) {
        node->bx_keep.push(k.inputs & activations ? k.value : Tensor{});
        node->bw_keep.push(k.inputs & weights ? k.value : Tensor{});
    }
    if (activations) node->bx = [](Rank& r, Node& n) { grad({r, n, n.bx_keep, false}); };
    if (weights) {
        node->bw = [](Rank& r, Node* const* nodes, int n) {
            for (int i = 0; i < n; i++) grad({r, *nodes[i], nodes[i]->bw_keep, true});
        };
    }
    return node;
}

// Throws unless all are defined, of one dtype and on one device.
void check_alike(const Rank& rank, const char* op, At at, std::initializer_list<const Tensor*> ts);
// dim, counted from the end when negative; throws unless x has it.
int dim_of(const Rank& rank, const char* op, At at, const Tensor& x, int dim);
// The shape to which the shapes broadcast, aligned at their last dimension; throws if they do not.
Dims broadcast(const Rank& rank, const char* op, At at, std::initializer_list<const Tensor*> ts);

// ---- The elementwise loop
// ------------------------------------------------------------------------

// Elements from one index of each dimension to the next.
struct Steps {
    int64_t dim[kMaxDims] = {};
};
// Of a tensor of shape `own` that is broadcast to `space`: 0 where it is repeated.
Steps steps_of(const Dims& own, const Dims& space);

// An index space that an output (operand 0) and up to three inputs walk together. Dimensions of
// size 1 are dropped, and neighbours that every operand walks as one are joined, so that the last
// one, the inner loop, is long.
struct Walk {
    static constexpr int kOperands = 4;
    Walk(const Dims& space, std::initializer_list<Steps> operands);
    int64_t inner() const { return size[rank - 1]; }
    int64_t outer() const;
    int64_t inner_step(int operand) const { return step[operand][rank - 1]; }
    bool strided() const;  // an operand whose inner loop neither repeats nor is contiguous
    // Each operand's offset of element `begin` of inner row `row`.
    void locate(int64_t row, int64_t begin, int64_t* offsets) const;
    int rank = 0, operands = 0;
    int64_t size[kMaxDims] = {};
    int64_t step[kOperands][kMaxDims] = {};
};
// n elements of contiguous operands.
Walk flat_walk(int64_t n);

constexpr int64_t kSpan = 512;  // elements that one step of the elementwise loop takes

// A span of an operand as consecutive elements: in place, or copied where it is repeated or
// strided.
template <class A>
struct Span {
    Span(const A* from, int64_t step, int64_t n) : data(step == 1 ? from : copy) {
        for (int64_t i = 0; step != 1 && i < n; i++) copy[i] = from[i * step];
    }
    const A* data;
    A copy[kSpan];
};

template <class T, class F, class... In>
void put_span(Slot<T> to, int64_t step, int64_t n, F f, const In*... x) {
    if (step != 1) {
        for (int64_t i = 0; i < n; i++) to.put(i * step, f(x[i]...));
    } else if (to.add) {
#pragma GCC ivdep
        for (int64_t i = 0; i < n; i++) to.data[i] += f(x[i]...);
    } else {
#pragma GCC ivdep
        for (int64_t i = 0; i < n; i++) to.data[i] = f(x[i]...);
    }
}

// out = f(in...) over the walk, a span of each row after the other (short ones where an operand is
// strided, so that its cache lines are still there for the next row), added where out.add. No input
// may be the output.
template <class T, class F, class... In>
void elementwise(const Walk& walk, Slot<T> out, F f, const In*... in) {
    const int64_t n = walk.inner(), span = walk.strided() ? kSpan / 32 : kSpan;
    const int64_t rows = walk.outer(), spans = (n + span - 1) / span;
    parallel_rows(spans * rows, n < span ? n : span, [&](int64_t task) {
        const int64_t begin = task / rows * span, rest = n - begin;
        const int64_t count = rest < span ? rest : span;
        int64_t offset[Walk::kOperands];
        walk.locate(task % rows, begin, offset);
        const Slot<T> to{out.data + offset[0], out.add};
        [&]<size_t... K>(std::index_sequence<K...>) {
            put_span(to, walk.inner_step(0), count, f,
                     Span<In>(in + offset[K + 1], walk.inner_step(K + 1), count).data...);
        }
        (std::index_sequence_for<In...>{});
    });
}

// ---- The reduction
// -------------------------------------------------------------------------------

// A tensor seen from one dimension: [outer, n, inner].
struct Extent {
    int64_t outer = 1, n = 1, inner = 1;
};
Extent extent_of(const Dims& dims, int first, int last);
inline Extent extent_of(const Dims& dims, int dim) { return extent_of(dims, dim, dim); }

struct SumOf {
    template <class T>
    static constexpr T start = 0;
    template <class T>
    static T join(T a, T b) {
        return a + b;
    }
};
struct MaxOf {  // NaN if any is
    template <class T>
    static constexpr T start = -std::numeric_limits<T>::infinity();
    template <class T>
    static T join(T a, T b) {
        return b > a || b != b ? b : a;
    }
};

constexpr int64_t kColumns = 64;

// to[c] = the join of x[r * ld + c] over r, for c < width <= kColumns: blocks of 64 rows, then
// these, which keeps F32 sums accurate.
template <class R, class T>
void reduce_columns(const T* x, int64_t rows, int64_t ld, int64_t width, T* to) {
    constexpr int64_t kBlock = 64;
    T part[kColumns];
    for (int64_t c = 0; c < width; c++) to[c] = R::template start<T>;
    for (int64_t begin = 0; begin < rows; begin += kBlock) {
        const int64_t end = begin + kBlock < rows ? begin + kBlock : rows;
        for (int64_t c = 0; c < width; c++) part[c] = x[begin * ld + c];
        for (int64_t r = begin + 1; r < end; r++)
            for (int64_t c = 0; c < width; c++) part[c] = R::join(part[c], x[r * ld + c]);
        for (int64_t c = 0; c < width; c++) to[c] = R::join(to[c], part[c]);
    }
}

// out [outer, inner] = the join of x [outer, n, inner] over n, divided by `divisor`. The order is
// fixed. A contiguous row is taken as a matrix of kColumns columns, which are joined at the end.
template <class R, class T>
void reduce(const Extent& e, const T* x, Slot<T> out, T divisor = 1) {
    if (e.inner == 1) {
        const int64_t width = e.n < kColumns ? e.n : kColumns, rows = width ? e.n / width : 0;
        parallel_rows(e.outer, e.n, [&](int64_t o) {
            T column[kColumns], total = R::template start<T>;
            const T* row = x + o * e.n;
            reduce_columns<R>(row, rows, width, width, column);
            for (int64_t i = rows * width, c = 0; i < e.n; i++, c++)
                column[c] = R::join(column[c], row[i]);
            for (int64_t c = 0; c < width; c++) total = R::join(total, column[c]);
            out.put(o, total / divisor);
        });
        return;
    }
    const int64_t blocks = (e.inner + kColumns - 1) / kColumns;
    parallel_rows(e.outer * blocks, e.n * kColumns, [&](int64_t task) {
        const int64_t o = task / blocks, first = task % blocks * kColumns;
        const int64_t width = e.inner - first < kColumns ? e.inner - first : kColumns;
        T column[kColumns];
        reduce_columns<R>(x + o * e.n * e.inner + first, e.n, e.inner, width, column);
        for (int64_t c = 0; c < width; c++) out.put(o * e.inner + first + c, column[c] / divisor);
    });
}

// out = x summed over the dimensions in which a tensor of shape `own` was repeated, one after
// another from the first.
template <class T>
void sum_repeated(Rank& rank, Tensor x, const Dims& own, Slot<T> out) {
    const int missing = x.dim.rank - own.rank;
    auto repeated = [&](int i) { return x.dim[i] != 1 && (i < missing || own[i - missing] == 1); };
    for (int first = 0; first < x.dim.rank; first++) {
        if (!repeated(first)) continue;
        int last = first;
        while (last + 1 < x.dim.rank && repeated(last + 1)) last++;
        const Extent e = extent_of(x.dim, first, last);
        for (int i = first; i <= last; i++) x.dim[i] = 1;
        if (x.numel() == own.numel()) return reduce<SumOf>(e, x.as<T>(), out);
        Tensor partial = empty(rank, x.dim, x.dtype, x.made);
        reduce<SumOf>(e, x.as<T>(), Slot<T>{partial.as<T>()});
        x = partial;
    }
}

}  // namespace pith
