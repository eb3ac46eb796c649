// trainer: a run from its first step to its last checkpoint, on every rank of this process.
#pragma once
#include <map>
#include <mutex>

#include "engine/run_plan.h"
#include "observe/routing_trace.h"

namespace pith {

// What the equality of layouts is judged by; filled by all ranks of a run.
struct Probe {
  int64_t steps = 8;                          // the run ends after these
  std::mutex mutex;                           // of the maps
  vector<double> loss, norm;                  // by step; loss in nats a label
  vector<double> balance;                     // by step: mean over layers, unscaled
  std::map<string, vector<float>> gradients;  // of step 1, before clipping, by tensor
  std::map<string, vector<float>> weights;    // after the last step
  vector<RoutingStep> routing;                // by step
  double gradient_fault = 1;                  // to plant: factor on the experts' gradients
};

struct TrainOptions {
  string routing_trace, routing_replay;  // folders; empty: off
  Probe* probe = nullptr;                // no run folder, no checkpoints, no evaluation
  bool exit_on_failure = true;
};

// Trains from scratch, from model.init_from, or from the newest good checkpoint in run.folder,
// until train.steps. False if a signal stopped it, with the state saved. Exit code 2 for input that
// does not fit, 1 for a run that fails.
bool train(const RunPlan& plan, const TrainOptions& options);

}  // namespace pith
