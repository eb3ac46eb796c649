#include "engine/routing_slot.h"

#include <algorithm>
#include <cmath>

namespace pith {

// A token's place among the tokens of all layers.
static size_t place(const RoutingStep& step, int layer, int64_t token) {
  return size_t(layer * step.tokens + token);
}

Tensor forced_ids(Rank& rank, const RoutingSlot& slot, int layer, int micro_batch, At at) {
  const RoutingStep& step = *slot.step;
  const vector<int64_t>& tokens = slot.tokens[micro_batch];
  vector<int32_t> ids;
  if (!step.forced) return {};
  for (const int64_t token : tokens) {
    const int32_t* first = &step.ids[place(step, layer, token) * step.top_k];
    ids.insert(ids.end(), first, first + step.top_k);
  }
  if (ids.empty() || ids[0] < 0) return {};  // no tokens, or a layer without experts
  const int64_t T = int64_t(tokens.size());
  return tensor_from(rank, {T, step.top_k}, DType::I32, ids.data(), at);
}

static double element(const Tensor& t, int64_t i) {
  return t.dtype == DType::F64 ? t.as<double>()[i] : t.f32()[i];
}

void trace_routing(const RoutingSlot& slot, int layer, int micro_batch, const Routing& routing) {
  RoutingStep& step = *slot.step;
  if (!step.traced || !routing.ids.defined()) return;
  const vector<int64_t>& tokens = slot.tokens[micro_batch];
  const int64_t k = step.top_k;
  if (routing.ids.numel() != int64_t(tokens.size()) * k)
    failed("trace_routing", "need the ids of all tokens (got " + describe(routing.ids) + ")");
  const int64_t E = routing.probs.cols();
  for (size_t t = 0; t < tokens.size(); t++) {
    const int32_t* ids = routing.ids.i32() + t * k;
    const size_t to = place(step, layer, tokens[t]);
    std::copy(ids, ids + k, &step.ids[to * k]);
    for (int64_t j = 0; j < k; j++)
      step.weights[to * k + j] = float(element(routing.weights, t * k + j));
    double chosen = 1, left_out = 0;
    for (int64_t e = 0; e < E; e++) {
      const double p = element(routing.probs, t * E + e);
      if (std::find(ids, ids + k, e) == ids + k)
        left_out = std::max(left_out, p);
      else
        chosen = std::min(chosen, p);
    }
    step.gaps[to] = float(std::log(chosen) - std::log(left_out));
  }
}

}  // namespace pith
