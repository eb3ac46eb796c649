// metrics: the numbers of a step: as a log line, and as a line of metrics.jsonl.
#pragma once
#include <cstdio>
#include <memory>
#include <optional>

#include "core/check.h"

namespace pith {

// How a step's (token, slot) pairs spread over the E experts of each MoE layer; zero without pairs.
struct ExpertLoad {
  vector<double> max_over_mean;  // 1 is balance, E the worst
  vector<double> dead_share;     // of the experts, those without a token
  vector<double> entropy;        // of the experts' shares, over ln E: 1 is balance
};
// counts [layers * E]: pairs that chose each expert.
ExpertLoad expert_load(const vector<double>& counts, int num_experts);

struct StepMetrics {
  int64_t step = 0, steps = 0;  // counted from 1, and of the run
  double loss = 0;              // nats a label, over the global batch
  vector<double> balance_loss;  // [MoE layers], unscaled: 1 is balance; empty: not in use
  double learning_rate = 0;
  double gradient_norm = 0;  // before clipping
  bool clipped = false;
  bool skipped = false;           // not finite: the update was left out
  string router_forced;           // "balanced", or empty
  int64_t tokens = 0;             // of the global batch
  double seconds = 0;             // slowest rank, data to optimiser; no evaluation, no saving
  std::optional<double> mfu;      // share of the devices' peak
  double peak_memory_bytes = 0;   // of the fullest rank
  double checkpoint_stall_s = 0;  // waited for a save in the background
  double left_s = 0;              // of the run, estimated; not kept
  std::optional<double> eval_loss;
  ExpertLoad load;

  double tokens_per_second() const { return seconds > 0 ? double(tokens) / seconds : 0; }
  double mean_balance_loss() const;  // 0 if not in use
};

// "step 00000001/00000100 | step-time 0.123 sec | ..."; what is unknown or not in use is left out.
string step_line(const StepMetrics& metrics);
// In bytes, shares and seconds; a number that is not finite is null.
string step_json(const StepMetrics& metrics);

using AppendedFile = std::unique_ptr<FILE, int (*)(FILE*)>;
AppendedFile open_appended(const string& path);

// The run's metrics.jsonl: one object a step, whole lines only.
class MetricsFile {
 public:
  // Cuts an existing file back to the whole lines of steps up to `last_step`.
  MetricsFile(const string& path, int64_t last_step);
  // A line that does not fit on the disk is taken back whole, with a warning.
  void append(const StepMetrics& metrics);
  // Onto the disk itself; call before a checkpoint is sealed.
  void sync();

 private:
  void cut_back();
  string path_;
  AppendedFile file_;
  size_t size_ = 0;  // of the whole lines
};

// All whole lines. Exit code 2 naming the line if one is damaged.
vector<StepMetrics> read_metrics(const string& path);

}  // namespace pith
