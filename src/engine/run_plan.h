#pragma once
#include "core/json.h"
#include "data/dataset.h"
#include "engine/config.h"
#include "engine/instance.h"
#include "observe/report.h"

namespace pith {

struct RunPlan {
  RunConfig config;
  Json model;
  ModelShape shape;
  i64 parameters = 0, active_parameters = 0;  // a token uses top_k of the experts
  // 6 a matrix product's parameter, 3 * S * attention_width a layer.
  double flops_per_token = 0;
  Mesh mesh;
  ScheduleOptions schedule;
  BatchShape batch;
  PipelineOptions pipeline;
  Device device = Device::CPU;
  DType compute = DType::F32;
  i64 step_tokens() const { return batch.global_batch * config.data.sequence_length; }
};

// Refuses what does not fit.
RunPlan plan_run(const RunConfig& config, Device device, int ranks);

Dataset open_data(const RunPlan& plan);

// Activations and workspace are estimates.
vector<RankMemory> rank_memory(const RunPlan& plan);

}
