#include "engine/pipeline.h"
#include "models/qwen3_moe.h"

namespace pith {

struct Qwen3MoePipeline {
  Pipeline<Qwen3Moe> pipeline;
};

ModelShape qwen3_moe_shape(const Json& config) {
  return Qwen3Moe::shape(Qwen3Moe::read_config(config));
}

ParameterTable qwen3_moe_table(const Json& config, double init_std) {
  return whole_table_of<Qwen3Moe>(config, init_std);
}

void make_qwen3_moe(Rank& rank, Instance& instance, const Json& config) {
  instance.qwen3_moe = std::make_shared<Qwen3MoePipeline>();
  Pipeline<Qwen3Moe>& p = instance.qwen3_moe->pipeline;
  make_pipeline(rank, p, config, instance.options);
  instance.shape = p.shape;
  instance.parameters = &p.parameters;
}

void run_qwen3_moe(Rank& rank, Qwen3MoePipeline& pipeline, StepIo& io,
                   const ScheduleOptions& schedule, const ActionList& actions) {
  run_actions(rank, pipeline.pipeline, io, schedule, actions);
}

}  // namespace pith
