// trainer: a run from its first step to its last checkpoint, on every rank of this process.
#pragma once
#include "engine/checkpoint.h"
#include "engine/routing_slot.h"
#include "engine/run_plan.h"
#include "observe/metrics.h"
#include "observe/tensorboard.h"

namespace pith {

struct TrainOptions {
  string routing_trace, routing_replay;  // folders; empty: off
  bool exit_on_failure = true;
};
// From scratch, from model.init_from, or from the newest good checkpoint in run.folder. False if a
// signal stopped it, with the state saved. Exit code 2 for input that does not fit, 1 for a run
// that fails.
bool train(const RunPlan& plan, const TrainOptions& options);

// What the ranks share; written before they start, and by rank 0.
struct Run {
  const RunPlan& plan;
  string routing_replay;
  bool tracing = false;
  Dataset data = open_data(plan);
  RunState state;  // where the run goes on from
  std::optional<Checkpoint> resume_from;
  std::optional<WeightSource> init_from;
  std::optional<MetricsFile> metrics;
  std::optional<TensorBoardFile> tensorboard;
  RoutingStep routing;  // of the step, if traced or replayed
  bool stopped = false;
};

// Of a step, over all ranks.
struct StepTotals {
  double loss = 0;  // mean over the labels
  bool stop = false;
  vector<double> balance_loss, counts;
};

// A rank's part of the run: compute_gradients() and update() are a step.
struct Trainer {
  Trainer(Rank& rank, Run& run);
  StepTotals compute_gradients();  // leaves them reduced
  StepMetrics update(const StepTotals& totals);
  void train(const string& routing_trace);

  Rank& rank;
  Run& run;
  const RunPlan& plan = run.plan;
  const RunConfig& config = plan.config;
  Instance instance = make_instance(rank, plan.model, plan.pipeline);
  Parameters& parameters = *instance.parameters;
  ActionList actions = make_schedule(plan.schedule, rank.mesh.pp_rank);
  RunState state = run.state;
  BalanceState balance;
  std::optional<CheckpointSaver> saver;
  double step_began_s = 0;
};

}  // namespace pith
