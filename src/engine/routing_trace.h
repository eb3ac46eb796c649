// DIR/step-00000001.ids.npy (I32) and .weights.npy (F32): [layers, tokens, k], tokens in the order
// of the global batch.
#pragma once
#include "ops/ops.h"

namespace pith {

// Of the global batch; each rank writes its own tokens.
struct RoutingStep {
  i64 layers = 0, tokens = 0, top_k = 0;
  vector<int> ids;        // [layers, tokens, k]; -1 in layers without experts
  vector<float> weights;  // [layers, tokens, k]
  vector<float> gaps;     // [layers, tokens]: logit of the last expert chosen less the next
  bool forced = false;
};

void begin_trace(RoutingStep& routing, i64 layers, i64 tokens, i64 top_k);
void write_routing(const string& folder, i64 step, const RoutingStep& routing);
// Exit code 2 for what does not fit the shape of `routing`.
void read_routing(const string& folder, i64 step, int num_experts, RoutingStep& routing);

struct RoutingSlot {
  RoutingStep* step = nullptr;
  vector<vector<i64>> tokens;  // [micro-batch][local token]: index in the step
};
// I32 [T, k]; undefined where nothing is forced.
Tensor forced_ids(Rank& rank, const RoutingSlot& slot, int layer, int micro_batch);
void trace_routing(
    Rank& rank, const RoutingSlot& slot, int layer, int micro_batch, Routing routing);

}
