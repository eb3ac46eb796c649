// generate: pith generate.
#include <cstdio>
#include <filesystem>

#include "app/arguments.h"
#include "app/commands.h"
#include "app/model_folder.h"
#include "core/process.h"
#include "data/tokenizer.h"

namespace pith {

// Prints what a text has grown by. A character whose bytes are not all there yet waits for the next
// token.
static void print_on(const string& text, size_t& printed, bool end) {
  const string_view pending = "\xEF\xBF\xBD";
  const size_t ready = text.size() - (!end && text.ends_with(pending) ? pending.size() : 0);
  if (ready <= printed) return;
  fwrite(text.data() + printed, 1, ready - printed, stdout);
  fflush(stdout);
  printed = ready;
}

static string tokenizer_of(const string& folder, const ModelFolder& model, const string& given) {
  string path = given.empty() ? folder : given;
  if (std::filesystem::is_directory(path)) path += "/tokenizer.json";
  if (std::filesystem::exists(path)) return path;
  if (given.empty() && model.run) path = find_tokenizer(model.run->data.path);
  if (!std::filesystem::exists(path))
    bad_input(given.empty() ? folder : given, "has no tokenizer.json", "--tokenizer PATH");
  return path;
}

int run_generate(int argc, char** argv) {
  Arguments args("pith generate", "Continues a text.");
  string folder, prompt, tokenizer_path;
  SampleOptions options;
  int64_t count = 128, seed = 0;
  args.positional("model", folder, "run folder, step-NNNNNNNN, or Hugging Face folder");
  args.option("--prompt", prompt, "text to continue; empty: from the end-of-text token");
  args.option("--tokenizer", tokenizer_path, "default: found with the model");
  args.option("--max-new-tokens", count, "tokens to add", 0, 1 << 20);
  args.option("--temperature", options.temperature, "0: always the most likely token", 0, 100);
  args.option("--top-p", options.top_p, "sample from the likeliest tokens of this mass", 0, 1);
  args.option("--seed", seed, "of the sampling", 0, INT64_MAX);
  if (!args.parse(argc, argv)) return kExitDone;
  options.seed = uint64_t(seed);
  const ModelFolder model = open_model(folder);
  const Tokenizer tokenizer = Tokenizer::load(tokenizer_of(folder, model, tokenizer_path));
  if (int64_t(tokenizer.vocab_size()) > model.shape.vocab)
    bad_input(folder,
              text("has a smaller vocabulary than the tokenizer (got %ld, need at least "
                   "%u)",
                   model.shape.vocab, tokenizer.vocab_size()),
              "the tokenizer that the model was trained with");
  vector<uint32_t> ids;
  EncodeScratch scratch;
  tokenizer.encode(prompt, ids, {}, scratch);
  const auto eos = tokenizer.eos_id();
  if (ids.empty() && eos) ids.push_back(*eos);
  if (ids.empty())
    bad_input("--prompt", "is empty, and the tokenizer names no end-of-text token",
              "--prompt TEXT");
  printf("%s", prompt.c_str());
  const size_t given = ids.size();
  size_t printed = 0;
  const auto print = [&](bool end) {
    print_on(tokenizer.decode({ids.begin() + given, ids.end()}, SpecialTokens::Keep), printed, end);
  };
  with_model(model, model.length, [&](Rank& rank, Instance& instance) {
    for (int64_t i = 0; i < count && !stop_requested(); i++) {
      const auto back = std::min<int64_t>(int64_t(ids.size()), model.length);
      const auto token =
          uint32_t(next_token(rank, instance, {ids.end() - back, ids.end()}, options, i));
      if (token == eos) break;
      ids.push_back(token);
      print(false);
    }
  });
  print(true);
  printf("\n");
  return stop_requested() ? kExitStopped : kExitDone;
}

}  // namespace pith
