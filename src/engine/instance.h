// instance: a model on a rank, whatever its architecture. The one switch on `model_type` is here;
// behind it every call is direct.
// defines: ModelType, model_type, model_shape, whole_table, PipelineOptions, StepIo, Instance,
//          make_instance, run_actions
#pragma once
#include <memory>

#include "engine/balance_loss.h"
#include "engine/parameters.h"
#include "engine/schedule.h"
#include "models/model.h"

namespace pith {

struct RoutingSlot;

enum class ModelType : uint8_t { Qwen3Moe };
// Of a config.json; exit code 2 for one that is not implemented, naming those that are.
ModelType model_type(const Json& config);
// Reads and validates the whole config.json.
ModelShape model_shape(const Json& config);
// Every tensor of the whole model. Its `target`s are null: it is for names, shapes and counts.
ParameterTable whole_table(const Json& config, double init_std = 0.02);

// How a model is spread over ranks and time.
struct PipelineOptions {
  ScheduleKind schedule = ScheduleKind::OneF1B;
  bool gather_layer = false;  // free weights after each use, else gathered for the step
  int64_t length = 0;         // of the longest whole row, for position tables
  double init_std = 0.02;
};

// What goes into and comes out of running one list of actions.
struct StepIo {
  vector<Batch> batches;  // by micro-batch
  double loss_scale = 1;  // of each token's gradient: 1 / labels of the global batch
  bool forward_only = false;
  bool force_balanced = false;
  BalanceState* balance = nullptr;       // null: no balance loss, no counts
  const RoutingSlot* routing = nullptr;  // trace to write or replay; null: none
  vector<double> loss;    // out, by micro-batch, on ranks with the head: sum over tokens
  vector<Tensor> logits;  // out, by micro-batch, if want_logits: [T, V]
  bool want_logits = false;
};

// Defined in engine/pipeline_<model>.cpp, the one instantiation of engine/pipeline.h for it.
struct Qwen3MoePipeline;

struct Instance {
  ModelType type = ModelType::Qwen3Moe;
  ModelShape shape;
  PipelineOptions options;
  Parameters* parameters = nullptr;             // of this rank's stages; owned by the pipeline
  std::shared_ptr<Qwen3MoePipeline> qwen3_moe;  // the one of `type` is set
};

// Lays out this rank's stages and allocates their shards; weights are zero until initialize() or a
// load. Exit code 2 for a config.json that cannot be run on this mesh.
Instance make_instance(Rank& rank, const Json& config, const PipelineOptions& options);
// Runs this rank's list; see engine/pipeline.h.
void run_actions(Rank& rank, Instance& instance, StepIo& io, const ScheduleOptions& schedule,
                 const ActionList& actions);

// --- of each model, in engine/pipeline_<model>.cpp ---
ModelShape qwen3_moe_shape(const Json& config);
ParameterTable qwen3_moe_table(const Json& config, double init_std);
void make_qwen3_moe(Rank& rank, Instance& instance, const Json& config);
void run_qwen3_moe(Rank& rank, Qwen3MoePipeline& pipeline, StepIo& io,
                   const ScheduleOptions& schedule, const ActionList& actions);

}  // namespace pith
