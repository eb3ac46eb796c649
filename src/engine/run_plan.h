// run_plan: what follows from a configuration, a model and a number of ranks before any memory is
// taken: mesh, schedule, batch arithmetic, parameter counts, bytes a rank.
// defines: RunPlan, plan_run, data_options, parameter_counts, flops_per_token,
//          rank_memory
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
  Mesh mesh;
  ScheduleOptions schedule;
  BatchShape batch;
  PipelineOptions pipeline;
  DType compute = DType::F32;
  Device device = Device::CPU;
};

// Everything that can be refused is refused here, saying what to change: ranks that do not split
// over the mesh, experts over ep, layers over stages, sequences over 2*cp, the global batch over
// micro-batches, too few micro-batches for the schedule. Exit code 2.
RunPlan plan_run(const RunConfig& config, Device device, int ranks);

// How the run's samples are cut and dealt.
DataOptions data_options(const RunPlan& plan);

struct ParameterCounts {
  int64_t total = 0;
  int64_t active = 0;  // that one token uses: top_k of the experts, all of the rest
  int64_t matmul = 0;  // of the active ones, those in matrix products (embedding and norms not)
};
ParameterCounts parameter_counts(const RunPlan& plan);

// Training FLOPs a token: 6 for each matmul parameter used, and 3*S*(attention width) a layer for
// causal attention (forward 2 products over S/2 keys, backward twice that).
double flops_per_token(const RunPlan& plan);

// Bytes by kind of every rank; activations and workspace are estimates.
vector<RankMemory> rank_memory(const RunPlan& plan);

}  // namespace pith
