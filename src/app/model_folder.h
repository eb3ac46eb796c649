// model_folder: what commands find out about a model, and its text, from the folder that holds it.
#pragma once
#include <optional>

#include "comm/launch.h"
#include "engine/checkpoint.h"
#include "engine/config.h"
#include "engine/evaluate.h"

namespace pith {

// The config.json that came with the weights. Exit code 2 if none did.
Json model_config(const WeightSource& weights);

// A run folder, a checkpoint, or a Hugging Face folder.
struct ModelFolder {
  WeightSource weights;
  Json config;
  ModelShape shape;
  std::optional<RunConfig> run;  // that the model comes from; none for a Hugging Face folder
  int64_t length = 0;            // of a row as trained
};
// Reads and checks everything. Exit code 2.
ModelFolder open_model(const string& folder);

// Calls fn(Rank&, Instance&) with the model on one CPU rank, for rows of `length` tokens.
template <class Fn>
void with_model(const ModelFolder& model, int64_t length, Fn&& fn) {
  run_ranks(Mesh{}, Device::CPU, {.exit_on_failure = true}, [&](Rank& rank) {
    Instance instance = make_instance(rank, model.config, {.length = length});
    load_weights(rank, *instance.parameters, model.weights);
    fn(rank, instance);
  });
}

// The tokenizer.json in `path`, or in the folders above it; empty if none.
string find_tokenizer(const string& path);

// Bytes of text that a held-out label stands for; 0 if there is no tokenizer with the data.
double bytes_per_label(const Dataset& data, const string& data_path);
// nats a label -> "1.2345 nats a token, 1.2345 bits a byte"
double bits_per_byte(double nats, double bytes_per_label);  // 0 if that is not known

}  // namespace pith
