#include "engine/routing_slot.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace pith {

// Where a token's k values of a layer begin in the step's arrays.
static size_t place(const RoutingStep& step, int layer, int64_t token) {
    return static_cast<size_t>((layer * step.tokens + token) * step.top_k);
}

Tensor forced_ids(Rank& rank, const RoutingSlot& slot, int layer, int micro_batch, At at) {
    const RoutingStep& step = *slot.step;
    const std::vector<int64_t>& tokens = slot.tokens[static_cast<size_t>(micro_batch)];
    if (!step.forced || tokens.empty() || step.ids[place(step, layer, tokens[0])] < 0) return {};
    std::vector<int32_t> ids;
    for (const int64_t token : tokens) {
        const auto first = step.ids.begin() + static_cast<int64_t>(place(step, layer, token));
        ids.insert(ids.end(), first, first + step.top_k);
    }
    const int64_t T = static_cast<int64_t>(tokens.size());
    return tensor_from(rank, {T, step.top_k}, DType::I32, ids.data(), at);
}

// How far the choice of a token is from another one, in router logits.
template <class T>
static float logit_gap(const T* probs, int64_t num_experts, const int32_t* ids, int64_t k) {
    T chosen = 1, left_out = 0;
    for (int64_t e = 0; e < num_experts; e++) {
        if (std::find(ids, ids + k, e) == ids + k)
            left_out = std::max(left_out, probs[e]);
        else
            chosen = std::min(chosen, probs[e]);
    }
    return static_cast<float>(std::log(chosen) - std::log(left_out));
}

void trace_routing(const RoutingSlot& slot, int layer, int micro_batch, const Routing& routing) {
    RoutingStep& step = *slot.step;
    if (!step.traced || !routing.ids.defined()) return;
    const std::vector<int64_t>& tokens = slot.tokens[static_cast<size_t>(micro_batch)];
    const int64_t k = step.top_k, T = static_cast<int64_t>(tokens.size());
    const Tensor& ids = routing.ids;
    const Tensor& weights = routing.weights;
    if (ids.numel() != T * k || weights.numel() != T * k || ids.device != Device::CPU)
        failed("trace_routing", text("need host ids and weights [%lld, %lld] (got %s; %s)",
                                     static_cast<long long>(T), static_cast<long long>(k),
                                     describe(ids).c_str(), describe(weights).c_str()));
    const int64_t E = routing.probs.cols();
    for (int64_t t = 0; t < T; t++) {
        const size_t first = place(step, layer, tokens[static_cast<size_t>(t)]);
        step.gaps[first / static_cast<size_t>(k)] =
            routing.probs.dtype == DType::F64
                ? logit_gap(routing.probs.as<double>() + t * E, E, ids.i32() + t * k, k)
                : logit_gap(routing.probs.f32() + t * E, E, ids.i32() + t * k, k);
        for (int64_t j = 0; j < k; j++) {
            const size_t at = first + static_cast<size_t>(j);
            step.ids[at] = ids.i32()[t * k + j];
            step.weights[at] = weights.dtype == DType::F64
                                   ? static_cast<float>(weights.as<double>()[t * k + j])
                                   : weights.f32()[t * k + j];
        }
    }
}

}  // namespace pith
