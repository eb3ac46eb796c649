// router, grouped_linear, swiglu.
//   in     x [T, D] or [P, D], w [E, D] or [E, out, in], gate_up [P, 2F]; f32|f64, one dtype
//   grad   router: dprobs is what arrives at probs and, through the choice, at weights; dlogits =
//          probs (dprobs - <dprobs, probs>), dx = dlogits w, dw = dlogits^T x;
//          dx = dy w[e], dw[e] = dy^T x over the expert's rows;
//          dweights = sum over the row of dy silu(gate) up
//   errors shapes; dtypes differ; offsets, rows or pairs that do not fit; k outside [1, E];
//          a forced id outside [0, E), or twice in a row

#include <algorithm>

#include "ops/cpu.h"

namespace pith {
namespace {

template <class T>
T sum_at(const T* p, const int* ids, i64 k) {
  T sum = 0;
  for (i64 j = 0; j < k; j++) sum += p[ids[j]];
  return sum;
}

// f(e, begin, end) for each expert and its rows; `work`: multiply-adds in all.
template <class F>
void each_expert(const Tensor& offsets, i64 work, F&& f) {
  const i64 E = offsets.dim[0] - 1;
  const int* begin = offsets.i32();
#pragma omp parallel for schedule(dynamic) if (E > 1 && work > kParallelProduct)
  for (i64 e = 0; e < E; e++) f(e, begin[e], begin[e + 1]);
}

// PERF: one loop an output, for vector instructions, over a stretch whose sigmoids are kept.
template <class T>
void swiglu_bx_cpu(const Tensor& dy, const Tensor& gate_up, const Tensor& weights, Slot<T> dgate_up,
                   Slot<T> dweights) {
  constexpr i64 kColumns = 256;
  const i64 F = dy.dim[1];
  parallel_rows(dy.dim[0], F * 32, [&](i64 p) {
    const T weight = weights.defined() ? weights.as<T>()[p] : 1;
    T s[kColumns], dweight = 0;
    for (i64 first = 0; first < F; first += kColumns) {
      const i64 n = min(kColumns, F - first);
      const T *gate = row_of<T>(gate_up, p) + first, *up = gate + F;
      const T* g = row_of<T>(dy, p) + first;
      for (i64 j = 0; j < n; j++) s[j] = logistic(gate[j]);
      dweight += lane_sum<T>(n, [&](i64 j) { return g[j] * (gate[j] * s[j] * up[j]); });
      if (!dgate_up.data) continue;
      const Slot<T> dgate = dgate_up.from(p * 2 * F + first), dup = dgate.from(F);
      for (i64 j = 0; j < n; j++) dup.put(j, g[j] * weight * (gate[j] * s[j]));
      for (i64 j = 0; j < n; j++)
        dgate.put(j, g[j] * weight * up[j] * (s[j] + gate[j] * s[j] * (1 - s[j])));
    }
    if (dweights.data) dweights.put(p, dweight);
  });
}

}

Routing router(Rank& rank, Tensor x, Tensor w, RouterOptions options, At at) {
  const Op op{rank, "router", at};
  const Tensor& forced = options.forced_ids;
  const i64 k = options.top_k, T = x.dim[0], E = w.dim[0];
  op.check(
      {{"x [T, D] and w [E, D]", x.dim.rank == 2 && w.dim.rank == 2 && x.dim[1] == w.dim[1]},
       {"one dtype", x.dtype == w.dtype},
       {"top_k in [1, E]", k >= 1 && k <= E},
       {"forced_ids I32 [T, k] or undefined", !forced.defined() || is_i32(forced, {T, k})},
       {"forced_ids or force_balanced, not both", !forced.defined() || !options.force_balanced}},
      {&x, &w, &forced});
  Routing out{op.empty({T, k}, DType::I32), op.empty({T, k}, x.dtype), op.empty({T, E}, x.dtype)};
  op.on_cpu(x, [&]<class F>(F*) {
    if (forced.defined()) op.check_ids("forced_ids", forced, E);
    product<F>(op, x, w, {out.probs.as<F>()}, kNormal, kTransposed);
    parallel_rows(T, E * 8, [&](i64 t) {
      F *p = row_of<F>(out.probs, t), *weights = row_of<F>(out.weights, t);
      int* ids = row_of<int>(out.ids, t);
      const F scale = 1 / exp_sum(p, E, max_of(p, E));
      for (i64 e = 0; e < E; e++) p[e] *= scale;
      if (forced.defined())
        std::copy_n(row_of<int>(forced, t), k, ids);
      else if (options.force_balanced)
        for (i64 j = 0; j < k; j++) ids[j] = int((t + j * (E / k)) % E);
      else
        largest(p, E, k, ids);
      const F divisor = options.normalize ? sum_at(p, ids, k) : 1;
      for (i64 j = 0; j < k; j++) weights[j] = p[ids[j]] / divisor;
    });
  });
  record(op, {x, w}, {&out.weights, &out.probs})
      .numbers({options.normalize})
      .bx({w, out.probs, out.ids},
          []<class F>(Backward<F> b) {
            const Tensor &dweights = b.dy(0), &dprobs = b.dy(1), d = b.op().like(b.keep[1]);
            const i64 experts = d.dim[1], chosen = b.keep[2].dim[1];
            const bool normalize = b.node.i[0];
            parallel_rows(d.dim[0], experts * 4, [&](i64 t) {
              const F* p = row_of<F>(b.keep[1], t);
              const int* id = row_of<int>(b.keep[2], t);
              F* row = row_of<F>(d, t);
              std::fill_n(row, experts, F(0));
              if (dprobs.defined()) std::copy_n(row_of<F>(dprobs, t), experts, row);
              if (dweights.defined()) {
                const F* g = row_of<F>(dweights, t);
                const F total = normalize ? sum_at(p, id, chosen) : 1;
                F mean = 0;
                for (i64 j = 0; normalize && j < chosen; j++) mean += g[j] * (p[id[j]] / total);
                for (i64 j = 0; j < chosen; j++) row[id[j]] += (g[j] - mean) / total;
              }
              const F along = dot(row, p, experts);
              for (i64 e = 0; e < experts; e++) row[e] = p[e] * (row[e] - along);
            });
            product(b.op(), d, b.keep[0], b.to(0));
            b.node.bw_keep.push(d);
          })
      .bw(1, {x},
          [](const auto& b) { product(b.op(), b.keep[1], b.keep[0], b.to(1), kTransposed); });
  return out;
}

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
    each_expert(offsets, x.numel() * w.dim[1], [&](i64 e, i64 r, i64 end) {
      product<T>(op, x.slice_rows(r, end), w.slice_rows(e, e + 1), {row_of<T>(y, r)}, kNormal,
                 kTransposed);
    });
  });
  record(op, {x, w}, {&y})
      .bx({w, offsets},
          []<class T>(Backward<T> b) {
            const Slot<T> dx = b.to(0);
            const i64 in = b.keep[0].dim[2];
            each_expert(b.keep[1], b.dy().numel() * in, [&](i64 e, i64 r, i64 end) {
              product(b.op(), b.dy().slice_rows(r, end), b.keep[0].slice_rows(e, e + 1),
                      dx.from(r * in));
            });
          })
      .bw(1, {x, offsets}, []<class T>(Backward<T> b) {
        const Slot<T> dw = b.to(1);
        const i64 in = b.keep[0].dim[1], size = in * b.dy().dim[1];
        each_expert(b.keep[1], b.dy().numel() * in, [&](i64 e, i64 r, i64 end) {
          product(b.op(), b.dy().slice_rows(r, end), b.keep[0].slice_rows(r, end),
                  dw.from(e * size), kTransposed);
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
    parallel_rows(y.dim[0], F * 16, [&](i64 p) {
      const T *gate = row_of<T>(gate_up, p), *up = gate + F;
      const T weight = weights.defined() ? weights.as<T>()[p] : 1;
      T* out = row_of<T>(y, p);
      for (i64 j = 0; j < F; j++) out[j] = gate[j] * logistic(gate[j]) * up[j] * weight;
    });
  });
  record(op, {gate_up, weights}, {&y}).bx({gate_up, weights}, [](const auto& b) {
    swiglu_bx_cpu(b.dy(), b.keep[0], b.keep[1], b.to(0), b.to(1));
  });
  return y;
}

}
