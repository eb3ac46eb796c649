// generate: pith generate.
#include <cstdio>

#include "app/arguments.h"
#include "app/commands.h"
#include "app/model_folder.h"
#include "comm/launch.h"
#include "core/process.h"
#include "data/tokenizer.h"
#include "engine/evaluate.h"

namespace pith {

namespace {
// Prints text as it grows. A character whose bytes are not all there yet waits for the next token.
struct Printer {
  const Tokenizer& tokenizer;
  vector<uint32_t> ids;
  size_t printed = 0;
  void add(int32_t token) {
    ids.push_back(uint32_t(token));
    print(tokenizer.decode(ids, SpecialTokens::Keep), false);
  }
  void print(const string& all, bool end) {
    const string pending = "\xEF\xBF\xBD";
    size_t ready = all.size();
    if (!end && all.ends_with(pending)) ready -= pending.size();
    if (ready <= printed) return;
    fwrite(all.data() + printed, 1, ready - printed, stdout);
    fflush(stdout);
    printed = ready;
  }
};
}  // namespace

int run_generate(int argc, char** argv) {
  Arguments args("pith generate", "Continues a text.");
  string model, prompt, tokenizer_path;
  SampleOptions options;
  int64_t window = 0, seed = 0;
  args.positional("model", model, "run folder, step-NNNNNNNN, or Hugging Face folder");
  args.option("--prompt", prompt, "text to continue; empty: from the end-of-text token");
  args.option("--tokenizer", tokenizer_path, "default: found with the model");
  args.option("--max-new-tokens", options.max_new_tokens, "tokens to add", 0, 1 << 20);
  args.option("--temperature", options.temperature, "0: always the most likely token", 0, 100);
  args.option("--top-p", options.top_p, "sample from the likeliest tokens of this mass", 0, 1);
  args.option("--seed", seed, "of the sampling", 0, INT64_MAX);
  args.option("--window", window, "tokens the model looks back on; 0: its trained length", 0,
              1 << 24);
  if (!args.parse(argc, argv)) return kExitDone;
  options.seed = uint64_t(seed);
  const Checkpoint weights = open_weights(model);
  const Json config = model_config(weights);
  const Tokenizer tokenizer = Tokenizer::load(tokenizer_of(model, tokenizer_path));
  const ModelShape shape = model_shape(config);
  if (int64_t(tokenizer.vocab_size()) > shape.vocab)
    bad_input(model,
              text("has a smaller vocabulary than the tokenizer (got %ld, need at least "
                   "%u)",
                   shape.vocab, tokenizer.vocab_size()),
              "the tokenizer that the model was trained with");
  if (window == 0) {
    const std::optional<RunConfig> run = run_config_of(model);
    window = run ? run->data.sequence_length : std::min<int64_t>(shape.max_positions, 2048);
  }
  vector<uint32_t> ids;
  EncodeScratch scratch;
  tokenizer.encode(prompt, ids, {}, scratch);
  if (const auto eos = tokenizer.eos_id()) {
    options.stop_token = int64_t(*eos);
    if (ids.empty()) ids.push_back(*eos);
  }
  if (ids.empty())
    bad_input("--prompt", "is empty, and the tokenizer names no end-of-text token",
              "--prompt TEXT");
  check_weights(weights, whole_table(config));
  printf("%s", prompt.c_str());
  Printer printer{tokenizer, {}};
  run_ranks(Mesh{}, Device::CPU, {.exit_on_failure = true}, [&](Rank& rank) {
    Instance instance = make_instance(rank, config, {.length = window});
    load_weights(rank, *instance.parameters, weights);
    generate(
        rank, instance, {ids.begin(), ids.end()}, window, options,
        [](void* p, int32_t token) {
          static_cast<Printer*>(p)->add(token);
          return !stop_requested();
        },
        &printer);
  });
  printer.print(tokenizer.decode(printer.ids, SpecialTokens::Keep), true);
  printf("\n");
  return stop_requested() ? kExitStopped : kExitDone;
}

}  // namespace pith
