#pragma once
#include <optional>

#include "core/json.h"

namespace pith {

// By layer; 1 is balance of the first and last.
struct ExpertLoad {
  vector<double> max_over_mean, dead_share, entropy;
};
// counts [layers * experts]
ExpertLoad expert_load(const vector<double>& counts, int num_experts);

struct StepMetrics {
  i64 step = 0, steps = 0;  // from 1, and of the run
  double loss = 0;
  vector<double> balance_loss;  // [layers], unscaled: 1 is balance; empty: not in use
  double learning_rate = 0, gradient_norm = 0;  // before clipping
  bool clipped = false, skipped = false;        // skipped: the update was not finite
  string router_forced;                         // "balanced", or empty
  i64 tokens = 0;
  double seconds = 0;  // of the slowest rank, without evaluation and saving
  std::optional<double> mfu, eval_loss;
  double peak_memory_bytes = 0;  // of the fullest rank
  double checkpoint_stall_s = 0, left_s = 0;
  ExpertLoad load;

  double tokens_per_second() const { return seconds > 0 ? double(tokens) / seconds : 0; }
  double mean_balance_loss() const;
};

// What is unknown or not in use is left out.
string step_line(const StepMetrics& metrics);
string step_json(const StepMetrics& metrics);

// Here and below, what does not fit on the disk is left out whole, with a warning.

// Makes metrics.jsonl, or cuts it back to whole lines of steps up to `last_step`.
void begin_metrics(const string& path, i64 last_step);
// What is not finite is null. Exit code 2 for a damaged line.
vector<Json> read_metrics(const string& path, i64 last_step = INT64_MAX, size_t* end = nullptr);

// A new TensorBoard file, which voids what others say of `first_step` on.
string begin_events(const string& folder, i64 first_step, double wall_s);
void append_scalars(
    const string& path, i64 step, double wall_s, const vector<std::pair<string, double>>& values);
// As step/KEY or KEY/layer-000 ... into the events.
void append_step(const string& metrics_path, const string& events_path, const StepMetrics& metrics,
    double wall_s);
u32 crc32c(const string& bytes);

}
