// run_plan: what follows from a configuration, a model and a number of ranks before any memory is
// taken.
#pragma once
#include "core/json.h"
#include "data/dataset.h"
#include "engine/config.h"
#include "engine/instance.h"
#include "observe/report.h"

namespace pith {

struct RunPlan {
  RunConfig config;
  Json model;  // config.json
  ModelShape shape;
  i64 parameters = 0, active_parameters = 0;  // a token uses top_k of the experts
  // Of training a token: 6 a parameter in a matrix product, 3 * S * attention_width a layer.
  double flops_per_token = 0;
  Mesh mesh;
  ScheduleOptions schedule;
  BatchShape batch;
  PipelineOptions pipeline;
  Device device = Device::CPU;
  i64 step_tokens() const { return batch.global_batch * config.data.sequence_length; }
};

// Everything that can be refused is refused here, saying what to change. Exit code 2.
RunPlan plan_run(const RunConfig& config, Device device, int ranks);

// The run's token files, as its samples are cut and dealt.
Dataset open_data(const RunPlan& plan);

// Bytes by kind of every rank; activations and workspace are estimates.
vector<RankMemory> rank_memory(const RunPlan& plan);

}
