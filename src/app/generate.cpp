// generate: pith generate.
#include "app/arguments.h"
#include "app/commands.h"
#include "app/model_folder.h"
#include "core/log.h"
#include "core/process.h"
#include "data/tokenizer.h"

namespace pith {

int run_generate(int argc, char** argv) {
  Arguments args("pith generate", "Continues a text.");
  string folder, prompt, tokenizer_path;
  SampleOptions options;
  i64 count = 128, seed = 0;
  args.positional("model", folder, "run folder, step-NNNNNNNN, or Hugging Face folder");
  args.option("--prompt", prompt, "text to continue; empty: from the end-of-text token");
  args.option("--tokenizer", tokenizer_path, "default: found with the model");
  args.option("--max-new-tokens", count, "tokens to add", 0, 1 << 20);
  args.option("--temperature", options.temperature, "0: always the most likely token", 0, 100);
  args.option("--top-p", options.top_p, "sample from the likeliest tokens of this mass", 0, 1);
  args.option("--seed", seed, "of the sampling", 0, INT64_MAX);
  if (!args.parse(argc, argv)) return kExitDone;
  options.seed = u64(seed);
  const ModelFolder model = open_model(folder);
  if (tokenizer_path.empty()) tokenizer_path = find_tokenizer(folder);
  if (tokenizer_path.empty() && model.run) tokenizer_path = find_tokenizer(model.run->data.path);
  if (tokenizer_path.empty()) bad_input(folder, "has no tokenizer.json", "--tokenizer PATH");
  const Tokenizer tokenizer = Tokenizer::load(tokenizer_file(tokenizer_path));
  if (i64(tokenizer.vocab_size()) > model.shape.vocab)
    bad_input(folder,
              text("has a smaller vocabulary than the tokenizer (got %ld, need at least %u)",
                   model.shape.vocab, tokenizer.vocab_size()),
              "the tokenizer that the model was trained with");
  vector<u32> ids;
  EncodeScratch scratch;
  tokenizer.encode(prompt, ids, {}, scratch);
  const auto eos = tokenizer.eos_id;
  if (ids.empty() && eos) ids.push_back(*eos);
  if (ids.empty())
    bad_input("--prompt", "is empty, and the tokenizer names no end-of-text token",
              "--prompt TEXT");
  const size_t given = ids.size();
  Progress progress("generating", double(count), "tokens");
  with_model(model, model.length, [&](Rank& rank, Instance& instance) {
    for (i64 i = 0; i < count && !stop_requested(); i++) {
      const auto seen = ids.end() - min<i64>(i64(ids.size()), model.length);
      const auto token = u32(next_token(rank, instance, {seen, ids.end()}, options, i));
      if (token == eos) break;
      ids.push_back(token);
      progress.update(double(i + 1));
    }
  });
  ids.erase(ids.begin(), ids.begin() + given);
  printf("%s%s\n", prompt.c_str(), tokenizer.decode(ids, SpecialTokens::Keep).c_str());
  return stop_requested() ? kExitStopped : kExitDone;
}

}
