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
static void softmax_row(T* row, int64_t n) {
    const T scale = 1 / exp_sum(row, n, max_of(row, n));
    for (int64_t j = 0; j < n; j++) row[j] *= scale;
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
    const int64_t tokens = x.dim[0], D = x.dim[1], E = w.dim[0];
    const int k = o.top_k;
    gemm<T>(tokens, E, D, {x.as<T>(), D}, {w.as<T>(), D, Layout::Transposed}, 0, out.probs.as<T>(),
            E);
    parallel_rows(tokens, E * 8, [&](int64_t t) {
        T* p = out.probs.as<T>() + t * E;
        T* weights = out.weights.as<T>() + t * k;
        int32_t* ids = out.ids.i32() + t * k;
        softmax_row(p, E);
        if (o.forced_ids.defined())
            std::copy_n(o.forced_ids.i32() + t * k, k, ids);
        else if (o.force_balanced)
            for (int j = 0; j < k; j++) ids[j] = static_cast<int32_t>((t + j * (E / k)) % E);
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
    const int k = static_cast<int>(ids.dim[1]);
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
    const int64_t tokens = probs.dim[0], E = probs.dim[1], D = w.dim[1];
    const Tensor d = empty(rank, probs.dim, probs.dtype, node.at);
    float_kernel(rank, node.op, node.at, probs, [&]<class T>(T*) {
        router_logits_grad<T>(node.grad[0], node.grad[1], probs, ids, node.i[0], d.as<T>());
        const Slot<T> dx = writable<T>(rank, node.in[0], node.at);
        if (dx.data)
            gemm<T>(tokens, D, E, {d.as<T>(), E}, {w.as<T>(), D}, dx.add ? 1 : 0, dx.data, D);
    });
    node.bw_keep.push(d);
}

static void router_bw(Rank& rank, Node* const* nodes, int n) {
    for (int i = 0; i < n; i++) {
        const Node& node = *nodes[i];
        const Tensor &x = node.bw_keep[0], &d = node.bw_keep[1];
        const int64_t tokens = x.dim[0], E = d.dim[1], D = x.dim[1];
        float_kernel(rank, node.op, node.at, x, [&]<class T>(T*) {
            const Slot<T> dw = writable<T>(rank, node.in[1], node.at);
            if (dw.data)
                gemm<T>(E, D, tokens, {d.as<T>(), E, Layout::Transposed}, {x.as<T>(), D},
                        dw.add ? 1 : 0, dw.data, D);
        });
    }
}

Routing router(Rank& rank, Tensor x, Tensor w, RouterOptions options, At at) {
    const Tensor& forced = options.forced_ids;
    const int64_t k = options.top_k;
    check(
        rank, "router", at,
        {{"x [T, D] and w [E, D]", x.dim.rank == 2 && w.dim.rank == 2 && x.dim[1] == w.dim[1]},
         {"one dtype", x.dtype == w.dtype},
         {"top_k in [1, E]", k >= 1 && k <= w.dim[0]},
         {"forced_ids I32 [T, k] or undefined",
          !forced.defined() || (forced.dtype == DType::I32 && forced.dim == Dims{x.dim[0], k})},
         {"forced_ids or force_balanced, not both", !forced.defined() || !options.force_balanced}},
        {&x, &w, &forced});
    Routing out{empty(rank, {x.dim[0], k}, DType::I32, at), empty(rank, {x.dim[0], k}, x.dtype, at),
                empty(rank, {x.dim[0], w.dim[0]}, x.dtype, at)};
    float_kernel(rank, "router", at, x, [&]<class T>(T*) {
        if (forced.defined()) check_ids(rank, "router", at, "forced_ids", forced, w.dim[0]);
        router_cpu<T>(x, w, options, out);
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
