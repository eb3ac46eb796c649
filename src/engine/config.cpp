#include "engine/config.h"

#include <toml++/toml.h>
#include <algorithm>
#include <cfloat>
#include <filesystem>
#include <sstream>
#include <variant>

#include "core/json.h"
#include "data/dataset.h"

namespace pith {
namespace fs = std::filesystem;
namespace {

struct Range {
  double least = -DBL_MAX, most = DBL_MAX;
  const char* need = "";  // or the texts allowed, in quotes
};
constexpr Range kCount = {1, INT32_MAX, "1 or more, at most 2147483647"};
constexpr Range kPositive = {DBL_TRUE_MIN, DBL_MAX, "more than 0"};
constexpr Range kNotNegative = {0, DBL_MAX, "0 or more"};
constexpr Range kShare = {0, 1, "0 or more, at most 1"};
constexpr Range kBelowOne = {0, 1 - DBL_EPSILON / 2, "0 or more, less than 1"};
constexpr Range one_of(const char* texts) { return {.need = texts}; }

enum Flag : unsigned {
  kRequired = 1,
  kPath = 2,
  kKept = 4,
};

using Slot = std::variant<string*, bool*, double*, int*, i64*, u64*>;
constexpr const char* kTypes[] = {"text in quotes", "true or false", "a number", "a whole number"};

struct Key {
  string name;
  Slot slot;
  Range range;
  unsigned flags = 0;
  string section() const { return name.substr(0, name.find('.')); }
  string word() const { return name.substr(name.find('.') + 1); }
};

vector<Key> keys_of(RunConfig& config) {
  auto& [run, model, data, train, optimizer, lr, router, parallel, checkpoint] = config;
  return {
      {"run.folder", &run.folder, {}, kRequired | kPath},
      {"model.config", &model.config, {}, kRequired | kPath},
      {"model.init_from", &model.init_from, {}, kPath | kKept},
      {"model.init_std", &model.init_std, kNotNegative, kKept},
      {"data.path", &data.path, {}, kRequired | kPath},
      {"data.sequence_length", &data.sequence_length, kCount, kRequired | kKept},
      {"data.seed", &data.seed, {}, kKept},
      {"data.shuffle", &data.shuffle, {}, kKept},
      {"data.max_epochs", &data.max_epochs, kCount},
      {"data.heldout_fraction", &data.heldout_fraction, kBelowOne, kKept},
      {"data.document_mask", &data.document_mask, {}, kKept},
      {"train.steps", &train.steps, kCount, kRequired},
      {"train.global_batch_size", &train.global_batch_size, kCount, kRequired | kKept},
      {"train.micro_batch_size", &train.micro_batch_size, kCount},
      {"train.precision", &train.precision, one_of(R"("auto", "bf16", "fp32")")},
      {"train.on_nonfinite", &train.on_nonfinite, one_of(R"("stop", "skip")")},
      {"train.eval_interval", &train.eval_interval, kNotNegative},
      {"train.log_interval", &train.log_interval, kCount},
      {"train.peak_tflops", &train.peak_tflops, kNotNegative},
      {"optimizer.lr", &optimizer.lr, kPositive, kRequired},
      {"optimizer.beta1", &optimizer.beta1, kBelowOne, kKept},
      {"optimizer.beta2", &optimizer.beta2, kBelowOne, kKept},
      {"optimizer.eps", &optimizer.eps, kPositive, kKept},
      {"optimizer.weight_decay", &optimizer.weight_decay, kNotNegative, kKept},
      {"optimizer.max_grad_norm", &optimizer.max_grad_norm, kNotNegative, kKept},
      {"lr_schedule.kind", &lr.kind, one_of(R"("constant", "cosine", "wsd")")},
      {"lr_schedule.warmup_ratio", &lr.warmup_ratio, kShare},
      {"lr_schedule.decay_ratio", &lr.decay_ratio, kShare},
      {"lr_schedule.decay_shape", &lr.decay_shape, one_of(R"("cosine", "linear")")},
      {"lr_schedule.start_lr", &lr.start_lr, kNotNegative},
      {"lr_schedule.final_lr", &lr.final_lr, kNotNegative},
      {"router.balance_loss", &router.balance_loss,
          one_of(R"("none", "micro-batch", "sequence", "global-batch")"), kKept},
      {"router.balance_coefficient", &router.balance_coefficient, kNotNegative, kKept},
      {"router.force", &router.force, one_of(R"("none", "balanced")"), kKept},
      {"parallel.schedule", &parallel.schedule, one_of(R"("auto", "1f1b", "dualpipev")")},
      {"parallel.pp", &parallel.pp, kCount},
      {"parallel.cp", &parallel.cp, kCount},
      {"parallel.ep", &parallel.ep, kCount},
      {"parallel.dp_replicate", &parallel.dp_replicate, kCount},
      {"parallel.weight_grad_batch", &parallel.weight_grad_batch, kCount},
      {"parallel.gather", &parallel.gather, one_of(R"("step", "layer")")},
      {"parallel.timeout_s", &parallel.timeout_s, kPositive},
      {"parallel.startup_timeout_s", &parallel.startup_timeout_s, kPositive},
      {"checkpoint.interval", &checkpoint.interval, kNotNegative},
      {"checkpoint.keep", &checkpoint.keep, kNotNegative},
  };
}

string text_of(const toml::node& node) {
  if (node.is_table()) return "a section";
  if (node.is_array()) return "a list";
  if (auto number = node.value_exact<double>(); number && std::isfinite(*number))
    return JsonWriter().value(*number).str();
  std::ostringstream out;
  out << toml::toml_formatter(node, toml::format_flags::allow_unicode_strings);
  return out.str();
}

template <class T>
using TomlType = std::conditional_t<std::is_integral_v<T> && !std::is_same_v<T, bool>, i64, T>;

string value_of(const Key& key) {
  return std::visit(
      []<class T>(const T* value) { return text_of(toml::value(TomlType<T>(*value))); }, key.slot);
}

double distance(string_view a, string_view b) {
  vector<size_t> row(b.size() + 1), last;
  for (size_t i = 0; i <= a.size(); i++, last = row)
    for (size_t j = 0; j <= b.size(); j++)
      row[j] = i == 0 ? j
               : j == 0
                   ? i
                   : std::min({row[j - 1] + 1, last[j] + 1, last[j - 1] + (a[i - 1] != b[j - 1])});
  return double(row.back()) / double(max(a.size(), b.size()));
}

// The error suggests the nearest name, last word or section.
const Key& find_key(const vector<Key>& keys, const string& name, const string& place) {
  std::pair<double, string> best{2, ""};
  for (const Key& key : keys) {
    if (key.name == name) return key;
    string word = name.substr(name.rfind('.') + 1), section = key.section();
    best = std::min({best, {distance(name, key.name), key.name},
        {distance(word, key.word()), key.name}, {distance(name, section), "[" + section + "]"}});
  }
  bad_input(place, "is an unknown key", best.second);
}

[[noreturn]] void wrong_type(const Key& key, const string& place, const string& got) {
  bad_input(place,
      "has the wrong type or size (got " + got + ", need " +
          kTypes[min<size_t>(key.slot.index(), 3)] + ")",
      key.word() + " = " + value_of(key));
}

// Makes paths absolute.
void assign(const Key& key, const toml::node& node, const string& place,
    const fs::path& base = fs::current_path()) {
  string need = key.range.need;
  auto take = [&]<class T>(T* to) {
    auto value = node.value_exact<TomlType<T>>();
    if (std::is_same_v<T, double> && node.is_integer()) value = node.value<TomlType<T>>();
    if constexpr (std::is_same_v<TomlType<T>, i64>)
      if (value && !std::in_range<T>(*value)) value.reset();
    if (!value) wrong_type(key, place, text_of(node));
    *to = T(*value);
    if constexpr (std::is_arithmetic_v<T>)
      return *to >= key.range.least && *to <= key.range.most;
    else
      return need.empty() || need.find(value_of(key)) != string::npos;
  };
  if (!std::visit(take, key.slot))
    bad_input(
        place, "is out of range (got " + value_of(key) + ", need " + need + ")", "one of these");
  if (!(key.flags & kPath)) return;
  string& path = *std::get<string*>(key.slot);
  if (!path.empty()) path = fs::absolute(base / path / "").lexically_normal().parent_path();
}

void read_table(
    const vector<Key>& keys, const toml::table& table, const string& section, const string& file) {
  for (const auto& [word, node] : table) {
    string name = section + string(word.str());
    string place = text("%s:%u: %s", file.c_str(), node.source().begin.line, name.c_str());
    if (node.is_table() && std::ranges::count(keys, name, &Key::section)) {
      read_table(keys, *node.as_table(), name + ".", file);
      continue;
    }
    assign(find_key(keys, name, place), node, place, folder_of(file));
  }
}

void read_override(const vector<Key>& keys, const string& argument) {
  size_t equals = argument.find('=');
  string name = argument.substr(0, equals), place = "--set " + name;
  if (equals == string::npos)
    bad_input(place, "has no value (got " + argument + ", need key=value)", name + "=...");
  const Key& key = find_key(keys, name, place);
  string value = argument.substr(equals + 1);
  toml::table parsed;
  if (std::holds_alternative<string*>(key.slot) && !value.starts_with('"'))
    parsed.emplace("value", value);
  else
    try {
      parsed = toml::parse("value = " + value);
    } catch (const toml::parse_error&) {
    }
  if (parsed.size() != 1) wrong_type(key, place, value);
  assign(key, *parsed.get("value"), place);
}

}

RunConfig load_run_config(const string& path, const vector<string>& overrides) {
  RunConfig config;
  config.run.folder = fs::absolute(config.run.folder);
  vector<Key> keys = keys_of(config);
  try {
    read_table(keys, toml::parse(read_text_file(path), path), "", path);
  } catch (const toml::parse_error& error) {
    auto at = error.source().begin;
    bad_input(text("%s:%u:%u", path.c_str(), at.line, at.column),
        "is not valid TOML: " + string(error.description()), "text in quotes, sections as [train]");
  }
  for (const string& argument : overrides) read_override(keys, argument);
  for (const Key& key : keys) {
    string value = value_of(key);
    if ((key.flags & kRequired) && (value == "\"\"" || value == "0" || value == "0.0"))
      bad_input(key.name, "is required and not set (got " + value + ")",
          "set it in the file, or with --set " + key.name + "=...");
  }
  validate(config);
  return config;
}

void validate(const RunConfig& c) {
  const LrSchedule& lr = c.lr_schedule;
  if (lr.kind == "wsd" && lr.warmup_ratio + lr.decay_ratio > 1)
    bad_input("lr_schedule.decay_ratio",
        text("warm-up and decay overlap (got %g + %g, need at most 1 together)", lr.warmup_ratio,
            lr.decay_ratio),
        "a smaller one");
  zigzag_blocks(c.data.sequence_length, c.parallel.cp, 0);
  if (c.train.eval_interval > 0 && c.data.heldout_fraction == 0)
    bad_input("train.eval_interval",
        "evaluation needs held-out documents (got data.heldout_fraction = 0)",
        "data.heldout_fraction = 0.01, or train.eval_interval = 0");
  if (c.router.balance_loss == "none" && c.router.balance_coefficient != 0)
    bad_input("router.balance_coefficient",
        "has no balance loss to scale (got router.balance_loss = \"none\")",
        "router.balance_loss = \"global-batch\"");
}

string to_toml(const RunConfig& config) {
  RunConfig c = config;
  string out, section;
  for (const Key& key : keys_of(c)) {
    if (key.section() != section) out += (out.empty() ? "[" : "\n[") + key.section() + "]\n";
    section = key.section();
    out += key.word() + " = " + value_of(key) + "\n";
  }
  return out;
}

bool may_change_on_resume(const string& name) {
  RunConfig c;
  return std::ranges::any_of(
      keys_of(c), [&](const Key& key) { return key.name == name && !(key.flags & kKept); });
}

}
