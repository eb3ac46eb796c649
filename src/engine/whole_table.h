// whole_table: the parameter table of a whole model without a rank that runs it, for what reads and
// writes weights. defines: whole_table
#pragma once
#include "models/model.h"

namespace pith {

// Every tensor of the model that a config.json describes, on one stage with all experts. Targets are
// null. Exit code 2 for a model type that is not implemented, or a configuration that is not.
ParameterTable whole_table(const Json& config);

}  // namespace pith
