// router.
//   grad   dprobs: what arrives at probs and, through the choice, at weights;
//          dlogits = probs (dprobs - <dprobs, probs>), dx = dlogits w, dw = dlogits^T x
#include <algorithm>

#include "ops/cpu.h"
#include "ops/ops.h"

namespace pith {

template <class T>
static T sum_at(const T* p, const int32_t* ids, int64_t k) {
  T sum = 0;
  for (int64_t j = 0; j < k; j++) sum += p[ids[j]];
  return sum;
}

Routing router(Rank& rank, Tensor x, Tensor w, RouterOptions options, At at) {
  const Op op{rank, "router", at};
  const Tensor& forced = options.forced_ids;
  const int64_t k = options.top_k, T = x.dim[0], E = w.dim[0];
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
    product<F>(x, w, {out.probs.as<F>()}, kNormal, kTransposed);
    parallel_rows(T, E * 8, [&](int64_t t) {
      F *p = row_of<F>(out.probs, t), *weights = row_of<F>(out.weights, t);
      int32_t* ids = row_of<int32_t>(out.ids, t);
      const F scale = 1 / exp_sum(p, E, max_of(p, E));
      for (int64_t e = 0; e < E; e++) p[e] *= scale;
      if (forced.defined())
        std::copy_n(row_of<int32_t>(forced, t), k, ids);
      else if (options.force_balanced)
        for (int64_t j = 0; j < k; j++) ids[j] = int32_t((t + j * (E / k)) % E);
      else
        largest(p, E, k, ids);
      const F divisor = options.normalize ? sum_at(p, ids, k) : 1;
      for (int64_t j = 0; j < k; j++) weights[j] = p[ids[j]] / divisor;
    });
  });
  record(op, {x, w}, {&out.weights, &out.probs})
      .numbers({options.normalize})
      .bx({w, out.probs, out.ids},
          []<class F>(Backward<F> b) {
            const Tensor &dweights = b.dy(0), &dprobs = b.dy(1), d = b.op().like(b.keep[1]);
            const int64_t experts = d.dim[1], chosen = b.keep[2].dim[1];
            const bool normalize = b.node.i[0];
            parallel_rows(d.dim[0], experts * 4, [&](int64_t t) {
              const F* p = row_of<F>(b.keep[1], t);
              const int32_t* id = row_of<int32_t>(b.keep[2], t);
              F* row = row_of<F>(d, t);
              std::fill_n(row, experts, F(0));
              if (dprobs.defined()) std::copy_n(row_of<F>(dprobs, t), experts, row);
              if (dweights.defined()) {
                const F* g = row_of<F>(dweights, t);
                const F total = normalize ? sum_at(p, id, chosen) : 1;
                F mean = 0;
                for (int64_t j = 0; normalize && j < chosen; j++) mean += g[j] * (p[id[j]] / total);
                for (int64_t j = 0; j < chosen; j++) row[id[j]] += (g[j] - mean) / total;
              }
              const F along = dot(row, p, experts);
              for (int64_t e = 0; e < experts; e++) row[e] = p[e] * (row[e] - along);
            });
            product(d, b.keep[0], b.to(0));
            b.node.bw_keep.push(d);
          })
      .bw(1, {x}, [](const auto& b) { product(b.keep[1], b.keep[0], b.to(1), kTransposed); });
  return out;
}

}  // namespace pith
