// metrics: the numbers of a step: as a log line, and as a line of metrics.jsonl.
// defines: ExpertLoad, expert_load, StepMetrics, step_line, step_json, MetricsFile, read_metrics
#pragma once
#include <cstdio>
#include <memory>
#include <optional>

#include "core/check.h"

namespace pith {

// How a layer's (token, slot) pairs of a step spread over its E experts; all zero without pairs.
struct ExpertLoad {
  double max_over_mean = 0;  // fullest expert's pairs over the mean; 1 is balance, E the worst
  double p95_over_mean = 0;  // 95th percentile (nearest rank) over the mean
  double dead_share = 0;     // share of the experts without a token
  double entropy = 0;        // of the experts' shares, over ln E: 1 is balance, 0 one expert
};
// Of each layer; counts [layers * E]: pairs that chose each expert.
vector<ExpertLoad> expert_load(const vector<double>& counts, int num_experts);

struct StepMetrics {
  int64_t step = 0, steps = 0;  // step counts from 1; steps of the run
  double loss = 0;              // nats a label, over the global batch
  vector<double> balance_loss;  // [MoE layers], unscaled: 1 is balance; empty: not in use
  double learning_rate = 0;
  double gradient_norm = 0;  // before clipping
  bool clipped = false;
  bool skipped = false;             // not finite: the update was left out
  bool forced_balanced = false;     // router.force = "balanced"
  int64_t tokens = 0;               // of the global batch
  double seconds = 0;               // slowest rank, data to optimiser; no evaluation, no saving
  double mfu = 0;                   // share of the devices' peak; 0: unknown
  double peak_memory_bytes = 0;     // handed out by the allocator of the fullest rank
  double checkpoint_stall_s = 0;    // the step waited for a save in the background
  double left_s = 0;                // estimate for the rest of the run, not kept; 0: not shown
  std::optional<double> eval_loss;  // nats a label, if evaluated after this step
  vector<ExpertLoad> load;          // [MoE layers]; empty: not counted

  double tokens_per_second() const { return seconds > 0 ? tokens / seconds : 0; }
  double mean_balance_loss() const;  // over the layers; 0 if empty
};

// "step 00000001/00000100 | step-time 0.123 sec | cross-entropy-loss 4.1234 | ..."; what is unknown
// or not in use is left out.
string step_line(const StepMetrics& metrics);
// One JSON object, no newline: the words of the step line with underscores ("cross_entropy_loss"),
// in plain units (bytes, shares, seconds), and arrays over the MoE layers. A number that is not
// finite is null.
string step_json(const StepMetrics& metrics);

// The run's metrics.jsonl: one object a step, whole lines only.
class MetricsFile {
 public:
  // Creates the file, or cuts it back to the steps up to `last_step` that it has (0: none), so
  // that the next append continues there. From a torn or damaged line on all is dropped, with a
  // warning. Exit code 1 if the file cannot be written.
  MetricsFile(const string& path, int64_t last_step);
  // Written through at once. A line that does not fit on the disk is taken back whole, with a
  // warning: training goes on.
  void append(const StepMetrics& metrics);
  // Onto the disk itself; call before a checkpoint is sealed.
  void sync();

 private:
  void cut_back();
  string path_;
  std::unique_ptr<FILE, int (*)(FILE*)> file_{nullptr, fclose};
  size_t size_ = 0;  // of the whole lines
};

// All whole lines of a metrics.jsonl, a torn last one left out. Exit code 2 naming the line if one
// is damaged, or the path if there is no file.
vector<StepMetrics> read_metrics(const string& path);

}  // namespace pith
