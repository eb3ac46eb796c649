// grouped_linear: rows [offsets[e], offsets[e+1]) of y are those of x times w[e]^T.
//   in     f32|f64, one dtype          keeps  bx: w, offsets   bw: x, offsets
//   grad   bx: dx += dy w[e]   bw: dw[e] += dy^T x over the expert's rows
//   errors shapes; dtypes differ; offsets that do not ascend from 0 to P               bitwise yes
// swiglu: y = silu(gate) * up * weight of the row.
//   in     f32|f64, one dtype          keeps  bx: both
//   grad   bx: dgate_up +=, dweights += sum over the row of dy silu(gate) up
#include <algorithm>

#include "ops/cpu.h"
#include "ops/ops.h"

namespace pith {
namespace {

// f(e, begin, rows, col, cols) for each expert, its rows, and blocks of `width` columns, on all
// threads. `work`: multiply-adds in all.
template <class F>
void expert_columns(const Tensor& offsets, int64_t width, int64_t work, F&& f) {
  constexpr int64_t kCols = 384;  // those of gemm's own tiles
  const int64_t blocks = (width + kCols - 1) / kCols, tasks = (offsets.dim[0] - 1) * blocks;
#pragma omp parallel for schedule(dynamic) if (tasks > 1 && work > kParallelProduct)
  for (int64_t task = 0; task < tasks; task++) {
    const int64_t e = task / blocks, col = task % blocks * kCols;
    const int64_t begin = offsets.i32()[e], end = offsets.i32()[e + 1];
    f(e, begin, end - begin, col, std::min(kCols, width - col));
  }
}

// y [P, width]: an expert's rows = or += those of x times w[e], stored [width, depth] if
// Transposed, else [depth, width].
template <class T>
void grouped_product(const Tensor& x, const Tensor& w, Layout layout, const Tensor& offsets,
                     Slot<T> y) {
  const bool transposed = layout == Layout::Transposed;
  const int64_t depth = x.dim[1], width = w.dim[transposed ? 1 : 2];
  const int64_t ld = w.dim[2], across = transposed ? ld : 1;
  if (!y.data) return;
  expert_columns(offsets, width, x.dim[0] * width * depth,
                 [&](int64_t e, int64_t begin, int64_t rows, int64_t col, int64_t cols) {
                   gemm<T>(rows, cols, depth, {x.as<T>() + begin * depth, depth},
                           {w.as<T>() + e * width * depth + col * across, ld, layout}, y.add,
                           y.data + begin * width + col, width);
                 });
}

template <class T>
void grouped_dw(const Tensor& dy, const Tensor& x, const Tensor& offsets, Slot<T> dw) {
  const int64_t out = dy.dim[1], in = x.dim[1];
  if (!dw.data) return;
  expert_columns(offsets, in, x.dim[0] * out * in,
                 [&](int64_t e, int64_t begin, int64_t rows, int64_t col, int64_t cols) {
                   gemm<T>(out, cols, rows, {dy.as<T>() + begin * out, out, Layout::Transposed},
                           {x.as<T>() + begin * in + col, in}, dw.add, dw.data + e * out * in + col,
                           in);
                 });
}

template <class T>
void swiglu_cpu(const Tensor& gate_up, const Tensor& weights, const Tensor& y) {
  const int64_t F = y.dim[1];
  parallel_rows(y.dim[0], F * 16, [&](int64_t p) {
    const T *gate = row_of<T>(gate_up, p), *up = gate + F;
    const T weight = weights.defined() ? weights.as<T>()[p] : 1;
    T* out = row_of<T>(y, p);
    for (int64_t j = 0; j < F; j++) out[j] = gate[j] * logistic(gate[j]) * up[j] * weight;
  });
}

// PERF: one loop an output, over a stretch whose sigmoids are kept: with both outputs in one loop
// the compiler makes no vector instructions.
template <class T>
void swiglu_bx_cpu(const Tensor& dy, const Tensor& gate_up, const Tensor& weights, Slot<T> dgate_up,
                   Slot<T> dweights) {
  constexpr int64_t kColumns = 256;
  const int64_t F = dy.dim[1];
  parallel_rows(dy.dim[0], F * 32, [&](int64_t p) {
    const T weight = weights.defined() ? weights.as<T>()[p] : 1;
    T s[kColumns], dweight = 0;
    for (int64_t first = 0; first < F; first += kColumns) {
      const int64_t n = std::min(kColumns, F - first);
      const T *gate = row_of<T>(gate_up, p) + first, *up = gate + F;
      const T* g = row_of<T>(dy, p) + first;
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

}  // namespace

Tensor grouped_linear(Rank& rank, Tensor x, Tensor w, Tensor offsets, At at) {
  const Op op{rank, "grouped_linear", at};
  op.check(
      {{"x [P, in] and w [E, out, in]", x.dim.rank == 2 && w.dim.rank == 3 && x.dim[1] == w.dim[2]},
       {"offsets I32 [E+1]", offsets.dtype == DType::I32 && offsets.dim == Dims{w.dim[0] + 1}},
       {"one dtype", x.dtype == w.dtype}},
      {&x, &w, &offsets});
  Tensor y = op.empty({x.dim[0], w.dim[1]}, x.dtype);
  op.on_cpu(x, [&]<class T>(T*) {
    const int32_t *begin = offsets.i32(), *last = begin + w.dim[0];
    op.check({{"offsets ascending from 0 to P",
               *begin == 0 && *last == x.dim[0] && std::is_sorted(begin, last + 1)}},
             {&offsets, &x});
    grouped_product<T>(x, w, Layout::Transposed, offsets, {y.as<T>()});
  });
  op.record({x, w}, {&y})
      .bx({w, offsets},
          [](const auto& b) {
            grouped_product(b.dy(), b.keep[0], Layout::Normal, b.keep[1], b.to(0));
          })
      .bw(1, {x, offsets},
          [](const auto& b) { grouped_dw(b.dy(), b.keep[0], b.keep[1], b.to(1)); });
  return y;
}

Tensor swiglu(Rank& rank, Tensor gate_up, Tensor weights, At at) {
  const Op op{rank, "swiglu", at};
  op.check({{"gate_up [P, 2F]", gate_up.dim.rank == 2 && gate_up.dim[1] % 2 == 0},
            {"weights [P] or undefined", !weights.defined() || weights.dim == Dims{gate_up.dim[0]}},
            {"one dtype", !weights.defined() || weights.dtype == gate_up.dtype}},
           {&gate_up, &weights});
  Tensor y = op.empty({gate_up.dim[0], gate_up.dim[1] / 2}, gate_up.dtype);
  op.on_cpu(gate_up, [&]<class T>(T*) { swiglu_cpu<T>(gate_up, weights, y); });
  op.record({gate_up, weights}, {&y}).bx({gate_up, weights}, [](const auto& b) {
    swiglu_bx_cpu(b.dy(), b.keep[0], b.keep[1], b.to(0), b.to(1));
  });
  return y;
}

}  // namespace pith
