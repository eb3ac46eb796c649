#include "observe/metrics.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <numeric>

#include "core/log.h"
#include "data/durable.h"

namespace pith {
namespace fs = std::filesystem;

ExpertLoad expert_load(const vector<double>& counts, int num_experts) {
  ExpertLoad load;
  double E = num_experts;
  for (auto layer = counts.begin(); layer < counts.end(); layer += num_experts) {
    auto end = layer + num_experts;
    double total = std::accumulate(layer, end, 0.0), most = *std::max_element(layer, end);
    double dead = double(std::count(layer, end, 0)), entropy = 0;
    for (auto n = layer; n < end; n++)
      if (*n > 0) entropy -= *n / total * std::log(*n / total);
    load.max_over_mean.push_back(total > 0 ? most / (total / E) : 0);
    load.dead_share.push_back(total > 0 ? dead / E : 0);
    load.entropy.push_back(num_experts > 1 ? entropy / std::log(E) : total > 0);
  }
  return load;
}

double StepMetrics::mean_balance_loss() const {
  double sum = std::accumulate(balance_loss.begin(), balance_loss.end(), 0.0);
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

string step_json(const StepMetrics& m) {
  JsonWriter w;
  w.object().members("step", m.step, "steps", m.steps, "cross_entropy_loss", m.loss,
      "learning_rate", m.learning_rate, "gradient_norm", m.gradient_norm, "step_time", m.seconds,
      "peak_memory", m.peak_memory_bytes, "checkpoint_stall", m.checkpoint_stall_s, "clipped",
      m.clipped, "skipped", m.skipped, "tokens", m.tokens, "tokens_per_second",
      m.tokens_per_second());
  if (m.mfu) w.members("mfu", *m.mfu);
  if (m.eval_loss) w.members("eval_loss", *m.eval_loss);
  if (!m.router_forced.empty()) w.members("router_forced", m.router_forced);
  if (!m.balance_loss.empty())
    w.members(
        "load_balance_loss", m.mean_balance_loss(), "load_balance_loss_per_layer", m.balance_loss);
  const ExpertLoad& load = m.load;
  if (!load.entropy.empty())
    w.members("expert_load_max", load.max_over_mean, "expert_load_dead", load.dead_share,
        "expert_load_entropy", load.entropy);
  return w.end().str();
}

static void append(const string& path, const string& bytes) {
  std::error_code error;
  auto before = fs::file_size(path, error);
  std::ofstream file(path, std::ios::app | std::ios::binary);
  if (file << bytes << std::flush) return;
  log_warning("%s: cannot be written (%s): a step is not recorded", path.c_str(), strerror(errno));
  file.close();
  fs::resize_file(path, before, error);
}

vector<Json> read_metrics(const string& path, i64 last_step, size_t* end) {
  string bytes = read_text_file(path);
  vector<Json> lines;
  size_t own_end;
  size_t& at = end ? *end : own_end;
  for (at = 0; at < bytes.size();) {
    string place = text("%s: line %zu", path.c_str(), lines.size() + 1);
    size_t newline = bytes.find('\n', at);
    if (newline == string::npos) bad_input(place, "is cut short", "removing it");
    Json line = Json::parse(bytes.substr(at, newline - at), place);
    if (line["step"].as_int() > last_step) break;
    lines.push_back(line);
    at = newline + 1;
  }
  return lines;
}

void begin_metrics(const string& path, i64 last_step) {
  if (!fs::exists(path)) write_file_durably(path, "");
  size_t end = fs::file_size(path);
  try {
    read_metrics(path, last_step, &end);
  } catch (const Error& error) {
    log_warning("%s; it and what follows are dropped", error.what());
  }
  fs::resize_file(path, end);
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

static string masked_crc(const string& bytes) {
  u32 crc = crc32c(bytes);
  return fixed((crc >> 15 | crc << 17) + 0xa282ead8u);
}

// event.proto: 1 wall_time, 2 step, 3 file_version, 5 summary {1 value {1 tag, 2 simple_value}},
// 7 session_log {1 status}.
static void append_event(const string& path, i64 step, double wall_s, const string& fields) {
  string data = field(1, wall_s) + (step ? field(2, step) : "") + fields;
  string length = fixed(u64(data.size()));
  append(path, length + masked_crc(length) + data + masked_crc(data));
}

string begin_events(const string& folder, i64 first_step, double wall_s) {
  make_folders(folder);
  string path = folder + text("/events.out.tfevents.%010ld.pith.%d", i64(wall_s), int(getpid()));
  append_event(path, 0, wall_s, field(3, string("brain.Event:2")));
  if (first_step > 1) append_event(path, first_step, wall_s, field(7, field(1, i64{1})));
  return path;
}

void append_scalars(
    const string& path, i64 step, double wall_s, const vector<std::pair<string, double>>& values) {
  string summary;
  for (const auto& [tag, value] : values)
    summary += field(1, field(1, tag) + field(2, float(value)));
  append_event(path, step, wall_s, field(5, summary));
}

void append_step(const string& metrics_path, const string& events_path, const StepMetrics& metrics,
    double wall_s) {
  string json = step_json(metrics);
  append(metrics_path, json + "\n");
  Json line = Json::parse(json, metrics_path);
  vector<std::pair<string, double>> values;
  for (const string& key : line.keys()) {
    Json value = line[key];
    if (value.is_number()) values.emplace_back("step/" + key, value.as_double());
    for (i64 i = 0; value.is_array() && i < value.size(); i++)
      if (value[i].is_number())
        values.emplace_back(text("%s/layer-%03ld", key.c_str(), i), value[i].as_double());
  }
  append_scalars(events_path, metrics.step, wall_s, values);
}

}
