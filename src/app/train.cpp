// train: pith train.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "app/arguments.h"
#include "app/commands.h"
#include "app/held_out.h"
#include "core/log.h"
#include "data/durable.h"
#include "engine/batches.h"
#include "engine/trainer.h"
#include "observe/report.h"

namespace pith {

namespace {
struct TrainArguments {
  string file, device = "auto";
  vector<string> set;
  int64_t ranks = 0;
  bool dry_run = false, json = false;
  TrainOptions options;
};

Device choose_device(const string& device) {
  if (device == "cuda")
    bad_input("--device", "this build has no CUDA code (got cuda, need cpu)", "--device cpu");
  return Device::CPU;
}

// The plan in the words and units that a user decides by.
struct PlanNumbers {
  ParameterCounts parameters;
  int64_t samples_needed = 0, samples_available = 0;
  vector<RankMemory> memory;
};

void print_plan_json(const RunPlan& plan, const PlanNumbers& n) {
  const int64_t length = plan.config.data.sequence_length;
  JsonWriter w(2);
  w.object().key("model_type").value(plan.shape.model_type);
  w.key("parameters").value(n.parameters.total).key("active").value(n.parameters.active);
  w.key("mesh").object().key("pp").value(plan.mesh.pp).key("dp").value(plan.mesh.dp);
  w.key("cp").value(plan.mesh.cp).key("ep").value(plan.mesh.ep).end();
  w.key("schedule").value(name_of(plan.schedule.kind));
  w.key("micro_batches").value(plan.schedule.micro_batches);
  w.key("tokens_per_step").value(plan.batch.global_batch * length);
  w.key("tokens_needed").value(n.samples_needed * length);
  w.key("tokens_available").value(n.samples_available * length);
  w.key("memory").raw(memory_json(n.memory));
  w.key("config").value(to_toml(plan.config)).end();
  printf("%s\n", w.str().c_str());
}

void print_plan(const RunPlan& plan, const PlanNumbers& n) {
  const int64_t length = plan.config.data.sequence_length;
  const BatchShape& b = plan.batch;
  printf("%s\n", to_toml(plan.config).c_str());
  printf("model        %s, %s parameters, %s active a token, %.3g training FLOPs a token\n",
         plan.shape.model_type.c_str(), with_commas(n.parameters.total).c_str(),
         with_commas(n.parameters.active).c_str(), flops_per_token(plan));
  printf("ranks        %d = pp %d * dp %d * cp %d * ep %d, schedule %s\n", plan.mesh.world(),
         plan.mesh.pp, plan.mesh.dp, plan.mesh.cp, plan.mesh.ep, name_of(plan.schedule.kind));
  printf(
      "a step       %s sequences of %s tokens = %s tokens; %d micro-batches of %s sequences "
      "a rank\n",
      with_commas(b.global_batch).c_str(), with_commas(length).c_str(),
      with_commas(b.global_batch * length).c_str(), plan.schedule.micro_batches,
      with_commas(b.micro_batch).c_str());
  printf("tokens       %s needed, %s available in %s pass%s over the data\n\n",
         with_commas(n.samples_needed * length).c_str(),
         with_commas(n.samples_available * length).c_str(),
         with_commas(plan.config.data.max_epochs).c_str(),
         plan.config.data.max_epochs == 1 ? "" : "es");
  printf("%s", memory_table(n.memory).c_str());
}

int dry_run(const RunPlan& plan, bool json) {
  const Dataset data(find_token_files(plan.config.data.path), data_options(plan));
  PlanNumbers n{parameter_counts(plan), plan.config.train.steps * plan.batch.global_batch,
                data.samples_per_epoch() * plan.config.data.max_epochs, rank_memory(plan)};
  if (json)
    print_plan_json(plan, n);
  else
    print_plan(plan, n);
  data.require_samples(n.samples_needed);
  return kExitDone;
}

// report.html and, on the terminal, the loss as a line and what it is worth.
void write_report(const RunPlan& plan) {
  const string& folder = plan.config.run.folder;
  const vector<StepMetrics> steps = read_metrics(folder + "/metrics.jsonl");
  if (steps.empty()) return;
  ReportInput input{.title = folder};
  const auto row = [&](const char* name, const string& value) {
    input.summary.push_back({name, value});
    log_info("%s: %s", name, value.c_str());
  };
  const ParameterCounts n = parameter_counts(plan);
  input.summary.push_back(
      {"parameters", with_commas(n.total) + ", " + with_commas(n.active) + " active a token"});
  vector<double> losses;
  double eval_loss = 0;
  for (const StepMetrics& m : steps) {
    losses.push_back(m.loss);
    if (m.eval_loss) eval_loss = *m.eval_loss;
  }
  row("training loss", text("%.4f nats a token", losses.back()));
  if (eval_loss > 0) {
    const Dataset data(find_token_files(plan.config.data.path), data_options(plan));
    const HeldOutText held = held_out_text(data, find_tokenizer(plan.config.data.path));
    const auto both = [&](double nats) {
      const double bits = bits_per_byte(nats, held);
      return text("%.4f nats a token", nats) + (bits > 0 ? text(", %.4f bits a byte", bits) : "");
    };
    row("held-out loss", both(eval_loss));
    if (plan.shape.vocab <= kBigramMaxVocab)
      row("bigram model on the same text", both(bigram_nats(data)));
  }
  write_file_durably(folder + "/report.html", report_html(steps, input));
  log_info("loss over the steps: %s", sparkline(losses, 60).c_str());
  log_info("report: %s/report.html", folder.c_str());
}
}  // namespace

int run_train(int argc, char** argv) {
  Arguments args("pith train",
                 "Trains a model. The same command goes on from the newest checkpoint in "
                 "run.folder.");
  TrainArguments a;
  args.positional("run", a.file, "run.toml: see docs/configuration.md");
  args.list("--set", a.set, "KEY=VALUE: overrides a key of the file, such as train.steps=10");
  args.choice("--device", a.device, {"auto", "cpu", "cuda"}, "where to train");
  args.option("--ranks", a.ranks, "ranks of this machine; 0: as many as pp * cp * ep need", 0, 256);
  args.flag("--dry-run", a.dry_run, "print the plan and leave; nothing is allocated or written");
  args.flag("--json", a.json, "with --dry-run: as JSON");
  args.option("--routing-trace", a.options.routing_trace,
              "folder for each step's expert ids and weights, as .npy");
  args.option("--routing-replay", a.options.routing_replay,
              "folder of such ids: these experts instead of the router's choice");
  if (!args.parse(argc, argv)) return kExitDone;
  const RunConfig config = load_run_config(a.file, a.set);
  const auto& parallel = config.parallel;
  if (a.ranks == 0)
    a.ranks = int64_t{parallel.pp} * parallel.cp * parallel.ep * parallel.dp_replicate;
  const RunPlan plan = plan_run(config, choose_device(a.device), int(a.ranks));
  if (a.dry_run) return dry_run(plan, a.json);
  const char* debug = getenv("PITH_DEBUG");
  a.options.debug = debug && strcmp(debug, "1") == 0;
  const ParameterCounts n = parameter_counts(plan);
  log_info("%s: %s parameters (%s active), %d ranks on the CPU, %s", plan.shape.model_type.c_str(),
           with_commas(n.total).c_str(), with_commas(n.active).c_str(), plan.mesh.world(),
           name_of(plan.schedule.kind));
  const TrainResult result = train(plan, a.options);
  write_report(plan);
  if (!result.stopped) return kExitDone;
  log_info("stopped at step %ld; the same command goes on", result.step);
  return kExitStopped;
}

}  // namespace pith
