// `pith bench train`: a process for each row of the table, so that none finds what another left in
// memory and all of them start.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>

#include "bench/bench.h"
#include "comm/launch.h"
#include "core/log.h"
#include "core/rng.h"
#include "data/array_files.h"
#include "engine/trainer.h"

namespace pith {
namespace {

constexpr double kPeakTflops = 989;  // of an H100 in BF16, without sparsity

// The same in a process of its own. Nothing of CUDA may have begun in this one.
Json measure_apart(const RunPlan& plan) {
  int ends[2];
  fflush(nullptr);
  if (pipe(ends) != 0) failed("pith bench train", text("no pipe (%s)", strerror(errno)));
  pid_t child = fork();
  if (child < 0) failed("pith bench train", text("no process (%s)", strerror(errno)));
  if (child == 0) {
    close(ends[0]);
    string answer;
    try {
      answer = train_row(plan, now_s());
    } catch (const Error& e) {
      JsonWriter w;
      answer = w.object().members("error", e.what(), "exit_code", e.exit_code).end().str();
    } catch (const std::exception& e) {
      JsonWriter w;
      answer = w.object().members("error", e.what(), "exit_code", int(kExitFailed)).end().str();
    }
    ssize_t sent = write(ends[1], answer.data(), answer.size());
    _exit(sent == ssize_t(answer.size()) ? kExitDone : kExitFailed);
  }
  close(ends[1]);
  string answer;
  char part[4096];
  for (ssize_t n; (n = read(ends[0], part, sizeof part)) > 0 || (n < 0 && errno == EINTR);)
    if (n > 0) answer.append(part, n);
  close(ends[0]);
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (answer.empty())
    failed("pith bench train",
        text("the process that trains ended without a word (status %d)", status));
  return Json::parse(answer, "answer of the process that trains");
}

}

// A document for each sample, and one token more for its last label.
void write_random_tokens(const RunPlan& plan) {
  const string& path = plan.config.data.path;
  const i64 length = plan.config.data.sequence_length;
  const i64 samples = plan.config.train.steps * plan.batch.global_batch;
  vector<u32> ids(samples * (length + 1));
  for (size_t i = 0; i < ids.size(); i++) ids[i] = u32(uniform_at(1, i) * double(plan.shape.vocab));
  vector<u64> ends(samples);
  for (i64 i = 0; i < samples; i++) ends[i] = (i + 1) * (length + 1);
  DurableFile file(path);
  const auto write = [&](FileDType type, const auto& values) {
    file.write(npy_header(type, {i64(values.size())}));
    file.write(values);
  };
  write(FileDType::U32, ids);
  write(FileDType::U64, ends);
  file.finish();
}

string train_row(const RunPlan& plan, double began) {
  JsonWriter row;
  row.object().members("gpu", plan.device == Device::CUDA ? need_gpu() : "none");
  Run run{.plan = plan};
  run.state.seed = plan.config.data.seed;
  run_ranks(plan.mesh, plan.device, {.compute = plan.compute}, [&](Rank& rank) {
    Trainer trainer(rank, run);
    vector<double> seconds;
    double first = 0, peak = 0;
    for (i64 step = 0; step < plan.config.train.steps; step++) {
      double start = now_s();
      StepMetrics m = trainer.compute_gradients();
      trainer.update(m);
      if (trainer.stop) throw Error(kExitStopped, "stopped by a signal");
      peak = max(peak, m.peak_memory_bytes);
      // The last kernels of a step end in the next one, which waits for them when it begins.
      if (step >= kWarmUpSteps) seconds.push_back(now_s() - start);
      if (step > 0) continue;
      device_bytes(rank);
      first = now_s() - began;
    }
    std::ranges::sort(seconds);
    size_t n = seconds.size();
    double median = (seconds[(n - 1) / 2] + seconds[n / 2]) / 2;
    double rate = double(plan.step_tokens()) / median;
    double tflops = plan.config.train.peak_tflops;
    row.members("tokens_per_second", rate, "mfu",
        plan.flops_per_token * rate / (1e12 * (tflops > 0 ? tflops : kPeakTflops)));
    row.members("peak_bytes", i64(peak), "device_bytes", device_bytes(rank), "step_s", median,
        "slowest_step_s", seconds.back(), "first_step_s", first);
  });
  return row.end().str();
}

int bench_train(int argc, char** argv) {
  Arguments args("pith bench train");
  BenchConfig config(args);
  vector<string> weight_grad_batches;
  i64 steps = 5;
  bool json = false;
  args.list("--weight-grad-batch", weight_grad_batches,
      "micro-batches whose weight gradients are computed together, such as 1,2,4", ',');
  args.option("--steps", steps, "steps to take the median of, after three others", 5, 10000);
  args.flag("--json", json, "print JSON");
  if (!args.parse(argc, argv)) return kExitDone;
  const RunPlan whole = config.plan({});
  vector<RunPlan> plans;
  vector<string> micro = config.micro_batches, batches = weight_grad_batches;
  if (micro.empty()) micro = {std::to_string(whole.batch.micro_batch)};
  if (batches.empty()) batches = {std::to_string(whole.schedule.weight_grad_batch)};
  const string tokens = config.scratch() + "/random.bin";
  for (i64 m : whole_numbers("--micro-batch", micro))
    for (i64 b : whole_numbers("--weight-grad-batch", batches))
      plans.push_back(config.plan(
          {text("train.micro_batch_size=%ld", m), text("parallel.weight_grad_batch=%ld", b),
              text("train.steps=%ld", steps + kWarmUpSteps), "data.path=" + tokens,
              "data.heldout_fraction=0", "data.max_epochs=1", "train.eval_interval=0"}));
  need_cuda();
  write_random_tokens(plans[0]);
  JsonWriter out;
  out.object().members("config", config.file, "model", whole.shape.model_type, "layers",
      whole.shape.num_layers, "precision", whole.compute == DType::BF16 ? "bf16" : "fp32", "steps",
      steps, "step_tokens", whole.step_tokens(), "flops_per_token", whole.flops_per_token,
      "routing", whole.config.router.force == "balanced" ? "balanced" : "free");
  out.key("runs").array();
  if (!json)
    printf(
        "%s: %s of %d layers, %ld sequences of %ld tokens a step, %s, routing %s; the median of "
        "%ld steps after %ld\n\n"
        "| micro-batch | weight gradients of | tokens/s | MFU | peak, GiB | device, GiB | step, s "
        "| slowest, s | first step after, s |\n|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n",
        config.file.c_str(), whole.shape.model_type.c_str(), whole.shape.num_layers,
        whole.batch.global_batch, whole.config.data.sequence_length,
        whole.compute == DType::BF16 ? "bf16" : "fp32",
        whole.config.router.force == "balanced" ? "balanced" : "free", steps, kWarmUpSteps);
  string error, gpu;
  for (const RunPlan& plan : plans) {
    const Json row = measure_apart(plan);
    i64 micro_batch = plan.batch.micro_batch, batch = plan.schedule.weight_grad_batch;
    out.object().members("micro_batch", micro_batch, "weight_grad_batch", batch);
    if (row.has("error")) {
      // Too large a micro-batch does not keep the others from their rows.
      error = row["error"].as_string();
      if (i64 code = row["exit_code"].as_int(); code != kExitFailed) throw Error(int(code), error);
      out.members("error", error).end();
      log_warning("micro-batch %ld: %s", micro_batch, error.c_str());
      continue;
    }
    gpu = row["gpu"].as_string();
    const auto number = [&](const char* key) { return row[key].as_double(); };
    for (const char* key : {"tokens_per_second", "mfu", "peak_bytes", "device_bytes", "step_s",
             "slowest_step_s", "first_step_s"})
      out.members(key, number(key));
    out.end();
    constexpr double kGiB = 1 << 30;
    if (!json)
      printf("| %ld | %ld | %s | %.1f%% | %.2f | %.2f | %.3f | %.3f | %.2f |\n", micro_batch, batch,
          with_commas(i64(number("tokens_per_second"))).c_str(), 100 * number("mfu"),
          number("peak_bytes") / kGiB, number("device_bytes") / kGiB, number("step_s"),
          number("slowest_step_s"), number("first_step_s"));
    fflush(stdout);
  }
  out.end().members("gpu", gpu).end();
  if (json)
    printf("%s\n", out.str().c_str());
  else
    printf("\n%s\n", gpu.c_str());
  return error.empty() ? kExitDone : kExitFailed;
}
}
