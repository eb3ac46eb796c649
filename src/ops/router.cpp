// router: probs = softmax(x w^T) over all experts; ids = the k largest (ties: the lower expert), or
// forced ones; weights = probs at ids, divided by their sum if `normalize`.
//   in     x [T, D]   w [E, D]   f32|f64, one dtype   forced_ids I32 [T, k] or undefined
//   out    ids I32 [T, k]   weights [T, k]   probs [T, E]
//   keeps  bx: w, probs, ids   bw: x and the logits' gradient, which bx leaves there
//   grad   dprobs is the sum of what arrives at probs and, through the choice, at weights;
//          dlogits = probs (dprobs - <dprobs, probs>)   bx: dx += dlogits w   bw: dw += dlogits^T x
//   errors shapes; k outside [1, E]; a forced id outside [0, E); forced twice; dtypes differ
//   bitwise run-to-run: yes, for any number of threads
#include <algorithm>

#include "ops/layer_parts.h"
#include "ops/ops.h"

namespace pith {

// The k largest of p [E] in descending order. Every comparison with a NaN fails, so that ids are k
// different experts even then.
template <class T>
static void choose_largest(const T* p, int64_t E, int k, int32_t* ids) {
  int held = 0;
  for (int32_t e = 0; e < E; e++) {
    if (held == k && !(p[e] > p[ids[k - 1]])) continue;
    int place = held < k ? held++ : k - 1;
    for (; place > 0 && p[e] > p[ids[place - 1]]; place--) ids[place] = ids[place - 1];
    ids[place] = e;
  }
}

template <class T>
static T sum_at(const T* p, const int32_t* ids, int k) {
  T sum = 0;
  for (int j = 0; j < k; j++) sum += p[ids[j]];
  return sum;
}

template <class T>
static void router_cpu(const Tensor& x, const Tensor& w, const RouterOptions& o,
                       const Routing& out) {
  const int64_t E = w.dim[0];
  const int k = o.top_k;
  linear_y<T>(x, w, {out.probs.as<T>()});
  parallel_rows(x.dim[0], E * 8, [&](int64_t t) {
    T* p = out.probs.as<T>() + t * E;
    T* weights = out.weights.as<T>() + t * k;
    int32_t* ids = out.ids.i32() + t * k;
    const T scale = 1 / exp_sum(p, E, max_of(p, E));
    for (int64_t e = 0; e < E; e++) p[e] *= scale;
    if (o.forced_ids.defined())
      std::copy_n(o.forced_ids.i32() + t * k, k, ids);
    else if (o.force_balanced)
      for (int j = 0; j < k; j++) ids[j] = int32_t((t + j * (E / k)) % E);
    else
      choose_largest(p, E, k, ids);
    const T divisor = o.normalize ? sum_at(p, ids, k) : 1;
    for (int j = 0; j < k; j++) weights[j] = p[ids[j]] / divisor;
  });
}

// d [T, E] = the logits' gradient. Either of dweights and dprobs may be undefined.
template <class T>
static void router_logits_grad(const Tensor& dweights, const Tensor& dprobs, const Tensor& probs,
                               const Tensor& ids, bool normalize, T* d) {
  const int64_t E = probs.dim[1];
  const int k = int(ids.dim[1]);
  parallel_rows(probs.dim[0], E * 4, [&](int64_t t) {
    const T* p = probs.as<T>() + t * E;
    const int32_t* id = ids.i32() + t * k;
    T* row = d + t * E;
    std::fill_n(row, E, T(0));
    if (dprobs.defined()) std::copy_n(dprobs.as<T>() + t * E, E, row);
    if (dweights.defined()) {
      const T* g = dweights.as<T>() + t * k;
      const T sum = normalize ? sum_at(p, id, k) : 1;
      T mean = 0;
      for (int j = 0; normalize && j < k; j++) mean += g[j] * (p[id[j]] / sum);
      for (int j = 0; j < k; j++) row[id[j]] += (g[j] - mean) / sum;
    }
    const T along = dot(row, p, E);
    for (int64_t e = 0; e < E; e++) row[e] = p[e] * (row[e] - along);
  });
}

static void router_bx(Rank& rank, Node& node) {
  const Tensor &w = node.bx_keep[0], &probs = node.bx_keep[1], &ids = node.bx_keep[2];
  const Tensor d = empty(rank, probs.dim, probs.dtype, node.at);
  float_kernel(rank, node, [&]<class T>(T*) {
    router_logits_grad<T>(node.grad[0], node.grad[1], probs, ids, node.i[0], d.as<T>());
    linear_dx(d, w, writable<T>(rank, node, 0));
  });
  node.bw_keep.push(d);
}

static void router_bw(Rank& rank, Node& node) {
  float_kernel(rank, node, [&]<class T>(T*) {
    linear_dw(node.bw_keep[1], node.bw_keep[0], writable<T>(rank, node, 1));
  });
}

Routing router(Rank& rank, Tensor x, Tensor w, RouterOptions options, At at) {
  const Tensor& forced = options.forced_ids;
  const int64_t k = options.top_k;
  const int64_t T = x.dim[0], E = w.dim[0];
  check(rank, "router", at,
        {{"x [T, D] and w [E, D]", x.dim.rank == 2 && w.dim.rank == 2 && x.dim[1] == w.dim[1]},
         {"one dtype", x.dtype == w.dtype},
         {"top_k in [1, E]", k >= 1 && k <= E},
         {"forced_ids I32 [T, k] or undefined",
          !forced.defined() || (forced.dtype == DType::I32 && forced.dim == Dims{T, k})},
         {"forced_ids or force_balanced, not both", !forced.defined() || !options.force_balanced}},
        {&x, &w, &forced});
  Routing out{empty(rank, {T, k}, DType::I32, at), empty(rank, {T, k}, x.dtype, at),
              empty(rank, {T, E}, x.dtype, at)};
  float_kernel(rank, "router", at, x, [&]<class F>(F*) {
    if (forced.defined()) check_ids(rank, "router", at, "forced_ids", forced, E);
    router_cpu<F>(x, w, options, out);
  });
  if (Node* n = record(rank, "router", at, {x, w}, {&out.weights, &out.probs})) {
    n->bx_keep = {w, out.probs, out.ids};
    n->bw_keep = {x};
    n->i[0] = options.normalize;
    set_backward<router_bx, router_bw>(*n, {1});
  }
  return out;
}

}  // namespace pith
