// model_folder: what eval and generate find out about a model from the folder that holds it.
// defines: model_config, run_config_of, tokenizer_of
#pragma once
#include <optional>

#include "engine/checkpoint.h"
#include "engine/config.h"
#include "engine/instance.h"

namespace pith {

// The config.json that came with the weights. Exit code 2 if none did.
Json model_config(const Checkpoint& weights);

// The configuration of the run that a run folder or a checkpoint in it belongs to; none for a
// Hugging Face folder.
std::optional<RunConfig> run_config_of(const string& folder);

// The tokenizer.json of a model: given, in its folder, or beside its run's data. Exit code 2 if
// there is none.
string tokenizer_of(const string& folder, const string& given);

}  // namespace pith
