#include "engine/pipeline.h"
#include "models/qwen3_moe.h"

namespace pith {

template std::shared_ptr<Pipeline<Qwen3Moe>> make_pipeline(
    Instance&, const Json&, const PipelineOptions&);
template void run_pipeline(
    Rank&, Pipeline<Qwen3Moe>&, StepIo&, const ScheduleOptions&, const ActionList&);

}
