#pragma once
#include "engine/checkpoint.h"
#include "engine/routing_trace.h"
#include "engine/run_plan.h"
#include "observe/metrics.h"

namespace pith {

struct TrainOptions {
  string routing_trace, routing_replay;  // folders; empty: off
  i64 profile_step = 0;
  bool exit_on_failure = true;
};
// From scratch, model.init_from, or the newest good checkpoint in run.folder. False if a signal
// stopped it, with the state saved. Exit code 2 for input that does not fit, 1 for a failed run.
bool train(const RunPlan& plan, const TrainOptions& options);

// Of 0-based step s. Warm-up takes round(warmup_ratio * steps) steps, the decay the last
// round(decay_ratio * steps) of "wsd", all the rest of "cosine". Half to even.
double learning_rate(const LrSchedule& schedule, double peak, i64 s, i64 steps);
// Updates each unit after the save under way (null: none) has copied it.
void optimizer_pass(
    Rank& rank, Parameters& parameters, const AdamW& options, CheckpointSaver* saver);

// Shared; written before the ranks start, and by rank 0.
struct Run {
  const RunPlan& plan;
  string routing_replay;
  bool tracing = false;
  Dataset data = open_data(plan);
  RunState state;
  std::optional<Checkpoint> resume_from;
  std::optional<Checkpoint> init_from;
  string metrics, events;  // paths
  RoutingStep routing;     // of the step, if traced or replayed
  bool stopped = false;
};

// A rank's part. A step: compute_gradients(), which leaves them reduced, and update().
struct Trainer {
  Trainer(Rank& rank, Run& run);
  StepMetrics compute_gradients();
  void update(StepMetrics& metrics);
  void train(const TrainOptions& options);

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
  vector<double> counts;  // BalanceState::counts of all ranks
  double step_began_s = 0;
  bool stop = false;
};

}
