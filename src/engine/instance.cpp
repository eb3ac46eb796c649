#include "engine/instance.h"

#include "comm/communicator.h"

namespace pith {

Instance make_instance(const Json& config, const PipelineOptions& options) {
  Instance instance;
  string type = config["model_type"].as_string();
  if (type == "qwen3_moe")
    instance.qwen3_moe = make_pipeline<Qwen3Moe>(instance, config, options);
  else
    bad_input(config.place() + ": model_type",
        "is not implemented (got \"" + type + "\", need \"qwen3_moe\")",
        "a model of an implemented type");
  return instance;
}

Instance make_instance(Rank& rank, const Json& config, PipelineOptions options) {
  options.mesh = mesh_of(rank);
  options.id = rank.id;
  options.rank = &rank;
  return make_instance(config, options);
}

void run_actions(Rank& rank, Instance& instance, StepIo& io, const ScheduleOptions& schedule,
    const ActionList& actions) {
  if (instance.qwen3_moe) run_pipeline(rank, *instance.qwen3_moe, io, schedule, actions);
}

ParameterTable whole_table(const Json& config) {
  const Instance whole = make_instance(config);
  ParameterTable table = whole.parameters->table;
  for (Parameter& p : table) p.target = nullptr;
  return table;
}

}
