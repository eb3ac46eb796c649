// train_bench: how fast a model trains on one GPU: random tokens, balanced routing, AdamW; the
// median of the steps after the third. Q1 is Qwen3-30B-A3B of 3 layers, sequence 4096, global
// batch 32.
//
//   train_bench CONFIG.json LAYERS SEQUENCE GLOBAL_BATCH MICRO_BATCH [bf16|fp32]
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>

#include "comm/launch.h"
#include "core/log.h"
#include "core/rng.h"
#include "data/npy.h"
#include "engine/trainer.h"

using namespace pith;

// One document a sample, and one more for its last label.
static void write_tokens(const string& path, i64 samples, i64 length, i64 vocab) {
  const i64 n = samples * (length + 1);
  vector<u32> ids(n);
  for (i64 i = 0; i < n; i++) ids[i] = u32(uniform_at(1, i) * double(vocab));
  vector<u64> ends(samples);
  for (i64 i = 0; i < samples; i++) ends[i] = (i + 1) * (length + 1);
  DurableFile file(path);
  const auto write = [&](NpyType type, const auto& values) {
    const string head = npy_header(type, {i64(values.size())});
    file.write(head.data(), i64(head.size()));
    file.write(values.data(), i64(values.size() * sizeof values[0]));
  };
  write(NpyType::U4, ids);
  write(NpyType::U8, ends);
  file.finish();
}

static int bench(const vector<string>& args) {
  if (args.size() < 5)
    bad_input("train_bench", "needs CONFIG.json LAYERS SEQUENCE GLOBAL_BATCH MICRO_BATCH",
              "train_bench configs/qwen3-30b-a3b/config.json 3 4096 32 1");
  constexpr i64 kSteps = 8, kWarmUp = 3;
  const string folder =
      std::filesystem::temp_directory_path() / ("train_bench-" + std::to_string(getpid()));
  make_folders(folder);
  string model = read_text_file(args[0]);
  const size_t layers = model.find("\"num_hidden_layers\"");
  if (layers == string::npos) bad_input(args[0], "has no num_hidden_layers", "a config.json");
  const size_t end = model.find_first_of(",}", layers);
  model = model.substr(0, layers) + "\"num_hidden_layers\": " + args[1] + model.substr(end);
  write_file_durably(folder + "/config.json", model);
  RunConfig c;
  c.model.config = folder + "/config.json";
  c.data.path = folder + "/random.bin";
  c.data.sequence_length = std::stol(args[2]);
  c.train.steps = kSteps;
  c.train.global_batch_size = std::stol(args[3]);
  c.train.micro_batch_size = std::stol(args[4]);
  c.train.precision = args.size() > 5 ? args[5] : "bf16";
  if (args.size() > 6) c.parallel.weight_grad_batch = std::stoi(args[6]);
  c.train.peak_tflops = 989;  // of an H100 in BF16
  c.optimizer.lr = 1e-4;
  c.router.force = "balanced";
  const RunPlan plan = plan_run(c, Device::CUDA, 1);
  write_tokens(c.data.path, kSteps * c.train.global_batch_size, c.data.sequence_length,
               plan.shape.vocab);
  Run run{.plan = plan};
  run.state.seed = 1;
  const double began = now_s();
  run_ranks(plan.mesh, plan.device, {.compute = plan.compute}, [&](Rank& rank) {
    Trainer trainer(rank, run);
    vector<double> seconds;
    double first = 0, peak = 0;
    for (i64 step = 0; step < kSteps; step++) {
      StepMetrics m = trainer.compute_gradients();
      trainer.update(m);
      if (step == 0) first = now_s() - began;
      if (step >= kWarmUp) seconds.push_back(m.seconds);
      peak = std::max(peak, m.peak_memory_bytes);
    }
    std::ranges::sort(seconds);
    const double median = seconds[seconds.size() / 2], rate = double(plan.step_tokens()) / median;
    printf(
        "%s layers, sequence %s, global batch %s, micro-batch %s: %.0f tokens/s, MFU %.1f%%, "
        "peak %.2f GiB, step %.3f s, first step after %.2f s\n",
        args[1].c_str(), args[2].c_str(), args[3].c_str(), args[4].c_str(), rate,
        100 * plan.flops_per_token * rate / (1e12 * c.train.peak_tflops), peak / (1 << 30), median,
        first);
  });
  std::filesystem::remove_all(folder);
  return 0;
}

int main(int argc, char** argv) {
  try {
    return bench({argv + 1, argv + argc});
  } catch (const Error& e) {
    fprintf(stderr, "error: %s\n", e.what());
    return e.exit_code;
  }
}
