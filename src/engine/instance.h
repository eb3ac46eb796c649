// instance: a model on a rank, whatever its architecture.
#pragma once
#include <memory>

#include "engine/balance_loss.h"
#include "engine/parameters.h"
#include "engine/schedule.h"

namespace pith {

struct Qwen3Moe;
struct RoutingSlot;
template <class M>
struct Pipeline;

// Where a rank stands, and how the model is spread. `rank` null: without its memory.
struct PipelineOptions {
  ScheduleKind schedule = ScheduleKind::OneF1B;
  bool gather_layer = false;  // free weights after each use, else gathered for the step
  i64 length = 0;             // of the longest whole row
  double init_std = 0.02;
  Mesh mesh = {};
  int id = 0;
  Rank* rank = nullptr;
};

// What goes into and comes out of running one list of actions, by micro-batch.
struct StepIo {
  vector<Batch> batches;
  double loss_scale = 1;  // of each token's gradient: 1 / labels of the global batch
  bool force_balanced = false;
  BalanceState* balance = nullptr;       // null: no balance loss, no counts
  const RoutingSlot* routing = nullptr;  // null: no trace, no replay
  vector<double> loss;                   // on ranks with the head: sum over tokens
  vector<Tensor> logits;                 // [T, V], if the caller makes room
};

struct Instance {
  ModelShape shape;
  Parameters* parameters = nullptr;  // owned by the pipeline
  std::shared_ptr<Pipeline<Qwen3Moe>> qwen3_moe;
};

// Shards are zero until initialize() or a load. Exit code 2 for a config.json that is wrong or not
// implemented.
Instance make_instance(const Json& config, const PipelineOptions& options = {});
Instance make_instance(Rank& rank, const Json& config, PipelineOptions options);
void run_actions(Rank& rank, Instance& instance, StepIo& io, const ScheduleOptions& schedule,
                 const ActionList& actions);
// Every tensor of the whole model; `target`s are null.
ParameterTable whole_table(const Json& config);

// Instantiated in engine/pipeline_<model>.cpp.
template <class M>
std::shared_ptr<Pipeline<M>> make_pipeline(Instance& instance, const Json& config,
                                           const PipelineOptions& options);
template <class M>
void run_pipeline(Rank& rank, Pipeline<M>& pipeline, StepIo& io, const ScheduleOptions& schedule,
                  const ActionList& actions);

}
