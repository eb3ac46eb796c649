#include "observe/metrics.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>

#include "core/json.h"
#include "core/log.h"

namespace pith {

ExpertLoad expert_load(const vector<double>& counts, int num_experts) {
  ExpertLoad load;
  for (auto layer = counts.begin(); layer < counts.end(); layer += num_experts) {
    double total = 0, most = 0, used = 0, entropy = 0;
    for (auto count = layer; count < layer + num_experts; count++) total += *count;
    for (auto count = layer; count < layer + num_experts; count++) {
      if (*count == 0) continue;
      most = std::max(most, *count);
      used++;
      entropy -= *count / total * std::log(*count / total);
    }
    const double E = num_experts;
    load.max_over_mean.push_back(total > 0 ? most * E / total : 0);
    load.dead_share.push_back(total > 0 ? (E - used) / E : 0);
    load.entropy.push_back(num_experts > 1 ? entropy / std::log(E) : total > 0);
  }
  return load;
}

double StepMetrics::mean_balance_loss() const {
  double sum = 0;
  for (const double layer : balance_loss) sum += layer;
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

// A line of metrics.jsonl: `io` writes or reads each field; what is derived is read in vain.
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
  io("expert_load_dead", m.load.dead_share);
  io("expert_load_entropy", m.load.entropy);
}

string step_json(const StepMetrics& m) {
  JsonWriter w;
  w.object();
  each_field(m, [&]<class T>(const char* key, const T& value) {
    if constexpr (std::is_same_v<T, vector<double>> || std::is_same_v<T, string>)
      if (value.empty()) return;
    if constexpr (std::is_same_v<T, std::optional<double>>)
      if (!value) return;
    w.key(key);
    if constexpr (std::is_same_v<T, vector<double>>) {
      w.array();
      for (const double number : value) w.value(number);
      w.end();
    } else if constexpr (std::is_same_v<T, std::optional<double>>) {
      w.value(*value);
    } else {
      w.value(value);
    }
  });
  return w.end().str();
}

// Numbers that are not finite were written as null.
static double number(const Json& value) { return value.is_null() ? NAN : value.as_double(); }

static StepMetrics parse_step(const Json& line) {
  StepMetrics m;
  each_field(m, [&]<class T>(const char* key, T& value) {
    if constexpr (std::is_same_v<T, int64_t>)
      value = line[key].as_int(0);
    else if constexpr (std::is_same_v<T, bool>)
      value = line[key].as_bool();
    else if constexpr (std::is_same_v<T, double>)
      value = number(line[key]);
    else if (!line.has(key))
      return;
    else if constexpr (std::is_same_v<T, string>)
      value = line[key].as_string();
    else if constexpr (std::is_same_v<T, std::optional<double>>)
      value = number(line[key]);
    else
      for (int64_t i = 0; i < line[key].size(); i++) value.push_back(number(line[key][i]));
  });
  return m;
}

AppendedFile open_appended(const string& path) {
  AppendedFile file(fopen(path.c_str(), "ab"), fclose);
  if (!file)
    failed(path, text("cannot be opened (%s)", strerror(errno)), "a folder that can be written to");
  setvbuf(file.get(), nullptr, _IONBF, 0);
  return file;
}

// The end of the lines of steps up to `last_step`. A line is taken for whole by its two ends.
static size_t kept_bytes(const string& bytes, int64_t last_step, const string& path) {
  const string start = "{\"step\":";
  size_t begin = 0;
  for (int64_t step = 0, previous = 0; begin < bytes.size(); previous = step) {
    const size_t end = bytes.find('\n', begin);
    step = atol(bytes.c_str() + std::min(begin + start.size(), bytes.size()));
    const bool whole = end != string::npos && bytes[end - 1] == '}' &&
                       bytes.compare(begin, start.size(), start) == 0 && step > previous;
    if (!whole)
      log_warning("%s: damaged or cut short after step %ld: what follows is dropped", path.c_str(),
                  previous);
    if (!whole || step > last_step) break;
    begin = end + 1;
  }
  return begin;
}

MetricsFile::MetricsFile(const string& path, int64_t last_step)
    : path_(path),
      file_(open_appended(path)),
      size_(kept_bytes(read_text_file(path), last_step, path)) {
  cut_back();
}

void MetricsFile::cut_back() {
  if (ftruncate(fileno(file_.get()), off_t(size_)) != 0)
    failed(path_, text("cannot be cut back (%s)", strerror(errno)), "check the disk");
}

void MetricsFile::append(const StepMetrics& metrics) {
  const string line = step_json(metrics) + "\n";
  if (fwrite(line.data(), 1, line.size(), file_.get()) == line.size()) {
    size_ += line.size();
    return;
  }
  log_warning("%s: step %ld is not recorded: cannot be written (%s)", path_.c_str(), metrics.step,
              strerror(errno));
  cut_back();
}

void MetricsFile::sync() {
  if (fsync(fileno(file_.get())) != 0)
    log_warning("%s: cannot be flushed to disk (%s)", path_.c_str(), strerror(errno));
}

vector<StepMetrics> read_metrics(const string& path) {
  const string bytes = read_text_file(path);
  vector<StepMetrics> steps;
  for (size_t begin = 0, end; (end = bytes.find('\n', begin)) != string::npos; begin = end + 1)
    steps.push_back(parse_step(Json::parse(bytes.substr(begin, end - begin),
                                           text("%s: line %zu", path.c_str(), steps.size() + 1))));
  return steps;
}

}  // namespace pith
