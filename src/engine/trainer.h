// trainer: a run from its first step to its last checkpoint, on every rank of this process.
// defines: TrainOptions, Probe, TrainResult, train
#pragma once
#include <map>
#include <mutex>

#include "engine/routing_trace.h"
#include "engine/run_plan.h"

namespace pith {

// What the equality of layouts is judged by; filled by all ranks of a run.
struct Probe {
  int64_t steps = 8;                          // the run ends after these
  std::mutex mutex;                           // of the maps, which ranks fill
  vector<double> loss, norm;                  // by step; loss in nats a label
  vector<double> balance;                     // by step: mean over layers, unscaled
  std::map<string, vector<float>> gradients;  // of step 1, before clipping, by tensor
  std::map<string, vector<float>> weights;    // after the last step
  vector<RoutingStep> routing;                // by step: ids, and the logit gap behind each
  double gradient_fault = 1;                  // a fault to plant: factor on the experts' gradients
};

struct TrainOptions {
  string routing_trace, routing_replay;  // folders; empty: off
  Probe* probe = nullptr;                // no run folder, no checkpoints, no evaluation
  bool exit_on_failure = true;
  bool debug = false;  // PITH_DEBUG=1
};

struct TrainResult {
  int64_t step = 0;      // optimiser steps done
  bool stopped = false;  // by a signal, with the state saved
  double loss = 0;       // of the last step, nats a label
  double eval_loss = 0;  // of the last evaluation; 0: none
};

// Trains from scratch, from model.init_from, or from the newest good checkpoint in run.folder,
// until train.steps. Exit code 2 for input that does not fit (dataset, checkpoint of another run,
// folder in use), 1 for a run that fails (not finite, disk full at the last save, lost rank).
TrainResult train(const RunPlan& plan, const TrainOptions& options);

}  // namespace pith
