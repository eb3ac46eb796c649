// bench: what the parts of `pith bench` share.
#pragma once
#include "app/commands.h"
#include "bench/counts.h"
#include "bench/measure.h"

namespace pith {

// argv[0] is the part's name. Each returns the exit code; 2 without CUDA or without a GPU.
int bench_floor(int argc, char** argv);
int bench_ops(int argc, char** argv);
int bench_train(int argc, char** argv);

// A configuration of bench/configs and what the command line changes in it.
struct BenchConfig {
  explicit BenchConfig(Arguments& args);
  BenchConfig(const BenchConfig&) = delete;
  ~BenchConfig();
  // On a GPU, with balanced routing; `more` overrides last. Exit code 2.
  RunPlan plan(const vector<string>& more);
  // A folder of its own, removed at the end.
  const string& scratch();

  string file, precision = "auto";
  i64 layers = 0;
  vector<string> set, micro_batches;

 private:
  string scratch_;
};

// Of "1,2,4"; of 1 and more. Exit code 2.
vector<i64> whole_numbers(const string& option, const vector<string>& words);

void need_cuda();   // of this build
string need_gpu();  // its name

// x, w and, of a product by group, where each group's rows begin: cut evenly.
void make_product(Inputs& in, const Product& p);
Tensor call_product(Rank& rank, const Inputs& in);

// A line of the floor.
struct FloorLine {
  string item;
  double count = 0;    // a step
  double amount = 0;   // FLOPs or bytes, of one
  double seconds = 0;  // of one
  bool bytes = false;
  string by = "op";  // what was measured
};
vector<FloorLine> floor_lines(Rank& rank, const RunPlan& plan, double copy_rate);

// Of one phase of an op: a product has FLOPs, what moves memory has bytes.
struct Cost {
  double flops = 0, bytes = 0;
};
struct OpCase {
  string name;
  Cost forward, backward, weights;
  void (*make)(Inputs& in, const Sizes& s);
  TensorList (*call)(Rank& rank, const Inputs& in);
};
// Those of training, then the general vocabulary. s.model has the heads and experts of q1.
vector<OpCase> op_cases(const Sizes& s);
// Qwen3-30B-A3B, sequences of 4096.
Sizes q1(i64 rows);

// Trains plan.config.train.steps steps on the tokens at plan.config.data.path; JSON. `began`: of
// the process, by now_s().
string train_row(const RunPlan& plan, double began);
constexpr i64 kWarmUpSteps = 3;
void write_random_tokens(const RunPlan& plan);  // there

}
