// router.
//   grad   dprobs: what arrives at probs and, through the choice, at weights;
//          dlogits = probs (dprobs - <dprobs, probs>), dx = dlogits w, dw = dlogits^T x
#include <algorithm>

#include "ops/cpu.h"
#include "ops/ops.h"

namespace pith {
namespace {

template <class T>
T sum_at(const T* p, const int32_t* ids, int64_t k) {
  T sum = 0;
  for (int64_t j = 0; j < k; j++) sum += p[ids[j]];
  return sum;
}

template <class T>
void router_cpu(const Tensor& x, const Tensor& w, const RouterOptions& o, const Routing& out) {
  const int64_t E = w.dim[0], k = o.top_k;
  linear_y<T>(x, w, {out.probs.as<T>()});
  parallel_rows(x.dim[0], E * 8, [&](int64_t t) {
    T *p = row_of<T>(out.probs, t), *weights = row_of<T>(out.weights, t);
    int32_t* ids = row_of<int32_t>(out.ids, t);
    const T scale = 1 / exp_sum(p, E, max_of(p, E));
    for (int64_t e = 0; e < E; e++) p[e] *= scale;
    if (o.forced_ids.defined())
      std::copy_n(row_of<int32_t>(o.forced_ids, t), k, ids);
    else if (o.force_balanced)
      for (int64_t j = 0; j < k; j++) ids[j] = int32_t((t + j * (E / k)) % E);
    else
      largest(p, E, k, ids);
    const T divisor = o.normalize ? sum_at(p, ids, k) : 1;
    for (int64_t j = 0; j < k; j++) weights[j] = p[ids[j]] / divisor;
  });
}

// d [T, E] = the logits' gradient.
template <class T>
void router_logits_grad(const Tensor& dweights, const Tensor& dprobs, const Tensor& probs,
                        const Tensor& ids, bool normalize, const Tensor& d) {
  const int64_t E = probs.dim[1], k = ids.dim[1];
  parallel_rows(probs.dim[0], E * 4, [&](int64_t t) {
    const T* p = row_of<T>(probs, t);
    const int32_t* id = row_of<int32_t>(ids, t);
    T* row = row_of<T>(d, t);
    std::fill_n(row, E, T(0));
    if (dprobs.defined()) std::copy_n(row_of<T>(dprobs, t), E, row);
    if (dweights.defined()) {
      const T* g = row_of<T>(dweights, t);
      const T sum = normalize ? sum_at(p, id, k) : 1;
      T mean = 0;
      for (int64_t j = 0; normalize && j < k; j++) mean += g[j] * (p[id[j]] / sum);
      for (int64_t j = 0; j < k; j++) row[id[j]] += (g[j] - mean) / sum;
    }
    const T along = dot(row, p, E);
    for (int64_t e = 0; e < E; e++) row[e] = p[e] * (row[e] - along);
  });
}

}  // namespace

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
    router_cpu<F>(x, w, options, out);
  });
  op.record({x, w}, {&out.weights, &out.probs})
      .numbers({options.normalize})
      .bx({w, out.probs, out.ids},
          []<class F>(const Backward<F>& b) {
            const Tensor &probs = b.keep[1], d = b.op().like(probs);
            router_logits_grad<F>(b.dy(0), b.dy(1), probs, b.keep[2], b.node.i[0], d);
            linear_dx(d, b.keep[0], b.to(0));
            b.node.bw_keep.push(d);
          })
      .bw(1, {x}, [](const auto& b) { linear_dw(b.keep[1], b.keep[0], b.to(1)); });
  return out;
}

}  // namespace pith
