#include "bench/bench.h"

#include <unistd.h>

#include <algorithm>
#include <filesystem>

#include "core/cuda.h"

namespace pith {

vector<i64> whole_numbers(const string& option, const vector<string>& words) {
  vector<i64> numbers;
  for (const string& word : words) {
    bool digits = !word.empty() && word.size() < 7 && std::ranges::all_of(word, isdigit);
    if (!digits || std::stol(word) == 0)
      bad_input(option, "is no list of whole numbers (got \"" + word + "\")", option + " 1,2,4");
    numbers.push_back(std::stol(word));
  }
  return numbers;
}

void need_cuda() {
  if (!kCuda)
    bad_input("pith bench", "this build has no CUDA", "scripts/build.sh cuda, where a GPU is");
}

string need_gpu() {
  need_cuda();
  string why;
  vector<string> gpus;
  if constexpr (kCuda) gpus = cuda_devices(why);
  if (gpus.empty())
    bad_input("pith bench", "there is no GPU to use (got: " + why + ")",
        "a machine with one; pith doctor shows what there is");
  return gpus[0];
}

BenchConfig::BenchConfig(Arguments& args) {
  args.option("config", file, "what to train, a run.toml such as bench/configs/q1.toml");
  args.list("--micro-batch", micro_batches, "sequences a micro-batch, such as 1,2,4", ',');
  args.option("--layers", layers, "of the model; 0: as many as it has", 0, 1000);
  args.choice("--precision", precision, {"auto", "bf16", "fp32"}, "auto: as configured");
  args.list("--set", set, "KEY=VALUE: overrides a key of the file");
}

BenchConfig::~BenchConfig() {
  std::error_code ignored;
  if (!scratch_.empty()) std::filesystem::remove_all(scratch_, ignored);
}

const string& BenchConfig::scratch() {
  if (!scratch_.empty()) return scratch_;
  string path = std::filesystem::temp_directory_path() / "pith-bench-XXXXXX";
  if (!mkdtemp(path.data())) failed(path, text("cannot be made (%s)", strerror(errno)), "TMPDIR");
  return scratch_ = path;
}

RunPlan BenchConfig::plan(const vector<string>& more) {
  // What a configuration need not say comes first.
  vector<string> keys = {
      "data.path=none", "train.steps=1", "router.force=balanced", "checkpoint.interval=0"};
  keys.insert(keys.end(), set.begin(), set.end());
  if (precision != "auto") keys.push_back("train.precision=" + precision);
  keys.insert(keys.end(), more.begin(), more.end());
  RunConfig config = load_run_config(file, keys);
  if (layers > 0) {
    string model = read_text_file(config.model.config);
    const string name = "\"num_hidden_layers\"";
    size_t at = model.find(name);
    if (at == string::npos)
      bad_input(config.model.config, "has no num_hidden_layers to set", "no --layers");
    model.replace(at, model.find_first_of(",}\n", at) - at, text("%s: %ld", name.c_str(), layers));
    write_file_durably(config.model.config = scratch() + "/config.json", model);
  }
  return plan_run(config, Device::CUDA, 1);
}

int run_bench(int argc, char** argv) {
  constexpr struct {
    const char* name;
    int (*run)(int argc, char** argv);
    const char* about;
  } kParts[] = {
      {"train", bench_train, "how fast a configuration trains on random tokens"},
      {"floor", bench_floor, "how fast it could, from products and bytes at their best rates"},
      {"ops", bench_ops, "each op: time, rate, fraction of the ceiling"},
  };
  string name = argc < 2 ? "--help" : argv[1];
  for (const auto& part : kParts)
    if (name == part.name) return part.run(argc - 1, argv + 1);
  if (name != "--help")
    bad_input("pith bench", "unknown part (got \"" + name + "\")", "pith bench --help");
  printf(
      "Measures on one GPU.\n\n"
      "usage: pith bench PART [ARGUMENTS], or pith bench PART --help\n\n");
  for (const auto& part : kParts) printf("  %-11s %s\n", part.name, part.about);
  return argc < 2 ? kExitBadInput : kExitDone;
}

}
