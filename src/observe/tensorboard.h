// tensorboard: scalars as a TensorBoard event file.
#pragma once
#include <utility>

#include "observe/metrics.h"

namespace pith {

class TensorBoardFile {
 public:
  // FOLDER/events.out.tfevents.<seconds>.<host>.<pid>. With `first_step` > 1 what earlier files of
  // the folder say of steps from there on is voided. `wall_s` is Unix time.
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
