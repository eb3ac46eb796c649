// grouped_linear, swiglu.
//   grad   dx = dy w[e], dw[e] = dy^T x over the expert's rows;
//          dweights = sum over the row of dy silu(gate) up
#include <algorithm>

#include "ops/cpu.h"
#include "ops/ops.h"

namespace pith {
namespace {

// f(e, begin, end) for each expert and its rows; `work`: multiply-adds in all.
template <class F>
void each_expert(const Tensor& offsets, int64_t work, F&& f) {
  const int64_t E = offsets.dim[0] - 1;
  const int32_t* begin = offsets.i32();
#pragma omp parallel for schedule(dynamic) if (E > 1 && work > kParallelProduct)
  for (int64_t e = 0; e < E; e++) f(e, begin[e], begin[e + 1]);
}

// PERF: one loop an output, over a stretch whose sigmoids are kept: two outputs in one loop become
// no vector instructions.
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
      const Slot<T> dgate = dgate_up.from(p * 2 * F + first), dup = dgate.from(F);
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
       {"offsets I32 [E+1]", is_i32(offsets, {w.dim[0] + 1})},
       {"one dtype", x.dtype == w.dtype}},
      {&x, &w, &offsets});
  Tensor y = op.empty({x.dim[0], w.dim[1]}, x.dtype);
  op.on_cpu(x, [&]<class T>(T*) {
    op.check_offsets("offsets", offsets, x.dim[0]);
    each_expert(offsets, x.numel() * w.dim[1], [&](int64_t e, int64_t r, int64_t end) {
      product<T>(x.slice_rows(r, end), w.slice_rows(e, e + 1), {row_of<T>(y, r)}, kNormal,
                 kTransposed);
    });
  });
  record(op, {x, w}, {&y})
      .bx({w, offsets},
          []<class T>(Backward<T> b) {
            const Slot<T> dx = b.to(0);
            const int64_t in = b.keep[0].dim[2];
            each_expert(b.keep[1], b.dy().numel() * in, [&](int64_t e, int64_t r, int64_t end) {
              product(b.dy().slice_rows(r, end), b.keep[0].slice_rows(e, e + 1), dx.from(r * in));
            });
          })
      .bw(1, {x, offsets}, []<class T>(Backward<T> b) {
        const Slot<T> dw = b.to(1);
        const int64_t in = b.keep[0].dim[1], size = in * b.dy().dim[1];
        each_expert(b.keep[1], b.dy().numel() * in, [&](int64_t e, int64_t r, int64_t end) {
          product(b.dy().slice_rows(r, end), b.keep[0].slice_rows(r, end), dw.from(e * size),
                  kTransposed);
        });
      });
  return y;
}

Tensor swiglu(Rank& rank, Tensor gate_up, Tensor weights, At at) {
  const Op op{rank, "swiglu", at};
  op.check({{"gate_up [P, 2F]", gate_up.dim.rank == 2 && gate_up.dim[1] % 2 == 0},
            {"weights [P] or undefined", !weights.defined() || weights.dim == Dims{gate_up.dim[0]}},
            {"one dtype", one_dtype({&gate_up, &weights})}},
           {&gate_up, &weights});
  Tensor y = op.empty({gate_up.dim[0], gate_up.dim[1] / 2}, gate_up.dtype);
  op.on_cpu(gate_up, [&, F = y.dim[1]]<class T>(T*) {
    parallel_rows(y.dim[0], F * 16, [&](int64_t p) {
      const T *gate = row_of<T>(gate_up, p), *up = gate + F;
      const T weight = weights.defined() ? weights.as<T>()[p] : 1;
      T* out = row_of<T>(y, p);
      for (int64_t j = 0; j < F; j++) out[j] = gate[j] * logistic(gate[j]) * up[j] * weight;
    });
  });
  record(op, {gate_up, weights}, {&y}).bx({gate_up, weights}, [](const auto& b) {
    swiglu_bx_cpu(b.dy(), b.keep[0], b.keep[1], b.to(0), b.to(1));
  });
  return y;
}

}  // namespace pith
