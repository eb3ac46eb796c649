// model_folder: what commands find out about a model, and its text, from the folder that holds it.
#pragma once
#include "engine/checkpoint.h"
#include "engine/config.h"
#include "engine/evaluate.h"

namespace pith {

// F32, by Hugging Face name.
vector<TensorDecl> declarations(const ParameterTable& table);

struct ModelFolder {
  Checkpoint weights;
  Json config;
  ParameterTable table;
  ModelShape shape;
  std::optional<RunConfig> run;  // that the model comes from, if known
};
// A run folder, a checkpoint, or a Hugging Face folder, whose weights are checked. Exit code 2.
ModelFolder open_model(const string& folder);

// `path`, or the tokenizer.json in it if it is a folder.
string tokenizer_file(const string& path);
// The tokenizer.json in the folder `path` or one above; empty if none.
string find_tokenizer(const string& path);

// Bits a byte of held-out text for each nat a label; 0 if no tokenizer is found with the data.
double bits_a_byte(const Dataset& data, const string& data_path);

}
