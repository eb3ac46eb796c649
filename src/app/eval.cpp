// eval: pith eval.
#include "app/arguments.h"
#include "app/commands.h"
#include "app/model_folder.h"
#include "core/log.h"

namespace pith {

int run_eval(int argc, char** argv) {
  Arguments args("pith eval", "Loss on held-out text.");
  string folder, path;
  i64 length = 0;
  double heldout_fraction = -1;
  bool json = false;
  args.positional("model", folder, "run folder, step-NNNNNNNN, or Hugging Face folder");
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
  if (length == 0) length = model.length;
  if (heldout_fraction < 0)
    heldout_fraction = run && path == run->data.path ? run->data.heldout_fraction : 1;
  const Dataset data(find_token_files(path), {.seq_length = length,
                                              .vocab_size = model.shape.vocab,
                                              .heldout_fraction = heldout_fraction,
                                              .document_mask = run && run->data.document_mask});
  data.require_heldout();
  EvalResult result;
  with_model(model, length, [&](Rank& rank, Instance& instance) {
    const ScheduleOptions schedule{.kind = ScheduleKind::OneF1B, .gather_step = true};
    result = evaluate(rank, instance, data, {.global_batch = 8, .micro_batch = 8}, schedule);
  });
  const double perplexity = std::exp(result.loss);
  const double bits = result.loss * bits_a_byte(data, path);
  if (json) {
    JsonWriter w;
    w.object().key("loss").value(result.loss).key("perplexity").value(perplexity);
    w.key("bits_per_byte");
    bits > 0 ? w.value(bits) : w.null();
    w.key("labels").value(result.labels).end();
    printf("%s\n", w.str().c_str());
  } else {
    printf("loss %.4f nats a token, perplexity %.2f%s, over %s tokens\n", result.loss, perplexity,
           bits > 0 ? text(", %.4f bits a byte", bits).c_str() : "",
           with_commas(result.labels).c_str());
  }
  return kExitDone;
}

}
