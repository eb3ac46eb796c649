#include "app/commands.h"
#include "comm/launch.h"
#include "core/log.h"
#include "core/process.h"
#include "data/tokenizer.h"

namespace pith {

static constexpr const char* kModel = "run, checkpoint or Hugging Face folder";

static i64 row_length(const ModelFolder& model) {
  return model.run ? model.run->data.sequence_length : min<i64>(model.shape.max_positions, 2048);
}

static void with_model(const ModelFolder& model, i64 length, const auto& fn) {
  run_ranks(Mesh{}, Device::CPU, {.exit_on_failure = true}, [&](Rank& rank) {
    Instance instance = make_instance(rank, model.config, {.length = length});
    load_state(rank, *instance.parameters, model.weights, false);
    fn(rank, instance);
  });
}

int run_eval(int argc, char** argv) {
  Arguments args("pith eval");
  string folder, path;
  i64 length = 0;
  double heldout_fraction = -1;
  bool json = false;
  args.option("model", folder, kModel);
  args.option("--data", path, "token files; default: those of the model's run");
  args.option("--sequence-length", length, "default: as trained", 0, 1 << 24);
  args.option("--heldout-fraction", heldout_fraction,
      "share of the documents; default: as trained, or 1 for other data", -1, 1);
  args.flag("--json", json, "print the result as JSON");
  if (!args.parse(argc, argv)) return kExitDone;
  const ModelFolder model = open_model(folder);
  const auto& run = model.run;
  if (path.empty() && run) path = run->data.path;
  if (path.empty())
    bad_input("pith eval", "no data (got a model without a run, need --data)",
        "--data FOLDER of token files");
  if (length == 0) length = row_length(model);
  if (heldout_fraction < 0)
    heldout_fraction = run && path == run->data.path ? run->data.heldout_fraction : 1;
  const DataOptions options{
      .seq_length = length,
      .vocab_size = model.shape.vocab,
      .heldout_fraction = heldout_fraction,
      .document_mask = run && run->data.document_mask,
  };
  const Dataset data(find_token_files(path), options);
  data.require_heldout();
  EvalResult result;
  with_model(model, length, [&](Rank& rank, Instance& instance) {
    const ScheduleOptions schedule{.kind = ScheduleKind::OneF1B, .gather_step = true};
    result = evaluate(rank, instance, data, {.global_batch = 8, .micro_batch = 8}, schedule);
  });
  double bits = result.loss * bits_a_byte(data, path);
  JsonWriter w;
  w.object().members("loss", result.loss, "perplexity", std::exp(result.loss), "bits_per_byte",
      bits > 0 ? bits : NAN, "labels", result.labels);
  print_result(w.end().str(), json);
  return kExitDone;
}

int run_generate(int argc, char** argv) {
  Arguments args("pith generate");
  string folder, prompt, named;
  SampleOptions options;
  i64 count = 128, seed = 0;
  args.option("model", folder, kModel);
  args.option("--prompt", prompt, "text to continue");
  args.option("--tokenizer", named, "default: found with the model");
  args.option("--max-new-tokens", count, "tokens to add", 0, 1 << 20);
  args.option("--temperature", options.temperature, "0: always the most likely token", 0, 100);
  args.option("--top-p", options.top_p, "sample from the likeliest tokens of this mass", 0, 1);
  args.option("--seed", seed, "of the sampling", 0, INT64_MAX);
  if (!args.parse(argc, argv)) return kExitDone;
  options.seed = u64(seed);
  const ModelFolder model = open_model(folder);
  const Tokenizer tokenizer =
      open_tokenizer(named, {folder, model.run ? model.run->data.path : folder});
  if (i64(tokenizer.vocab_size()) > model.shape.vocab)
    bad_input(folder,
        text("has a smaller vocabulary than the tokenizer (got %ld, need at least %u)",
            model.shape.vocab, tokenizer.vocab_size()),
        "the tokenizer that the model was trained with");
  vector<u32> ids;
  EncodeScratch scratch;
  tokenizer.encode(prompt, ids, false, scratch);
  if (ids.empty()) bad_input("pith generate", "has no text to continue", "--prompt TEXT");
  i64 length = row_length(model);
  Progress progress("generating", double(count), "tokens");
  with_model(model, length, [&](Rank& rank, Instance& instance) {
    for (i64 i = 0; i < count && !stop_requested(); i++) {
      auto seen = ids.end() - min(i64(ids.size()), length);
      auto token = u32(next_token(rank, instance, {seen, ids.end()}, options, i));
      if (token == tokenizer.eos_id) break;
      ids.push_back(token);
      progress.update(double(i + 1));
    }
  });
  printf("%s\n", tokenizer.decode(ids, SpecialTokens::Keep).c_str());
  return stop_requested() ? kExitStopped : kExitDone;
}

}
