// metrics: the numbers of a step, as a log line, in metrics.jsonl and as TensorBoard events.
#pragma once
#include <cstdio>
#include <memory>
#include <optional>
#include <utility>

#include "core/check.h"

namespace pith {

// How a step's (token, slot) pairs spread over the E experts of each layer.
struct ExpertLoad {
  vector<double> max_over_mean;  // 1 is balance, E the worst
  vector<double> dead_share;     // of the experts
};
// counts [layers * E]
ExpertLoad expert_load(const vector<double>& counts, int num_experts);

struct StepMetrics {
  int64_t step = 0, steps = 0;  // from 1, and of the run
  double loss = 0;              // nats a label
  vector<double> balance_loss;  // [layers], unscaled: 1 is balance; empty: not in use
  double learning_rate = 0;
  double gradient_norm = 0;  // before clipping
  bool clipped = false;
  bool skipped = false;  // not finite: the update was left out
  string router_forced;  // "balanced", or empty
  int64_t tokens = 0;    // of the global batch
  double seconds = 0;    // of the slowest rank, without evaluation and saving
  std::optional<double> mfu;
  double peak_memory_bytes = 0;   // of the fullest rank
  double checkpoint_stall_s = 0;  // waited for a save in the background
  double left_s = 0;              // of the run; not kept
  std::optional<double> eval_loss;
  ExpertLoad load;

  double tokens_per_second() const { return seconds > 0 ? double(tokens) / seconds : 0; }
  double mean_balance_loss() const;  // 0 if not in use
};

// What is unknown or not in use is left out.
string step_line(const StepMetrics& metrics);
string step_json(const StepMetrics& metrics);

using AppendedFile = std::unique_ptr<FILE, int (*)(FILE*)>;

// metrics.jsonl: one object a step, whole lines only.
class MetricsFile {
 public:
  // Cuts an existing file back to the whole lines of steps up to `last_step`.
  MetricsFile(const string& path, int64_t last_step);
  // A line that does not fit on the disk is taken back whole, with a warning.
  void append(const StepMetrics& metrics);
  // Call before a checkpoint is sealed.
  void sync();

 private:
  void cut_back(size_t size);
  string path_;
  AppendedFile file_;
};

// Exit code 2 naming the line if one is damaged.
vector<StepMetrics> read_metrics(const string& path);

class TensorBoardFile {
 public:
  // In a new file of the folder. With `first_step` > 1 what earlier ones say of steps from there on
  // is voided. `wall_s` is Unix time.
  TensorBoardFile(const string& folder, int64_t first_step, double wall_s);
  // A failing write is a warning, and the last.
  void scalars(int64_t step, double wall_s, const vector<std::pair<string, double>>& values);
  void step(const StepMetrics& metrics, double wall_s);
  const string& path() const { return path_; }

 private:
  void event(int64_t step, double wall_s, const string& fields);
  string path_;
  AppendedFile file_;  // null once a write failed
};

// CRC-32C, as in RFC 3720 B.4.
uint32_t crc32c(const string& bytes);

}  // namespace pith
