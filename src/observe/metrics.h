// metrics: the numbers of a step, as a log line, in metrics.jsonl and as TensorBoard events.
#pragma once
#include <optional>

#include "core/json.h"

namespace pith {

// By layer.
struct ExpertLoad {
  vector<double> max_over_mean;  // 1 is balance, E the worst
  vector<double> dead_share;
  vector<double> entropy;  // over log E: 1 is balance
};
// counts [layers * experts]
ExpertLoad expert_load(const vector<double>& counts, int num_experts);

struct StepMetrics {
  i64 step = 0, steps = 0;  // from 1, and of the run
  double loss = 0;
  vector<double> balance_loss;  // [layers], unscaled: 1 is balance; empty: not in use
  double learning_rate = 0;
  double gradient_norm = 0;  // before clipping
  bool clipped = false;
  bool skipped = false;  // the update was not finite
  string router_forced;  // "balanced", or empty
  i64 tokens = 0;
  double seconds = 0;  // of the slowest rank, without evaluation and saving
  std::optional<double> mfu;
  double peak_memory_bytes = 0;  // of the fullest rank
  double checkpoint_stall_s = 0;
  double left_s = 0;  // not kept
  std::optional<double> eval_loss;
  ExpertLoad load;

  double tokens_per_second() const { return seconds > 0 ? double(tokens) / seconds : 0; }
  double mean_balance_loss() const;
};

// What is unknown or not in use is left out.
string step_line(const StepMetrics& metrics);
string step_json(const StepMetrics& metrics);

// metrics.jsonl: one object a step. Of it, and of TensorBoard's events, what does not fit on the
// disk is left out whole, with a warning.
class MetricsFile {
 public:
  // Cuts the file back to steps up to `last_step`, with a warning where it is damaged.
  MetricsFile(const string& path, i64 last_step);
  void append(const StepMetrics& metrics);

 private:
  string path_;
};

// Its lines; what is not finite is null. Exit code 2 naming a damaged one.
vector<Json> read_metrics(const string& path);

class TensorBoardFile {
 public:
  // A new file of the folder, which voids what others say of `first_step` on.
  TensorBoardFile(const string& folder, i64 first_step, double wall_s);
  void scalars(i64 step, double wall_s, const vector<std::pair<string, double>>& values);
  // The numbers of step_json(): as step/KEY, or KEY/layer-000 and so on.
  void step(const StepMetrics& metrics, double wall_s);
  const string& path() const { return path_; }

 private:
  void event(i64 step, double wall_s, const string& fields);
  string path_;
};

u32 crc32c(const string& bytes);

}
