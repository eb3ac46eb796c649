// run_plan: what follows from a configuration, a model and a number of ranks before any memory is
// taken.
#pragma once
#include "core/json.h"
#include "data/dataset.h"
#include "engine/config.h"
#include "engine/instance.h"
#include "observe/memory_report.h"

namespace pith {

struct RunPlan {
  RunConfig config;
  Json model;  // config.json
  ModelShape shape;
  Mesh mesh;
  ScheduleOptions schedule;
  BatchShape batch;
  PipelineOptions pipeline;
  DType compute = DType::F32;
  Device device = Device::CPU;
  int64_t step_tokens() const { return batch.global_batch * config.data.sequence_length; }
};

// Everything that can be refused is refused here, saying what to change. Exit code 2.
RunPlan plan_run(const RunConfig& config, Device device, int ranks);

// The run's token files, as its samples are cut and dealt.
Dataset open_data(const RunPlan& plan);

struct ParameterCounts {
  int64_t total = 0;
  int64_t active = 0;  // that one token uses: top_k of the experts, all of the rest
};
ParameterCounts parameter_counts(const RunPlan& plan);

// Bytes by kind of every rank; activations and workspace are estimates.
vector<RankMemory> rank_memory(const RunPlan& plan);

}  // namespace pith
