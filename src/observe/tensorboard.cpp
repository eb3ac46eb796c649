#include "observe/tensorboard.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "core/log.h"
#include "data/durable.h"

namespace pith {

uint32_t crc32c(const string& bytes) {
  uint32_t crc = ~0u;
  for (const char byte : bytes) {
    crc ^= uint8_t(byte);
    for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
  }
  return ~crc;
}

template <class T>
static string fixed(T value) {
  return {reinterpret_cast<const char*>(&value), sizeof value};
}

static string varint(uint64_t value) {
  string bytes;
  for (; value >= 128; value >>= 7) bytes += char(value | 128);
  return bytes + char(value);
}

// Protobuf fields: the tag is number << 3 | wire type (0 varint, 1 64 bits, 2 bytes, 5 32 bits).
static string field(int number, const string& bytes) {
  return varint(number << 3 | 2) + varint(bytes.size()) + bytes;
}
static string field(int number, int64_t value) { return varint(number << 3) + varint(value); }
static string field(int number, double value) { return varint(number << 3 | 1) + fixed(value); }
static string field(int number, float value) { return varint(number << 3 | 5) + fixed(value); }

// A CRC as TFRecord keeps it (tensorflow/core/lib/hash/crc32c.h).
static string masked_crc(const string& bytes) {
  const uint32_t crc = crc32c(bytes);
  return fixed((crc >> 15 | crc << 17) + 0xa282ead8u);
}

static string event_file(const string& folder, double wall_s) {
  make_folders(folder);
  char host[256] = "localhost";
  gethostname(host, sizeof host - 1);
  return folder + text("/events.out.tfevents.%010ld.%s.%d", int64_t(wall_s), host, int(getpid()));
}

// tensorflow/core/util/event.proto: wall_time = 1, step = 2, file_version = 3, summary = 5,
// session_log = 7 {status = 1: START = 1}; a summary is value = 1 {tag = 1, simple_value = 2}.
TensorBoardFile::TensorBoardFile(const string& folder, int64_t first_step, double wall_s)
    : path_(event_file(folder, wall_s)), file_(open_appended(path_)) {
  event(0, wall_s, field(3, string("brain.Event:2")));
  if (first_step > 1) event(first_step, wall_s, field(7, field(1, int64_t{1})));
}

void TensorBoardFile::event(int64_t step, double wall_s, const string& fields) {
  if (!file_) return;
  const string data = field(1, wall_s) + (step ? field(2, step) : "") + fields;
  const string length = fixed(uint64_t(data.size()));
  const string bytes = length + masked_crc(length) + data + masked_crc(data);
  if (fwrite(bytes.data(), 1, bytes.size(), file_.get()) == bytes.size()) return;
  // Readers stop at a torn frame, so nothing may follow it.
  log_warning("%s: cannot be written (%s): no more events", path_.c_str(), strerror(errno));
  file_.reset();
}

void TensorBoardFile::scalars(int64_t step, double wall_s,
                              const vector<std::pair<string, double>>& values) {
  string summary;
  for (const auto& [tag, value] : values)
    summary += field(1, field(1, tag) + field(2, float(value)));
  event(step, wall_s, field(5, summary));
}

void TensorBoardFile::step(const StepMetrics& m, double wall_s) {
  vector<std::pair<string, double>> values = {
      {"train/cross-entropy-loss", m.loss},
      {"train/learning-rate", m.learning_rate},
      {"train/gradient-norm", m.gradient_norm},
      {"infra/step-time", m.seconds},
      {"infra/tokens-per-second", m.tokens_per_second()},
      {"infra/peak-memory-gib", m.peak_memory_bytes / (1 << 30)}};
  if (!m.balance_loss.empty())
    values.emplace_back("train/load-balance-loss", m.mean_balance_loss());
  if (m.mfu) values.emplace_back("infra/mfu", *m.mfu);
  if (m.eval_loss) values.emplace_back("eval/cross-entropy-loss", *m.eval_loss);
  scalars(m.step, wall_s, values);
}

}  // namespace pith
