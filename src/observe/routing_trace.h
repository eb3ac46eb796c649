// routing_trace: which experts each token chose, step by step, as .npy files that can be replayed.
//
//   DIR/step-00000001.ids.npy      I32 [layers, tokens, k]: expert ids
//   DIR/step-00000001.weights.npy  F32 [layers, tokens, k]: routing weights
// Steps count from 1; tokens are those of the global batch, sequence after sequence in batch order,
// so the files are the same for every layout.
// defines: RoutingStep, RoutingSlot, forced_ids, trace_routing, write_routing, read_routing
#pragma once
#include <string>
#include <vector>

#include "core/tensor.h"

namespace pith {

struct Routing;

// A step's routing over the whole global batch. One, shared by the ranks of a process, each of which
// writes its own tokens.
struct RoutingStep {
    int64_t layers = 0, tokens = 0, top_k = 0;
    std::vector<int32_t> ids;    // [layers, tokens, k]
    std::vector<float> weights;  // [layers, tokens, k]
    bool forced = false;         // ids were read and are to be used
    bool traced = false;         // ids and weights are to be filled in
};

// How a rank's micro-batches map to the step's tokens.
struct RoutingSlot {
    RoutingStep* step = nullptr;
    std::vector<std::vector<int64_t>> tokens;  // [micro-batch][local token]: index in the step
};

// Ids [T, k] to force on a layer of a micro-batch, or an undefined tensor.
Tensor forced_ids(Rank& rank, const RoutingSlot& slot, int layer, int micro_batch);
void trace_routing(const RoutingSlot& slot, int layer, int micro_batch, const Routing& routing);

// Durable; `step` counts from 1.
void write_routing(const std::string& folder, int64_t step, const RoutingStep& routing);
// Fills routing.ids. Exit code 2 if the file is missing, damaged, of another shape, or names an
// expert outside [0, num_experts).
void read_routing(const std::string& folder, int64_t step, int num_experts, RoutingStep& routing);

}  // namespace pith
