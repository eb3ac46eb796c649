// tensorboard: scalars as a TensorBoard event file: TFRecord frames with masked CRC-32C around
// Event protocol buffers (tensorflow/core/util/event.proto, summary.proto).
// defines: TensorBoardFile, crc32c
#pragma once
#include <utility>

#include "observe/metrics.h"

namespace pith {

class TensorBoardFile {
 public:
  // Begins FOLDER/events.out.tfevents.<seconds>.<host>.<pid>; the folder is created. With
  // `first_step` > 1 what earlier files of the folder say of steps from there on is voided.
  // `wall_s` is Unix time. Exit code 1 if it cannot be written.
  TensorBoardFile(const string& folder, int64_t first_step, double wall_s);
  // One event, written through at once. A failing write is a warning, and the last.
  void scalars(int64_t step, double wall_s, const vector<std::pair<string, double>>& values);
  // The step's numbers as train/..., infra/..., eval/... and expert-load... scalars.
  void step(const StepMetrics& metrics, double wall_s);
  const string& path() const { return path_; }

 private:
  void event(int64_t step, double wall_s, const string& fields);
  string path_;
  std::unique_ptr<FILE, int (*)(FILE*)> file_{nullptr, fclose};  // null once a write failed
};

// CRC-32C (Castagnoli, reflected 0x82f63b78), as in RFC 3720 B.4.
uint32_t crc32c(const string& bytes);

}  // namespace pith
