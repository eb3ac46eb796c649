#include "observe/metrics.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <numeric>

#include "core/json.h"
#include "core/log.h"

namespace pith {

static ExpertLoad layer_load(vector<double> counts) {
  const double total = std::accumulate(counts.begin(), counts.end(), 0.0);
  if (total <= 0) return {};
  std::sort(counts.begin(), counts.end());
  const double E = double(counts.size()), mean = total / E;
  double entropy = 0, dead = 0;
  for (const double c : counts) {
    if (c > 0) entropy -= c / total * std::log(c / total);
    dead += c == 0;
  }
  const size_t p95 = (95 * counts.size() + 99) / 100 - 1;
  return {counts.back() / mean, counts[p95] / mean, dead / E, E > 1 ? entropy / std::log(E) : 1};
}

vector<ExpertLoad> expert_load(const vector<double>& counts, int num_experts) {
  vector<ExpertLoad> load;
  for (auto layer = counts.begin(); layer < counts.end(); layer += num_experts)
    load.push_back(layer_load({layer, layer + num_experts}));
  return load;
}

double StepMetrics::mean_balance_loss() const {
  if (balance_loss.empty()) return 0;
  return std::accumulate(balance_loss.begin(), balance_loss.end(), 0.0) /
         double(balance_loss.size());
}

string step_line(const StepMetrics& m) {
  string line = text("step %08ld/%08ld | step-time %.3f sec | cross-entropy-loss %.4f", m.step,
                     m.steps, m.seconds, m.loss);
  if (!m.balance_loss.empty()) line += text(" | load-balance-loss %.6f", m.mean_balance_loss());
  line += text(" | learning-rate %.6e | gradient-norm %.4f", m.learning_rate, m.gradient_norm);
  line += " | tokens-per-second " + with_commas(std::llround(m.tokens_per_second()));
  if (m.peak_memory_bytes > 0) line += " | peak-memory " + bytes_text(m.peak_memory_bytes);
  if (m.mfu > 0) line += text(" | mfu %.1f%%", 100 * m.mfu);
  if (m.eval_loss) line += text(" | eval-loss %.4f", *m.eval_loss);
  if (m.checkpoint_stall_s > 0) line += text(" | checkpoint-stall %.3f sec", m.checkpoint_stall_s);
  if (m.left_s > 0) line += " | left " + duration_text(m.left_s);
  if (m.skipped) line += " | UPDATE SKIPPED: not finite";
  if (m.forced_balanced) line += " | ROUTER FORCED: balanced";
  return line;
}

// What metrics.jsonl holds of every step, and of every layer as arrays.
template <class Of>
struct Field {
  const char* key;
  double Of::*number;
};
static constexpr Field<StepMetrics> kStepFields[] = {
    {"cross_entropy_loss", &StepMetrics::loss},
    {"learning_rate", &StepMetrics::learning_rate},
    {"gradient_norm", &StepMetrics::gradient_norm},
    {"step_time", &StepMetrics::seconds},
    {"peak_memory", &StepMetrics::peak_memory_bytes},
    {"checkpoint_stall", &StepMetrics::checkpoint_stall_s}};
static constexpr Field<ExpertLoad> kLoadFields[] = {{"expert_load_max", &ExpertLoad::max_over_mean},
                                                    {"expert_load_p95", &ExpertLoad::p95_over_mean},
                                                    {"expert_load_dead", &ExpertLoad::dead_share},
                                                    {"expert_load_entropy", &ExpertLoad::entropy}};

string step_json(const StepMetrics& m) {
  JsonWriter w;
  w.object().key("step").value(m.step).key("steps").value(m.steps);
  for (const auto& field : kStepFields) w.key(field.key).value(m.*field.number);
  w.key("clipped").value(m.clipped).key("skipped").value(m.skipped);
  w.key("tokens").value(m.tokens).key("tokens_per_second").value(m.tokens_per_second());
  if (m.mfu > 0) w.key("mfu").value(m.mfu);
  if (m.eval_loss) w.key("eval_loss").value(*m.eval_loss);
  if (m.forced_balanced) w.key("router_forced").value("balanced");
  if (!m.balance_loss.empty()) {
    w.key("load_balance_loss").value(m.mean_balance_loss());
    w.key("load_balance_loss_per_layer").array();
    for (const double loss : m.balance_loss) w.value(loss);
    w.end();
  }
  for (const auto& field : kLoadFields) {
    if (m.load.empty()) break;
    w.key(field.key).array();
    for (const ExpertLoad& load : m.load) w.value(load.*field.number);
    w.end();
  }
  return w.end().str();
}

// Numbers that are not finite were written as null.
static double number(const Json& value) { return value.is_null() ? NAN : value.as_double(); }

static StepMetrics parse_step(const Json& json) {
  StepMetrics m;
  m.step = json["step"].as_int(1);
  m.steps = json["steps"].as_int(0);
  for (const auto& field : kStepFields) m.*field.number = number(json[field.key]);
  m.clipped = json["clipped"].as_bool();
  m.skipped = json["skipped"].as_bool();
  m.tokens = json["tokens"].as_int(0);
  m.mfu = json.double_or("mfu", 0);
  if (json.has("eval_loss")) m.eval_loss = number(json["eval_loss"]);
  m.forced_balanced = json.has("router_forced");
  if (json.has("load_balance_loss_per_layer"))
    for (int64_t i = 0; i < json["load_balance_loss_per_layer"].size(); i++)
      m.balance_loss.push_back(number(json["load_balance_loss_per_layer"][i]));
  for (const auto& field : kLoadFields) {
    if (!json.has(field.key)) break;
    const Json values = json[field.key];
    m.load.resize(size_t(values.size()));
    for (size_t i = 0; i < m.load.size(); i++) m.load[i].*field.number = number(values[int64_t(i)]);
  }
  return m;
}

// The end of the whole lines of steps up to `last_step`. A line is taken for whole by its two ends:
// a long run's file need not be parsed to be continued.
static size_t kept_bytes(const string& bytes, int64_t last_step, const string& path) {
  size_t begin = 0;
  for (long step = 0, previous = 0; begin < bytes.size(); previous = step) {
    const size_t end = bytes.find('\n', begin);
    const bool whole = end != string::npos && bytes[end - 1] == '}' &&
                       sscanf(bytes.c_str() + begin, "{\"step\":%ld,", &step) == 1 &&
                       step > previous;
    if (!whole)
      log_warning("%s: damaged or cut short after step %ld: what follows is dropped", path.c_str(),
                  previous);
    if (!whole || step > last_step) break;
    begin = end + 1;
  }
  return begin;
}

MetricsFile::MetricsFile(const string& path, int64_t last_step) : path_(path) {
  file_.reset(fopen(path.c_str(), "ab"));
  if (!file_)
    failed(path, text("cannot be opened (%s)", strerror(errno)), "a folder that can be written to");
  setvbuf(file_.get(), nullptr, _IONBF, 0);
  size_ = kept_bytes(read_text_file(path), last_step, path);
  cut_back();
}

void MetricsFile::cut_back() {
  if (ftruncate(fileno(file_.get()), static_cast<off_t>(size_)) != 0)
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
