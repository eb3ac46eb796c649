// expand_rows: y[p] = rows[row_of[p]].        reduce_pairs: y[r] = sum of x[p] over the pairs of r.
//   in     Dispatched (ops.h); x [P, D]   f32|f64          out  [P, D];  [R, D]
//   keeps  bx: indices        grad  bx: each is the other's
// grouped_linear: y rows [offsets[e], offsets[e+1]) = those of x times w[e]^T.
//   in     x [P, in]   w [E, out, in]   f32|f64, one dtype   offsets I32 [E+1]        out  [P, out]
//   keeps  bx: w, offsets   bw: x, offsets
//   grad   bx: dx += dy w[e]   bw: dw[e] += dy^T x over the expert's rows
// swiglu: y = silu(gate) * up * weight of the row.                   Shazeer 2020, arXiv:2002.05202
//   in     gate_up [P, 2F] = gate | up   weights [P] or undefined   f32|f64, one dtype
//   out    [P, F]
//   keeps  bx: both
//   grad   bx: dgate_up +=, dweights += sum over the row of dy silu(gate) up
//   errors shapes; dtypes differ; offsets, row_of, pair_of or row_begin that do not fit
//   bitwise run-to-run: yes, for any number of threads
#include <algorithm>

#include "ops/layer_parts.h"
#include "ops/ops.h"

namespace pith {

// ---- Rows to pairs and back. --------------------------------------------------------------------

template <class T>
static void rows_to_pairs(const Tensor& rows, const Tensor& row_of, Slot<T> pairs) {
    const int64_t D = rows.dim[1];
    if (!pairs.data) return;
    parallel_rows(row_of.dim[0], D, [&](int64_t p) {
        const T* from = rows.as<T>() + row_of.i32()[p] * D;
        const Slot<T> to{pairs.data + p * D, pairs.add};
        for (int64_t j = 0; j < D; j++) to.put(j, from[j]);
    });
}

template <class T>
static void pairs_to_rows(const Tensor& pairs, const Tensor& pair_of, const Tensor& row_begin,
                          Slot<T> rows) {
    const int64_t D = pairs.dim[1], R = row_begin.dim[0] - 1;
    if (!rows.data) return;
    parallel_rows(R, D * (1 + pairs.dim[0] / std::max<int64_t>(1, R)), [&](int64_t r) {
        T* to = rows.data + r * D;
        if (!rows.add) std::fill_n(to, D, T(0));
        for (int32_t i = row_begin.i32()[r]; i < row_begin.i32()[r + 1]; i++) {
            const T* from = pairs.as<T>() + pair_of.i32()[i] * D;
            for (int64_t j = 0; j < D; j++) to[j] += from[j];
        }
    });
}

static bool ascends(const Tensor& t, int64_t last) {
    const int32_t *begin = t.i32(), *end = begin + t.numel();
    return begin != end && *begin == 0 && end[-1] == last && std::is_sorted(begin, end);
}

// x is rows [R, D] (`need` says so) or pairs [P, D], `count` being R or P.
static void check_pairs(const Rank& rank, const char* op, At at, const Tensor& x, const char* need,
                        int64_t count, const Dispatched& d) {
    const int64_t P = d.row_of.dim[0], R = d.row_begin.dim[0] - 1;
    const bool i32 = d.row_of.dtype == DType::I32 && d.pair_of.dtype == DType::I32 &&
                     d.row_begin.dtype == DType::I32;
    check(rank, op, at,
          {{"row_of I32 [P], pair_of I32 [P] and row_begin I32 [R+1]",
            i32 && d.row_of.dim == Dims{P} && d.pair_of.dim == Dims{P} &&
                d.row_begin.dim == Dims{R + 1}},
           {need, x.dim.rank == 2 && x.dim[0] == count}},
          {&x, &d.row_of, &d.pair_of, &d.row_begin});
    need_cpu(op, at, x);
    check(rank, op, at, {{"row_begin ascending from 0 to P", ascends(d.row_begin, P)}},
          {&d.row_begin, &d.row_of});
    check_ids(rank, op, at, "row_of", d.row_of, R);
    check_ids(rank, op, at, "pair_of", d.pair_of, P);
}

static void expand_rows_bx(Rank& rank, Node& node) {
    float_kernel(rank, node, [&]<class T>(T*) {
        pairs_to_rows(node.grad[0], node.bx_keep[0], node.bx_keep[1], writable<T>(rank, node, 0));
    });
}

static void reduce_pairs_bx(Rank& rank, Node& node) {
    float_kernel(rank, node, [&]<class T>(T*) {
        rows_to_pairs(node.grad[0], node.bx_keep[0], writable<T>(rank, node, 0));
    });
}

Tensor expand_rows(Rank& rank, const Dispatched& d, At at) {
    check_pairs(rank, "expand_rows", at, d.rows, "rows [R, D]", d.row_begin.dim[0] - 1, d);
    Tensor y = empty(rank, {d.row_of.dim[0], d.rows.dim[1]}, d.rows.dtype, at);
    float_kernel(rank, "expand_rows", at, y,
                 [&]<class T>(T*) { rows_to_pairs<T>(d.rows, d.row_of, {y.as<T>()}); });
    if (Node* n = record(rank, "expand_rows", at, {d.rows}, {&y})) {
        n->bx_keep = {d.pair_of, d.row_begin};
        n->bx = expand_rows_bx;
    }
    return y;
}

Tensor reduce_pairs(Rank& rank, Tensor y, const Dispatched& d, At at) {
    check_pairs(rank, "reduce_pairs", at, y, "y [P, D]", d.row_of.dim[0], d);
    Tensor rows = empty(rank, {d.row_begin.dim[0] - 1, y.dim[1]}, y.dtype, at);
    float_kernel(rank, "reduce_pairs", at, y,
                 [&]<class T>(T*) { pairs_to_rows<T>(y, d.pair_of, d.row_begin, {rows.as<T>()}); });
    if (Node* n = record(rank, "reduce_pairs", at, {y}, {&rows})) {
        n->bx_keep = {d.row_of};
        n->bx = reduce_pairs_bx;
    }
    return rows;
}

// ---- Products by expert. ------------------------------------------------------------------------

// f(e, begin, rows, col, cols) for each expert, its rows, and blocks of `width` columns, on all
// threads. `work`: multiply-adds in all.
template <class F>
static void expert_columns(const Tensor& offsets, int64_t width, int64_t work, F&& f) {
    constexpr int64_t kCols = 384;  // those of gemm's own tiles
    const int64_t blocks = (width + kCols - 1) / kCols, tasks = (offsets.dim[0] - 1) * blocks;
    parallel_products(tasks, work / std::max<int64_t>(1, tasks), [&](int64_t task) {
        const int64_t e = task / blocks, col = task % blocks * kCols;
        const int64_t begin = offsets.i32()[e], end = offsets.i32()[e + 1];
        f(e, begin, end - begin, col, std::min(kCols, width - col));
    });
}

// y rows of expert e = or += x rows times w[e], stored [width, depth] if Transposed else
// [depth, width].
template <class T>
static void grouped_product_cpu(const Tensor& x, const Tensor& w, Layout layout,
                                const Tensor& offsets, int64_t width, Slot<T> y) {
    const int64_t depth = x.dim[1], work = x.dim[0] * width * depth;
    const bool transposed = layout == Layout::Transposed;
    if (!y.data) return;
    expert_columns(offsets, width, work,
                   [&](int64_t e, int64_t begin, int64_t rows, int64_t col, int64_t cols) {
                       const T* part =
                           w.as<T>() + e * width * depth + col * (transposed ? depth : 1);
                       gemm<T>(rows, cols, depth, {x.as<T>() + begin * depth, depth},
                               {part, transposed ? depth : width, layout}, y.add,
                               y.data + begin * width + col, width);
                   });
}

template <class T>
static void grouped_linear_bw_cpu(const Tensor& dy, const Tensor& x, const Tensor& offsets,
                                  Slot<T> dw) {
    const int64_t out = dy.dim[1], in = x.dim[1], work = x.dim[0] * out * in;
    if (!dw.data) return;
    expert_columns(
        offsets, in, work, [&](int64_t e, int64_t begin, int64_t rows, int64_t col, int64_t cols) {
            gemm<T>(out, cols, rows, {dy.as<T>() + begin * out, out, Layout::Transposed},
                    {x.as<T>() + begin * in + col, in}, dw.add, dw.data + e * out * in + col, in);
        });
}

static void grouped_linear_bx(Rank& rank, Node& node) {
    const Tensor& w = node.bx_keep[0];
    float_kernel(rank, node, [&]<class T>(T*) {
        grouped_product_cpu(node.grad[0], w, Layout::Normal, node.bx_keep[1], w.dim[2],
                            writable<T>(rank, node, 0));
    });
}

static void grouped_linear_bw(Rank& rank, Node& node) {
    float_kernel(rank, node, [&]<class T>(T*) {
        grouped_linear_bw_cpu(node.grad[0], node.bw_keep[0], node.bw_keep[1],
                              writable<T>(rank, node, 1));
    });
}

Tensor grouped_linear(Rank& rank, Tensor x, Tensor w, Tensor offsets, At at) {
    check(rank, "grouped_linear", at,
          {{"x [P, in] and w [E, out, in]",
            x.dim.rank == 2 && w.dim.rank == 3 && x.dim[1] == w.dim[2]},
           {"offsets I32 [E+1]", offsets.dtype == DType::I32 && offsets.dim == Dims{w.dim[0] + 1}},
           {"one dtype", x.dtype == w.dtype}},
          {&x, &w, &offsets});
    Tensor y = empty(rank, {x.dim[0], w.dim[1]}, x.dtype, at);
    float_kernel(rank, "grouped_linear", at, x, [&]<class T>(T*) {
        check(rank, "grouped_linear", at,
              {{"offsets ascending from 0 to P", ascends(offsets, x.dim[0])}}, {&offsets, &x});
        grouped_product_cpu<T>(x, w, Layout::Transposed, offsets, w.dim[1], {y.as<T>()});
    });
    if (Node* n = record(rank, "grouped_linear", at, {x, w}, {&y})) {
        n->bx_keep = {w, offsets};
        n->bw_keep = {x, offsets};
        set_backward<grouped_linear_bx, grouped_linear_bw>(*n, {1});
    }
    return y;
}

// ---- Activation. --------------------------------------------------------------------------------

template <class T>
static void swiglu_cpu(const Tensor& gate_up, const Tensor& weights, const Tensor& y) {
    const int64_t F = gate_up.dim[1] / 2;
    parallel_rows(gate_up.dim[0], F * 16, [&](int64_t p) {
        const T* gate = gate_up.as<T>() + p * 2 * F;
        const T* up = gate + F;
        const T weight = weights.defined() ? weights.as<T>()[p] : 1;
        T* out = y.as<T>() + p * F;
        for (int64_t j = 0; j < F; j++) out[j] = gate[j] * logistic(gate[j]) * up[j] * weight;
    });
}

// PERF: one loop an output, over a stretch whose sigmoids are kept: with both outputs in one loop
// the compiler makes no vector instructions.
template <class T>
static void swiglu_bx_cpu(const Tensor& dy, const Tensor& gate_up, const Tensor& weights,
                          Slot<T> dgate_up, Slot<T> dweights) {
    constexpr int64_t kColumns = 256;
    const int64_t F = gate_up.dim[1] / 2;
    parallel_rows(gate_up.dim[0], F * 32, [&](int64_t p) {
        const T weight = weights.defined() ? weights.as<T>()[p] : 1;
        T s[kColumns], dweight = 0;
        for (int64_t first = 0; first < F; first += kColumns) {
            const int64_t n = std::min(kColumns, F - first);
            const T* gate = gate_up.as<T>() + p * 2 * F + first;
            const T* up = gate + F;
            const T* g = dy.as<T>() + p * F + first;
            for (int64_t j = 0; j < n; j++) s[j] = logistic(gate[j]);
            dweight += lane_sum<T>(n, [&](int64_t j) { return g[j] * (gate[j] * s[j] * up[j]); });
            if (!dgate_up.data) continue;
            const Slot<T> dgate{dgate_up.data + p * 2 * F + first, dgate_up.add};
            const Slot<T> dup{dgate.data + F, dgate_up.add};
            for (int64_t j = 0; j < n; j++) dup.put(j, g[j] * weight * (gate[j] * s[j]));
            for (int64_t j = 0; j < n; j++)
                dgate.put(j, g[j] * weight * up[j] * (s[j] + gate[j] * s[j] * (1 - s[j])));
        }
        if (dweights.data) dweights.put(p, dweight);
    });
}

static void swiglu_bx(Rank& rank, Node& node) {
    float_kernel(rank, node, [&]<class T>(T*) {
        swiglu_bx_cpu(node.grad[0], node.bx_keep[0], node.bx_keep[1], writable<T>(rank, node, 0),
                      writable<T>(rank, node, 1));
    });
}

Tensor swiglu(Rank& rank, Tensor gate_up, Tensor weights, At at) {
    check(rank, "swiglu", at,
          {{"gate_up [P, 2F]", gate_up.dim.rank == 2 && gate_up.dim[1] % 2 == 0},
           {"weights [P] or undefined", !weights.defined() || weights.dim == Dims{gate_up.dim[0]}},
           {"one dtype", !weights.defined() || weights.dtype == gate_up.dtype}},
          {&gate_up, &weights});
    Tensor y = empty(rank, {gate_up.dim[0], gate_up.dim[1] / 2}, gate_up.dtype, at);
    float_kernel(rank, "swiglu", at, gate_up,
                 [&]<class T>(T*) { swiglu_cpu<T>(gate_up, weights, y); });
    if (Node* n = record(rank, "swiglu", at, {gate_up, weights}, {&y})) {
        n->bx_keep = {gate_up, weights};
        n->bx = swiglu_bx;
    }
    return y;
}

}  // namespace pith
