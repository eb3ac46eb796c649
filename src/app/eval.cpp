// eval: pith eval.
#include <cmath>
#include <cstdio>
#include <filesystem>

#include "app/arguments.h"
#include "app/commands.h"
#include "app/held_out.h"
#include "app/model_folder.h"
#include "comm/launch.h"
#include "core/json.h"
#include "core/log.h"
#include "engine/evaluate.h"

namespace pith {

namespace {
struct EvalArguments {
  string model, data, tokenizer;
  int64_t sequence_length = 0, batch = 8, batches = 0;
  double heldout_fraction = -1;
  bool document_mask = false, json = false;
};

// What was not given is as in the run that the model comes from.
DataOptions complete(EvalArguments& a, const Json& config) {
  const std::optional<RunConfig> run = run_config_of(a.model);
  if (a.data.empty() && run) a.data = run->data.path;
  if (a.data.empty())
    bad_input("pith eval", "no data (got a model without a run, need --data)",
              "--data FOLDER of token files");
  if (a.sequence_length == 0 && run) a.sequence_length = run->data.sequence_length;
  if (a.sequence_length == 0)
    a.sequence_length = std::min<int64_t>(model_shape(config).max_positions, 2048);
  if (a.heldout_fraction < 0)
    a.heldout_fraction = run && a.data == run->data.path ? run->data.heldout_fraction : 1;
  if (run) a.document_mask |= run->data.document_mask;
  return {.seq_length = a.sequence_length,
          .vocab_size = model_shape(config).vocab,
          .heldout_fraction = a.heldout_fraction,
          .document_mask = a.document_mask};
}
}  // namespace

int run_eval(int argc, char** argv) {
  Arguments args("pith eval",
                 "Loss of a model on held-out text: a run folder, a checkpoint, or a Hugging Face "
                 "folder.");
  EvalArguments a;
  args.positional("model", a.model, "run folder, step-NNNNNNNN, or Hugging Face folder");
  args.option("--data", a.data, "token files; default: those of the model's run");
  args.option("--tokenizer", a.tokenizer, "for bits per byte; default: found beside the data");
  args.option("--sequence-length", a.sequence_length, "default: as trained", 0, 1 << 24);
  args.option("--heldout-fraction", a.heldout_fraction,
              "share of the documents; default: as trained, or 1 for other data", -1, 1);
  args.option("--batch", a.batch, "sequences at a time", 1, 4096);
  args.option("--batches", a.batches, "of them; 0: all", 0, INT64_MAX);
  args.flag("--document-mask", a.document_mask, "attention stays inside a document");
  args.flag("--json", a.json, "print the result as JSON");
  if (!args.parse(argc, argv)) return kExitDone;
  const Checkpoint weights = open_weights(a.model);
  const Json config = model_config(weights);
  const DataOptions options = complete(a, config);
  const Dataset data(find_token_files(a.data), options);
  data.require_heldout();
  check_weights(weights, whole_table(config));
  const HeldOutText held =
      held_out_text(data, a.tokenizer.empty() ? find_tokenizer(a.data) : a.tokenizer);
  EvalResult result;
  run_ranks(Mesh{}, Device::CPU, {.exit_on_failure = true}, [&](Rank& rank) {
    Instance model = make_instance(rank, config, {.length = options.seq_length});
    load_weights(rank, *model.parameters, weights);
    const BatchShape shape{a.batch, a.batch, 1, 1};
    result = evaluate(rank, model, data, shape, {.kind = ScheduleKind::OneF1B, .gather_step = true},
                      a.batches);
  });
  const double bits = bits_per_byte(result.loss, held);
  if (a.json) {
    JsonWriter w;
    w.object().key("loss").value(result.loss).key("perplexity").value(std::exp(result.loss));
    w.key("bits_per_byte");
    bits > 0 ? w.value(bits) : w.null();
    w.key("labels").value(result.labels).end();
    printf("%s\n", w.str().c_str());
  } else {
    printf("loss %.4f nats a token, perplexity %.2f%s, over %s tokens\n", result.loss,
           std::exp(result.loss), bits > 0 ? text(", %.4f bits a byte", bits).c_str() : "",
           with_commas(result.labels).c_str());
  }
  return kExitDone;
}

}  // namespace pith
