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
#include "ops/grouped.h"

namespace pith {
namespace {

template <class T>
T sum_at(const T* p, const int* ids, i64 k) {
  T sum = 0;
  for (i64 j = 0; j < k; j++) sum += p[ids[j]];
  return sum;
}

// f(e, begin, end) for each expert and its rows; `work`: multiply-adds in all. Waits for a GPU.
template <class F>
void each_expert(Rank& rank, const Tensor& offsets, i64 work, F&& f) {
  i64 E = offsets.dim[0] - 1;
  vector<char> bytes;
  Tensor host = on_host(rank, offsets, bytes);
  const int* begin = host.i32();
  bool threads = E > 1 && work > kParallelProduct && offsets.device == Device::CPU;
#pragma omp parallel for schedule(dynamic) if (threads)
  for (i64 e = 0; e < E; e++) f(e, begin[e], begin[e + 1]);
}

// Whether CUTLASS's product by expert serves.
bool grouped(const Tensor& x, i64 in, i64 out) {
  return kCuda && x.dtype == DType::BF16 && grouped_fits(in, out);
}

// PERF: one loop an output, for vector instructions, over a stretch whose sigmoids are kept.
template <class T>
void swiglu_bx_cpu(const Tensor& dy, const Tensor& gate_up, const Tensor& weights, Slot<T> dgate_up,
                   Slot<T> dweights) {
  constexpr i64 kColumns = 256;
  i64 F = dy.dim[1];
  parallel_rows(dy.dim[0], F * 32, [&](i64 p) {
    T weight = weights.defined() ? weights.as<T>()[p] : 1;
    T s[kColumns], dweight = 0;
    for (i64 first = 0; first < F; first += kColumns) {
      i64 n = min(kColumns, F - first);
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
  Op op{rank, "router", at};
  const Tensor& forced = options.forced_ids;
  i64 k = options.top_k, T = x.dim[0], E = w.dim[0];
  op.check(
      {{"x [T, D] and w [E, D]", x.dim.rank == 2 && w.dim.rank == 2 && x.dim[1] == w.dim[1]},
       {"one dtype", x.dtype == w.dtype},
       {"top_k in [1, E]", k >= 1 && k <= E},
       {"forced_ids I32 [T, k] or undefined", !forced.defined() || is_i32(forced, {T, k})},
       {"forced_ids or force_balanced, not both", !forced.defined() || !options.force_balanced}},
      {&x, &w, &forced});
  DType dtype = wide(x.dtype);
  Routing out{op.empty({T, k}, DType::I32), op.empty({T, k}, dtype), op.empty({T, E}, dtype)};
  if (forced.defined()) op.check_ids("forced_ids", forced, E);
  op.typed(x, [&]<class F>(F*) { product<F>(op, x, w, {out.probs}, kNormal, kTransposed); });
  auto route = [&]<class F>(F*) {
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
  };
  op.run(out.probs, route, [&]<class F>(F*) { OnCuda<F>::route(rank, options, out); });
  record(op, {x, w}, {&out.weights, &out.probs})
      .numbers({options.normalize})
      .bx(
          {w, out.probs, out.ids},
          []<class F>(Backward<F> b) {
            const Tensor &dweights = b.dy(0), &dprobs = b.dy(1), d = b.op().like(b.keep[1]);
            i64 experts = d.dim[1], chosen = b.keep[2].dim[1];
            bool normalize = b.node.i[0];
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
            product<F>(b.op(), d, b.keep[0], b.slot(0));
            b.node.bw_keep.push(d);
          },
          []<class F>(Backward<F> b) {
            using Wide = std::conditional_t<std::is_same_v<F, BF16>, float, F>;
            Tensor d = b.op().empty(b.keep[1].dim, b.node.in[0].dtype);
            OnCuda<Wide>::template route_grad<F>(b.rank, b.node.i[0], b.keep, b.dy(0), b.dy(1), d);
            product<F>(b.op(), d, b.keep[0], b.slot(0));
            b.node.bw_keep.push(d);
          })
      .bw(1, {x}, []<class F>(Backward<F> b) {
        product<F>(b.op(), b.keep[1], b.keep[0], b.slot(1), kTransposed);
      });
  return out;
}

Tensor grouped_linear(Rank& rank, Tensor x, Tensor w, Tensor offsets, At at) {
  Op op{rank, "grouped_linear", at};
  op.check(
      {{"x [P, in] and w [E, out, in]", x.dim.rank == 2 && w.dim.rank == 3 && x.dim[1] == w.dim[2]},
       {"offsets I32 [E+1]", is_i32(offsets, {w.dim[0] + 1})},
       {"one dtype", x.dtype == w.dtype}},
      {&x, &w, &offsets});
  Tensor y = op.empty({x.dim[0], w.dim[1]}, x.dtype);
  op.check_offsets("offsets", offsets, x.dim[0]);
  op.typed(x, [&]<class T>(T*) {
    if (grouped(x, w.cols(), w.dim[1])) return grouped_forward(rank, x, w, offsets, y);
    each_expert(rank, offsets, x.numel() * w.dim[1], [&](i64 e, i64 r, i64 end) {
      product<T>(op, x.slice_rows(r, end), w.slice_rows(e, e + 1), {y.slice_rows(r, end)}, kNormal,
                 kTransposed);
    });
  });
  record(op, {x, w}, {&y})
      .bx({w, offsets},
          []<class T>(Backward<T> b) {
            GradSlot dx = b.slot(0);
            if (!dx.grad.defined()) return;
            if (!dx.add && grouped(b.dy(), b.dy().cols(), dx.grad.cols()))
              return grouped_input_grad(b.rank, b.dy(), b.keep[0], b.keep[1], dx.grad);
            each_expert(
                b.rank, b.keep[1], b.dy().numel() * dx.grad.cols(), [&](i64 e, i64 r, i64 end) {
                  product<T>(b.op(), b.dy().slice_rows(r, end), b.keep[0].slice_rows(e, e + 1),
                             {dx.grad.slice_rows(r, end), dx.add});
                });
          })
      .bw(1, {x, offsets}, []<class T>(Backward<T> b) {
        GradSlot dw = b.slot(1);
        const Tensor &rows = b.keep[0], &begin = b.keep[1];
        if (!dw.grad.defined()) return;
        if (dw.add && dw.grad.dtype == DType::F32 && grouped(b.dy(), rows.cols(), b.dy().cols()))
          return grouped_weight_grad(b.rank, b.dy(), rows, begin, dw.grad);
        each_expert(b.rank, begin, b.dy().numel() * rows.cols(), [&](i64 e, i64 r, i64 end) {
          product<T>(b.op(), b.dy().slice_rows(r, end), rows.slice_rows(r, end),
                     {dw.grad.slice_rows(e, e + 1), dw.add}, kTransposed);
        });
      });
  return y;
}

Tensor swiglu(Rank& rank, Tensor gate_up, Tensor weights, At at) {
  Op op{rank, "swiglu", at};
  op.check({{"gate_up [P, 2F]", gate_up.dim.rank == 2 && gate_up.dim[1] % 2 == 0},
            {"weights [P], f32 with bf16, or undefined",
             !weights.defined() ||
                 (weights.dim == Dims{gate_up.dim[0]} && weights.dtype == wide(gate_up.dtype))}},
           {&gate_up, &weights});
  Tensor y = op.empty({gate_up.dim[0], gate_up.dim[1] / 2}, gate_up.dtype);
  auto on_cpu = [&, F = y.dim[1]]<class T>(T*) {
    parallel_rows(y.dim[0], F * 16, [&](i64 p) {
      const T *gate = row_of<T>(gate_up, p), *up = gate + F;
      T weight = weights.defined() ? weights.as<T>()[p] : 1;
      T* out = row_of<T>(y, p);
      for (i64 j = 0; j < F; j++) out[j] = gate[j] * logistic(gate[j]) * up[j] * weight;
    });
  };
  op.run(gate_up, on_cpu, [&]<class T>(T*) { OnCuda<T>::swiglu(rank, gate_up, weights, y); });
  record(op, {gate_up, weights}, {&y})
      .bx(
          {gate_up, weights},
          [](const auto& b) { swiglu_bx_cpu(b.dy(), b.keep[0], b.keep[1], b.to(0), b.to(1)); },
          []<class T>(Backward<T> b) {
            Tensor d = b.op().like(b.keep[0]), &in = b.node.in[1];
            Tensor dweights = in.needs_grad() ? b.op().like(b.keep[1]) : Tensor{};
            OnCuda<T>::swiglu_grad(b.rank, b.dy(), b.keep, d, dweights);
            add_grad(b.rank, b.node.in[0], d);
            if (in.needs_grad()) add_grad(b.rank, in, dweights);
          });
  return y;
}

}
