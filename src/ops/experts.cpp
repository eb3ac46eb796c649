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

// y[r] = or += the sum of x[index[i]] over i in [begin[r], begin[r+1]), or of x[index[r]] where
// begin is undefined.
template <class T>
static void sum_rows_cpu(const Tensor& x, const Tensor& index, const Tensor& begin, Slot<T> y) {
  const int64_t D = x.dim[1], rows = begin.defined() ? begin.dim[0] - 1 : index.dim[0];
  if (!y.data) return;
  parallel_rows(rows, D * (1 + index.dim[0] / std::max<int64_t>(1, rows)), [&](int64_t r) {
    const int64_t first = begin.defined() ? begin.i32()[r] : r;
    const int64_t end = begin.defined() ? begin.i32()[r + 1] : r + 1;
    T* to = y.data + r * D;
    if (!y.add) std::fill_n(to, D, T(0));
    for (int64_t i = first; i < end; i++) {
      const T* from = x.as<T>() + index.i32()[i] * D;
      for (int64_t j = 0; j < D; j++) to[j] += from[j];
    }
  });
}

static bool ascends(const Tensor& t, int64_t last) {
  const int32_t *begin = t.i32(), *end = begin + t.numel();
  return begin != end && *begin == 0 && end[-1] == last && std::is_sorted(begin, end);
}

static void move_rows_bx(Rank& rank, Node& node) {
  float_kernel(rank, node, [&]<class T>(T*) {
    sum_rows_cpu(node.grad[0], node.bx_keep[0], node.bx_keep[1], writable<T>(rank, node, 0));
  });
}

// Both ops. `need` tells x's shape.
static Tensor move_rows(Rank& rank, const char* op, bool to_pairs, const char* need,
                        const Tensor& x, const Dispatched& d, At at) {
  const int64_t P = d.row_of.dim[0], R = d.row_begin.dim[0] - 1;
  const bool i32 = d.row_of.dtype == DType::I32 && d.pair_of.dtype == DType::I32 &&
                   d.row_begin.dtype == DType::I32;
  check(rank, op, at,
        {{"row_of I32 [P], pair_of I32 [P] and row_begin I32 [R+1]",
          i32 && d.row_of.dim == Dims{P} && d.pair_of.dim == Dims{P} &&
              d.row_begin.dim == Dims{R + 1}},
         {need, x.dim.rank == 2 && x.dim[0] == (to_pairs ? R : P)}},
        {&x, &d.row_of, &d.pair_of, &d.row_begin});
  Tensor y = empty(rank, {to_pairs ? P : R, x.dim[1]}, x.dtype, at);
  const TensorList pairs = {d.row_of, {}}, rows = {d.pair_of, d.row_begin};
  const TensorList &index = to_pairs ? pairs : rows, &back = to_pairs ? rows : pairs;
  float_kernel(rank, op, at, x, [&]<class T>(T*) {
    check(rank, op, at, {{"row_begin ascending from 0 to P", ascends(d.row_begin, P)}},
          {&d.row_begin, &d.row_of});
    check_ids(rank, op, at, "row_of", d.row_of, R);
    check_ids(rank, op, at, "pair_of", d.pair_of, P);
    sum_rows_cpu<T>(x, index[0], index[1], {y.as<T>()});
  });
  if (Node* n = record(rank, op, at, {x}, {&y})) {
    n->bx_keep = back;
    n->bx = move_rows_bx;
  }
  return y;
}

Tensor expand_rows(Rank& rank, const Dispatched& d, At at) {
  return move_rows(rank, "expand_rows", true, "rows [R, D]", d.rows, d, at);
}

Tensor reduce_pairs(Rank& rank, Tensor y, const Dispatched& d, At at) {
  return move_rows(rank, "reduce_pairs", false, "y [P, D]", y, d, at);
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
                   const T* part = w.as<T>() + e * width * depth + col * (transposed ? depth : 1);
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
  check(
      rank, "grouped_linear", at,
      {{"x [P, in] and w [E, out, in]", x.dim.rank == 2 && w.dim.rank == 3 && x.dim[1] == w.dim[2]},
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
