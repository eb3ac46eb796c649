#include "engine/instance.h"

namespace pith {

ModelType model_type(const Json& config) {
  const string name = config["model_type"].as_string();
  if (name == "qwen3_moe") return ModelType::Qwen3Moe;
  bad_input(config.place() + ": model_type",
            text("is not implemented (got \"%s\", need \"qwen3_moe\")", name.c_str()),
            "a model of an implemented type");
}

ModelShape model_shape(const Json& config) {
  switch (model_type(config)) {
    case ModelType::Qwen3Moe: return qwen3_moe_shape(config);
  }
  return {};
}

ParameterTable whole_table(const Json& config, double init_std) {
  switch (model_type(config)) {
    case ModelType::Qwen3Moe: return qwen3_moe_table(config, init_std);
  }
  return {};
}

Instance make_instance(Rank& rank, const Json& config, const PipelineOptions& options) {
  Instance instance;
  instance.type = model_type(config);
  instance.options = options;
  switch (instance.type) {
    case ModelType::Qwen3Moe: make_qwen3_moe(rank, instance, config); break;
  }
  return instance;
}

void run_actions(Rank& rank, Instance& instance, StepIo& io, const ScheduleOptions& schedule,
                 const ActionList& actions) {
  switch (instance.type) {
    case ModelType::Qwen3Moe:
      return run_qwen3_moe(rank, *instance.qwen3_moe, io, schedule, actions);
  }
}

}  // namespace pith
