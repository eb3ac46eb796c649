#include "observe/metrics.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <numeric>

#include "core/json.h"
#include "core/log.h"
#include "data/durable.h"

namespace pith {

ExpertLoad expert_load(const vector<double>& counts, int num_experts) {
  ExpertLoad load;
  for (auto layer = counts.begin(); layer < counts.end(); layer += num_experts) {
    vector<double> sorted(layer, layer + num_experts);
    std::sort(sorted.begin(), sorted.end());
    const double total = std::accumulate(sorted.begin(), sorted.end(), 0.0), E = num_experts;
    const auto of_mean = [&](double count) { return total > 0 ? count / (total / E) : 0; };
    double entropy = 0;
    for (const double c : sorted)
      if (c > 0) entropy -= c / total * std::log(c / total);
    load.max_over_mean.push_back(of_mean(sorted.back()));
    load.p95_over_mean.push_back(of_mean(sorted[(95 * num_experts + 99) / 100 - 1]));
    load.dead_share.push_back(total > 0 ? double(std::ranges::count(sorted, 0)) / E : 0);
    load.entropy.push_back(num_experts > 1 ? entropy / std::log(E) : total > 0);
  }
  return load;
}

double StepMetrics::mean_balance_loss() const {
  const double sum = std::accumulate(balance_loss.begin(), balance_loss.end(), 0.0);
  return balance_loss.empty() ? 0 : sum / double(balance_loss.size());
}

string step_line(const StepMetrics& m) {
  string line = text("step %08ld/%08ld | step-time %.3f sec | cross-entropy-loss %.4f", m.step,
                     m.steps, m.seconds, m.loss);
  if (!m.balance_loss.empty()) line += text(" | load-balance-loss %.6f", m.mean_balance_loss());
  line += text(" | learning-rate %.6e | gradient-norm %.4f", m.learning_rate, m.gradient_norm);
  line += " | tokens-per-second " + with_commas(std::llround(m.tokens_per_second()));
  if (m.peak_memory_bytes > 0) line += " | peak-memory " + bytes_text(m.peak_memory_bytes);
  if (m.mfu) line += text(" | mfu %.1f%%", 100 * *m.mfu);
  if (m.eval_loss) line += text(" | eval-loss %.4f", *m.eval_loss);
  if (m.checkpoint_stall_s > 0) line += text(" | checkpoint-stall %.3f sec", m.checkpoint_stall_s);
  if (m.left_s > 0) line += " | left " + duration_text(m.left_s);
  if (m.skipped) line += " | UPDATE SKIPPED: not finite";
  if (!m.router_forced.empty()) line += " | ROUTER FORCED: " + m.router_forced;
  return line;
}

// `io` writes or reads each field of a line.
template <class Metrics, class Io>
static void each_field(Metrics& m, Io io) {
  double rate = m.tokens_per_second();
  std::optional<double> balance;
  if (!m.balance_loss.empty()) balance = m.mean_balance_loss();
  io("step", m.step);
  io("steps", m.steps);
  io("cross_entropy_loss", m.loss);
  io("learning_rate", m.learning_rate);
  io("gradient_norm", m.gradient_norm);
  io("step_time", m.seconds);
  io("peak_memory", m.peak_memory_bytes);
  io("checkpoint_stall", m.checkpoint_stall_s);
  io("clipped", m.clipped);
  io("skipped", m.skipped);
  io("tokens", m.tokens);
  io("tokens_per_second", rate);
  io("mfu", m.mfu);
  io("eval_loss", m.eval_loss);
  io("router_forced", m.router_forced);
  io("load_balance_loss", balance);
  io("load_balance_loss_per_layer", m.balance_loss);
  io("expert_load_max", m.load.max_over_mean);
  io("expert_load_p95", m.load.p95_over_mean);
  io("expert_load_dead", m.load.dead_share);
  io("expert_load_entropy", m.load.entropy);
}

struct LineWriter {
  JsonWriter& w;
  void operator()(const char* key, const auto& value) { w.key(key).value(value); }
  void operator()(const char* key, const std::optional<double>& value) {
    if (value) w.key(key).value(*value);
  }
  void operator()(const char* key, const string& value) {
    if (!value.empty()) w.key(key).value(value);
  }
  void operator()(const char* key, const vector<double>& values) {
    if (values.empty()) return;
    w.key(key).array();
    for (const double value : values) w.value(value);
    w.end();
  }
};

string step_json(const StepMetrics& m) {
  JsonWriter w;
  w.object();
  each_field(m, LineWriter{w});
  return w.end().str();
}

// Numbers that are not finite were written as null.
static double number(const Json& value) { return value.is_null() ? NAN : value.as_double(); }

struct LineReader {
  const Json& line;
  void operator()(const char* key, i64& value) { value = line[key].as_int(0); }
  void operator()(const char* key, bool& value) { value = line[key].as_bool(); }
  void operator()(const char* key, double& value) { value = number(line[key]); }
  void operator()(const char* key, string& value) { value = line.string_or(key, ""); }
  void operator()(const char* key, std::optional<double>& value) {
    if (line.has(key)) value = number(line[key]);
  }
  void operator()(const char* key, vector<double>& values) {
    for (i64 i = 0; line.has(key) && i < line[key].size(); i++)
      values.push_back(number(line[key][i]));
  }
};

static AppendedFile open_appended(const string& path) {
  AppendedFile file(fopen(path.c_str(), "ab"), fclose);
  if (!file)
    failed(path, text("cannot be opened (%s)", strerror(errno)), "a folder that can be written to");
  setvbuf(file.get(), nullptr, _IONBF, 0);
  return file;
}

static bool write_all(const AppendedFile& file, const string& bytes) {
  return fwrite(bytes.data(), 1, bytes.size(), file.get()) == bytes.size();
}

// The end of the lines up to `last_step`, taken for whole by their two ends.
static size_t kept_bytes(const string& bytes, i64 last_step, const string& path) {
  size_t begin = 0;
  for (i64 step = 0, previous = 0; begin < bytes.size(); previous = step) {
    const size_t end = bytes.find('\n', begin);
    const string start = bytes.substr(begin, 30);
    const bool whole = end != string::npos && bytes[end - 1] == '}' &&
                       sscanf(start.c_str(), "{\"step\":%ld,", &step) == 1 && step > previous;
    if (!whole)
      log_warning("%s: damaged or cut short after step %ld: what follows is dropped", path.c_str(),
                  previous);
    if (!whole || step > last_step) break;
    begin = end + 1;
  }
  return begin;
}

MetricsFile::MetricsFile(const string& path, i64 last_step)
    : path_(path), file_(open_appended(path)) {
  cut_back(kept_bytes(read_text_file(path), last_step, path));
}

void MetricsFile::cut_back(size_t size) {
  if (ftruncate(fileno(file_.get()), off_t(size)) != 0)
    failed(path_, text("cannot be cut back (%s)", strerror(errno)), "check the disk");
}

void MetricsFile::append(const StepMetrics& metrics) {
  const off_t before = lseek(fileno(file_.get()), 0, SEEK_END);
  if (write_all(file_, step_json(metrics) + "\n")) return;
  log_warning("%s: step %ld is not recorded: cannot be written (%s)", path_.c_str(), metrics.step,
              strerror(errno));
  cut_back(size_t(before));
}

void MetricsFile::sync() {
  if (fsync(fileno(file_.get())) != 0)
    log_warning("%s: cannot be flushed to disk (%s)", path_.c_str(), strerror(errno));
}

vector<StepMetrics> read_metrics(const string& path) {
  const string bytes = read_text_file(path);
  vector<StepMetrics> steps;
  for (size_t begin = 0, end; (end = bytes.find('\n', begin)) != string::npos; begin = end + 1) {
    const string place = text("%s: line %zu", path.c_str(), steps.size() + 1);
    const Json line = Json::parse(bytes.substr(begin, end - begin), place);
    each_field(steps.emplace_back(), LineReader{line});
  }
  return steps;
}

u32 crc32c(const string& bytes) {
  u32 crc = ~0u;
  for (const char byte : bytes) {
    crc ^= u8(byte);
    for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
  }
  return ~crc;
}

template <class T>
static string fixed(T value) {
  return {reinterpret_cast<const char*>(&value), sizeof value};
}

static string varint(u64 value) {
  string bytes;
  for (; value >= 128; value >>= 7) bytes += char(value | 128);
  return bytes + char(value);
}

// Protobuf: number << 3 | wire type (0 varint, 1 64 bits, 2 bytes, 5 32 bits).
static string field(int number, const string& bytes) {
  return varint(number << 3 | 2) + varint(bytes.size()) + bytes;
}
static string field(int number, i64 value) { return varint(number << 3) + varint(value); }
static string field(int number, double value) { return varint(number << 3 | 1) + fixed(value); }
static string field(int number, float value) { return varint(number << 3 | 5) + fixed(value); }

// As TFRecord keeps it.
static string masked_crc(const string& bytes) {
  const u32 crc = crc32c(bytes);
  return fixed((crc >> 15 | crc << 17) + 0xa282ead8u);
}

static string event_file(const string& folder, double wall_s) {
  make_folders(folder);
  char host[256] = "localhost";
  gethostname(host, sizeof host - 1);
  return folder + text("/events.out.tfevents.%010ld.%s.%d", i64(wall_s), host, int(getpid()));
}

// event.proto: 1 wall_time, 2 step, 3 file_version, 5 summary {1 value {1 tag, 2 simple_value}},
// 7 session_log {1 status}.
TensorBoardFile::TensorBoardFile(const string& folder, i64 first_step, double wall_s)
    : path_(event_file(folder, wall_s)), file_(open_appended(path_)) {
  event(0, wall_s, field(3, string("brain.Event:2")));
  if (first_step > 1) event(first_step, wall_s, field(7, field(1, i64{1})));
}

void TensorBoardFile::event(i64 step, double wall_s, const string& fields) {
  if (!file_) return;
  const string data = field(1, wall_s) + (step ? field(2, step) : "") + fields;
  const string length = fixed(u64(data.size()));
  const string bytes = length + masked_crc(length) + data + masked_crc(data);
  if (write_all(file_, bytes)) return;
  // Readers stop at a torn frame, so nothing may follow it.
  log_warning("%s: cannot be written (%s): no more events", path_.c_str(), strerror(errno));
  file_.reset();
}

void TensorBoardFile::scalars(i64 step, double wall_s,
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
  for (size_t i = 0; i < m.load.entropy.size(); i++) {
    const string layer = text("/layer-%03zu", i);
    values.emplace_back("expert-load-max" + layer, m.load.max_over_mean[i]);
    values.emplace_back("expert-load-dead" + layer, m.load.dead_share[i]);
    values.emplace_back("expert-load-entropy" + layer, m.load.entropy[i]);
  }
  scalars(m.step, wall_s, values);
}

}
