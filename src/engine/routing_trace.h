// routing_trace: which experts each token chose, step by step, as .npy files that can be replayed:
//   DIR/step-00000001.ids.npy      I32 [layers, tokens, k]: expert ids; -1 in layers without
//   DIR/step-00000001.weights.npy  F32 [layers, tokens, k]: routing weights
// Steps count from 1; tokens are the global batch's, in order: the same files in every layout.
#pragma once
#include "ops/ops.h"

namespace pith {

// A step's routing over the whole global batch: one, of which each rank writes its own tokens.
struct RoutingStep {
  i64 layers = 0, tokens = 0, top_k = 0;
  vector<int> ids;        // [layers, tokens, k]
  vector<float> weights;  // [layers, tokens, k]
  vector<float> gaps;     // [layers, tokens]: logit of the last expert chosen, less the next one's
  bool forced = false;    // ids were read and are to be used
  bool traced = false;    // ids and weights are to be filled in
};

// Makes room for a step to trace.
void begin_trace(RoutingStep& routing, i64 layers, i64 tokens, i64 top_k);
void write_routing(const string& folder, i64 step, const RoutingStep& routing);
// Fills ids and sets `forced`. Exit code 2 for a file that does not fit the shape of `routing` or
// does not name distinct experts in [0, num_experts).
void read_routing(const string& folder, i64 step, int num_experts, RoutingStep& routing);

// How a rank's micro-batches map to the step's tokens.
struct RoutingSlot {
  RoutingStep* step = nullptr;
  vector<vector<i64>> tokens;  // [micro-batch][local token]: index in the step
};
// I32 ids [T, k] to force on a layer of a micro-batch; undefined where nothing is forced.
Tensor forced_ids(Rank& rank, const RoutingSlot& slot, int layer, int micro_batch);
// Copies a layer's routing into the step, where it is traced.
void trace_routing(const RoutingSlot& slot, int layer, int micro_batch, const Routing& routing);

}
