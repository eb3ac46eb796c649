#include "app/commands.h"
#include "core/cuda.h"
#include "core/log.h"
#include "engine/trainer.h"
#include "observe/profile.h"
#include "observe/report.h"

namespace pith {

static int dry_run(const RunPlan& plan) {
  const Dataset data = open_data(plan);
  const RunConfig& config = plan.config;
  i64 length = config.data.sequence_length;
  i64 needed = config.train.steps * plan.batch.global_batch;
  const Mesh& mesh = plan.mesh;
  printf("%s\n%-24s %d = pp %d * dp %d * cp %d * ep %d\n%-24s %s\n", to_toml(config).c_str(),
      "ranks", mesh.world(), mesh.pp, mesh.dp, mesh.cp, mesh.ep, "schedule",
      name_of(plan.schedule.kind));
  const auto line = [](const char* name, i64 number) {
    printf("%-24s %s\n", name, with_commas(number).c_str());
  };
  line("parameters", plan.parameters);
  line("active_parameters", plan.active_parameters);
  line("sequences_a_step", plan.batch.global_batch);
  line("tokens_a_step", plan.step_tokens());
  line("micro_batches", plan.schedule.micro_batches);
  line("sequences_a_micro_batch", plan.batch.micro_batch);
  line("tokens_needed", needed * length);
  line("tokens_available", data.samples_per_epoch() * config.data.max_epochs * length);
  printf("\n%s", memory_table(rank_memory(plan)).c_str());
  data.require_samples(needed);
  return kExitDone;
}

static void write_report(const RunPlan& plan) {
  const string& folder = plan.config.run.folder;
  vector<Json> steps = read_metrics(folder + "/metrics.jsonl");
  if (steps.empty()) return;
  string notes;
  auto note = [&](const string& line) {
    notes += line + "\n";
    log_info("%s", line.c_str());
  };
  vector<double> losses;
  double eval_loss = 0;
  i64 skipped = 0;
  for (const Json& line : steps) {
    losses.push_back(line.double_or("cross_entropy_loss", NAN));
    eval_loss = line.double_or("eval_loss", eval_loss);
    skipped += line["skipped"].as_bool();
  }
  note(text("training loss: %.4f nats a token", losses.back()));
  if (eval_loss > 0) {
    const Dataset data = open_data(plan);
    double bits = bits_a_byte(data, plan.config.data.path);
    auto worth = [&](const char* name, double nats) {
      note(text("%s: %.4f nats a token", name, nats) +
           (bits > 0 ? text(", %.4f bits a byte", bits * nats) : ""));
    };
    worth("held-out loss", eval_loss);
    if (plan.shape.vocab <= kBigramMaxVocab)
      worth("bigram model on the same text", bigram_nats(data));
  }
  if (skipped) note(text("updates skipped: not finite: %ld", skipped));
  write_file_durably(folder + "/report.html", report_html(steps, folder, notes));
  log_info("loss over the steps: %s", sparkline(losses, 60).c_str());
  log_info("report: %s/report.html", folder.c_str());
}

static Device choose_device(const string& wanted, int ranks) {
  string why = "this build has no CUDA";
  bool gpu = false;
  if constexpr (kCuda) gpu = !cuda_devices(why).empty();
  if (wanted == "cuda" && !gpu)
    bad_input("--device cuda", "there is no GPU to use (got: " + why + ")",
        "--device cpu; pith doctor shows what there is");
  if (wanted != "auto") return wanted == "cuda" ? Device::CUDA : Device::CPU;
  if (gpu && ranks > 1) why = text("%d ranks, one alone is on a GPU as yet", ranks);
  gpu = gpu && ranks == 1;
  log_info("device: %s", gpu ? "GPU" : ("CPU (" + why + ")").c_str());
  return gpu ? Device::CUDA : Device::CPU;
}

int run_train(int argc, char** argv) {
  Arguments args("pith train");
  string file, device = "auto";
  vector<string> set;
  i64 ranks = 0;
  bool dry = false;
  TrainOptions options;
  args.option("run", file, "run.toml: see docs/configuration.md");
  args.list("--set", set, "KEY=VALUE: overrides a key of the file, such as train.steps=10");
  args.choice("--device", device, {"auto", "cpu", "cuda"},
      "where to train; auto: on a GPU if there is one and one rank");
  args.option("--ranks", ranks, "ranks of this machine; 0: as many as pp * cp * ep need", 0, 256);
  args.flag("--dry-run", dry, "print the plan, write nothing");
  args.option("--routing-trace", options.routing_trace,
      "folder for each step's expert ids and weights, as .npy");
  args.option("--routing-replay", options.routing_replay,
      "folder of such ids: these experts instead of the router's choice");
  args.option("--profile-step", options.profile_step,
      "this step's kernel launches, into the run's folder; 0: of none", 1);
  if (!args.parse(argc, argv)) return kExitDone;
  const RunConfig config = load_run_config(file, set);
  const auto& parallel = config.parallel;
  if (ranks == 0) ranks = i64{parallel.pp} * parallel.cp * parallel.ep * parallel.dp_replicate;
  const RunPlan plan = plan_run(config, choose_device(device, int(ranks)), int(ranks));
  if (i64 step = options.profile_step) {
    const auto done = list_checkpoints(config.run.folder);
    i64 first = done.empty() ? 1 : done.rbegin()->first + 1;
    if (plan.device == Device::CPU || step < first || step > config.train.steps)
      bad_input("--profile-step",
          text("needs a GPU and a step from %ld to %ld (got %ld on the %s)", first,
              config.train.steps, step, plan.device == Device::CPU ? "CPU" : "GPU"),
          "--device cuda, another step");
    if constexpr (kCuda) open_profiler();
  }
  if (dry) return dry_run(plan);
  log_info("%s: %s parameters (%s active), %d ranks on the %s, %s", plan.shape.model_type.c_str(),
      with_commas(plan.parameters).c_str(), with_commas(plan.active_parameters).c_str(),
      plan.mesh.world(), plan.device == Device::CPU ? "CPU" : "GPU", name_of(plan.schedule.kind));
  bool done = train(plan, options);
  write_report(plan);
  return done ? kExitDone : kExitStopped;
}

}
