// routing_slot: how a rank takes part in tracing or replaying a step's routing.
// defines: RoutingSlot, forced_ids, trace_routing
#pragma once
#include "observe/routing_trace.h"
#include "ops/ops.h"

namespace pith {

// How a rank's micro-batches map to the step's tokens.
struct RoutingSlot {
  RoutingStep* step = nullptr;
  vector<vector<int64_t>> tokens;  // [micro-batch][local token]: index in the step
};

// I32 ids [T, k] to force on layer `layer` of a micro-batch; undefined where nothing is forced.
Tensor forced_ids(Rank& rank, const RoutingSlot& slot, int layer, int micro_batch,
                  At at = At::here());
// Copies a layer's routing into the step, where it is traced. Ranks write disjoint tokens.
void trace_routing(const RoutingSlot& slot, int layer, int micro_batch, const Routing& routing);

}  // namespace pith
