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

// `rank` null: without its memory.
struct PipelineOptions {
  ScheduleKind schedule = ScheduleKind::OneF1B;
  bool gather_layer = false;  // free weights after each use
  i64 length = 0;             // of the longest whole row
  double init_std = 0.02;
  Mesh mesh = {};
  int id = 0;
  Rank* rank = nullptr;
};

// By micro-batch.
struct StepIo {
  vector<Batch> batches;
  double loss_scale = 1;  // 1 / labels of the global batch
  bool force_balanced = false;
  BalanceState* balance = nullptr;       // null: no balance loss, no counts
  const RoutingSlot* routing = nullptr;  // null: no trace, no replay
  vector<double> loss;                   // with the head: sum over tokens
  vector<Tensor> logits;                 // [T, V], if the caller makes room
};

struct Instance {
  ModelShape shape;
  Parameters* parameters = nullptr;
  std::shared_ptr<Pipeline<Qwen3Moe>> qwen3_moe;
};

// Shards are zero. Exit code 2 for a config.json that is wrong or not implemented.
Instance make_instance(const Json& config, const PipelineOptions& options = {});
Instance make_instance(Rank& rank, const Json& config, PipelineOptions options);
void run_actions(Rank& rank, Instance& instance, StepIo& io, const ScheduleOptions& schedule,
    const ActionList& actions);
// Of the whole model; `target`s are null.
ParameterTable whole_table(const Json& config);

template <class M>
std::shared_ptr<Pipeline<M>> make_pipeline(
    Instance& instance, const Json& config, const PipelineOptions& options);
template <class M>
void run_pipeline(Rank& rank, Pipeline<M>& pipeline, StepIo& io, const ScheduleOptions& schedule,
    const ActionList& actions);

}
