#include "observe/metrics.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "core/json.h"
#include "core/log.h"

namespace pith {

static ExpertLoad layer_load(std::vector<double> counts) {
    const double total = std::accumulate(counts.begin(), counts.end(), 0.0);
    if (total <= 0) return {};
    std::sort(counts.begin(), counts.end());
    const size_t E = counts.size(), p95 = (95 * E + 99) / 100 - 1;
    const double mean = total / static_cast<double>(E);
    double entropy = 0;
    for (const double c : counts)
        if (c > 0) entropy -= c / total * std::log(c / total);
    const auto dead = std::upper_bound(counts.begin(), counts.end(), 0.0) - counts.begin();
    return {counts.back() / mean, counts[p95] / mean,
            static_cast<double>(dead) / static_cast<double>(E),
            E > 1 ? entropy / std::log(static_cast<double>(E)) : 1};
}

std::vector<ExpertLoad> expert_load(const std::vector<double>& counts, int num_experts) {
    if (num_experts < 1 || counts.size() % static_cast<size_t>(num_experts) != 0)
        failed("expert_load",
               text("counts are not [layers, experts] (got %zu, need a multiple of %d)",
                    counts.size(), num_experts));
    std::vector<ExpertLoad> load;
    for (auto layer = counts.begin(); layer != counts.end(); layer += num_experts)
        load.push_back(layer_load({layer, layer + num_experts}));
    return load;
}

double StepMetrics::mean_balance_loss() const {
    if (balance_loss.empty()) return 0;
    return std::accumulate(balance_loss.begin(), balance_loss.end(), 0.0) /
           static_cast<double>(balance_loss.size());
}

std::string step_line(const StepMetrics& m) {
    std::string line =
        text("step %08lld/%08lld | step-time %.3f sec | cross-entropy-loss %.4f",
             static_cast<long long>(m.step), static_cast<long long>(m.steps), m.seconds, m.loss);
    if (!m.balance_loss.empty()) line += text(" | load-balance-loss %.6f", m.mean_balance_loss());
    line += text(" | learning-rate %.6e | gradient-norm %.4f", m.learning_rate, m.gradient_norm);
    line += " | tokens-per-second " + with_commas(std::llround(m.tokens_per_second()));
    if (m.peak_memory_bytes > 0) line += " | peak-memory " + bytes_text(m.peak_memory_bytes);
    if (m.mfu > 0) line += text(" | mfu %.1f%%", 100 * m.mfu);
    if (m.eval_loss) line += text(" | eval-loss %.4f", *m.eval_loss);
    if (m.checkpoint_stall_s > 0)
        line += text(" | checkpoint-stall %.3f sec", m.checkpoint_stall_s);
    if (m.left_s > 0) line += " | left " + duration_text(m.left_s);
    if (m.skipped) line += " | UPDATE SKIPPED: not finite";
    if (m.forced_balanced) line += " | ROUTER FORCED: balanced";
    return line;
}

// The arrays over the MoE layers of one field.
struct LoadField {
    const char* key;
    double ExpertLoad::*field;
};
static constexpr LoadField kLoadFields[] = {{"expert_load_max", &ExpertLoad::max_over_mean},
                                            {"expert_load_p95", &ExpertLoad::p95_over_mean},
                                            {"expert_load_dead", &ExpertLoad::dead_share},
                                            {"expert_load_entropy", &ExpertLoad::entropy}};

std::string step_json(const StepMetrics& m) {
    JsonWriter w;
    w.object().key("step").value(m.step).key("steps").value(m.steps);
    w.key("cross_entropy_loss").value(m.loss);
    if (!m.balance_loss.empty()) {
        w.key("load_balance_loss").value(m.mean_balance_loss());
        w.key("load_balance_loss_per_layer").array();
        for (const double loss : m.balance_loss) w.value(loss);
        w.end();
    }
    w.key("learning_rate").value(m.learning_rate).key("gradient_norm").value(m.gradient_norm);
    w.key("clipped").value(m.clipped).key("skipped").value(m.skipped);
    w.key("tokens").value(m.tokens).key("step_time").value(m.seconds);
    w.key("tokens_per_second").value(m.tokens_per_second());
    if (m.mfu > 0) w.key("mfu").value(m.mfu);
    w.key("peak_memory").value(m.peak_memory_bytes);
    w.key("checkpoint_stall").value(m.checkpoint_stall_s);
    if (m.eval_loss) w.key("eval_loss").value(*m.eval_loss);
    if (m.forced_balanced) w.key("router_forced").value("balanced");
    for (const LoadField& f : kLoadFields) {
        if (m.load.empty()) break;
        w.key(f.key).array();
        for (const ExpertLoad& load : m.load) w.value(load.*f.field);
        w.end();
    }
    return w.end().str();
}

// Numbers that are not finite were written as null.
static double number(const Json& value) {
    return value.is_null() ? std::numeric_limits<double>::quiet_NaN() : value.as_double();
}

static StepMetrics parse_step(const Json& json) {
    StepMetrics m;
    m.step = json["step"].as_int(1);
    m.steps = json["steps"].as_int(0);
    m.loss = number(json["cross_entropy_loss"]);
    if (json.has("load_balance_loss_per_layer"))
        for (int64_t i = 0; i < json["load_balance_loss_per_layer"].size(); i++)
            m.balance_loss.push_back(number(json["load_balance_loss_per_layer"][i]));
    m.learning_rate = number(json["learning_rate"]);
    m.gradient_norm = number(json["gradient_norm"]);
    m.clipped = json["clipped"].as_bool();
    m.skipped = json["skipped"].as_bool();
    m.forced_balanced = json.has("router_forced");
    m.tokens = json["tokens"].as_int(0);
    m.seconds = number(json["step_time"]);
    m.mfu = json.double_or("mfu", 0);
    m.peak_memory_bytes = number(json["peak_memory"]);
    m.checkpoint_stall_s = number(json["checkpoint_stall"]);
    if (json.has("eval_loss")) m.eval_loss = number(json["eval_loss"]);
    for (const LoadField& f : kLoadFields) {
        if (!json.has(f.key)) continue;
        const Json values = json[f.key];
        m.load.resize(static_cast<size_t>(values.size()));
        for (int64_t i = 0; i < values.size(); i++)
            m.load[static_cast<size_t>(i)].*f.field = number(values[i]);
    }
    return m;
}

// The end of the whole lines of steps up to `last_step`. A line is taken for whole by its two ends:
// a long run's file need not be parsed to be continued.
static size_t kept_bytes(const std::string& bytes, int64_t last_step, const std::string& path) {
    size_t begin = 0;
    for (int64_t line = 1, previous = 0; begin < bytes.size(); line++) {
        const size_t end = bytes.find('\n', begin);
        if (end == std::string::npos) return begin;
        long long step = 0;
        const std::string head = bytes.substr(begin, 32);
        const bool whole = sscanf(head.c_str(), "{\"step\":%lld,", &step) == 1 &&
                           bytes[end - 1] == '}' && step > previous;
        if (!whole)
            log_warning("%s: line %lld is damaged: it and what follows are dropped", path.c_str(),
                        static_cast<long long>(line));
        if (!whole || step > last_step) return begin;
        previous = step;
        begin = end + 1;
    }
    return begin;
}

static std::string reason() { return strerror(errno); }

MetricsFile::MetricsFile(const std::string& path, int64_t last_step) : path_(path) {
    fd_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd_ < 0)
        failed(path, "cannot be opened (" + reason() + ")", "a folder that can be written to");
    try {
        size_ = static_cast<int64_t>(kept_bytes(read_text_file(path), last_step, path));
        if (ftruncate(fd_, size_) != 0 || fsync(fd_) != 0)
            failed(path, "cannot be cut back (" + reason() + ")", "check the disk");
    } catch (...) {
        close(fd_);
        throw;
    }
}

MetricsFile::~MetricsFile() { close(fd_); }

void MetricsFile::append(const StepMetrics& metrics) {
    const std::string line = step_json(metrics) + "\n";
    size_t done = 0;
    while (done < line.size()) {
        const ssize_t n =
            pwrite(fd_, line.data() + done, line.size() - done, size_ + static_cast<int64_t>(done));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
            log_warning("%s: step %lld is not recorded: cannot be written (%s)", path_.c_str(),
                        static_cast<long long>(metrics.step), reason().c_str());
            // The next line would overwrite what is left; it may be shorter.
            if (ftruncate(fd_, size_) != 0)
                failed(path_, "cannot be cut back (" + reason() + ")", "check the disk");
            return;
        }
        done += static_cast<size_t>(n);
    }
    size_ += static_cast<int64_t>(done);
}

void MetricsFile::sync() {
    if (fsync(fd_) != 0)
        log_warning("%s: cannot be flushed to disk (%s)", path_.c_str(), reason().c_str());
}

std::vector<StepMetrics> read_metrics(const std::string& path) {
    const std::string bytes = read_text_file(path);
    std::vector<StepMetrics> steps;
    size_t begin = 0;
    for (int64_t line = 1;; line++) {
        const size_t end = bytes.find('\n', begin);
        if (end == std::string::npos) return steps;
        steps.push_back(parse_step(
            Json::parse(bytes.substr(begin, end - begin),
                        text("%s: line %lld", path.c_str(), static_cast<long long>(line)))));
        begin = end + 1;
    }
}

}  // namespace pith
