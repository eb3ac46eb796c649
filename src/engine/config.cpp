#include "engine/config.h"

#include <toml++/toml.h>
#include <algorithm>
#include <cfloat>
#include <charconv>
#include <filesystem>
#include <numeric>
#include <sstream>
#include <utility>
#include <variant>

#include "core/json.h"
#include "data/dataset.h"

namespace pith {

namespace fs = std::filesystem;

namespace {

// The numbers allowed, or, in quotes, the texts.
struct Range {
  double least, most;
  const char* need;
};
constexpr Range kAny = {-DBL_MAX, DBL_MAX, ""};
constexpr Range kCount = {1, INT32_MAX, "1 or more, at most 2147483647"};
constexpr Range kCountOrNone = {0, INT32_MAX, "0 or more, at most 2147483647"};
constexpr Range kPositive = {DBL_TRUE_MIN, DBL_MAX, "more than 0"};
constexpr Range kNotNegative = {0, DBL_MAX, "0 or more"};
constexpr Range kShare = {0, 1, "0 or more, at most 1"};
constexpr Range kShareBelowOne = {0, 1 - DBL_EPSILON / 2, "0 or more, less than 1"};
constexpr Range one_of(const char* texts) { return {0, 0, texts}; }

enum Flag : unsigned {
  kPlain = 0,
  kRequired = 1,  // no default
  kPath = 2,      // of a file or folder
  kKept = 4,      // by a resumed run
};

using Slot = std::variant<string*, bool*, int*, int64_t*, uint64_t*, double*>;
constexpr const char* kTypes[] = {"text in quotes", "true or false",  "a whole number",
                                  "a whole number", "a whole number", "a number"};

struct Key {
  string name;
  Slot slot;
  unsigned flags = kPlain;
  Range range = kAny;
};

string section_of(const string& name) { return name.substr(0, name.find('.')); }
string leaf_of(const string& name) { return name.substr(name.rfind('.') + 1); }

// Every key there is.
vector<Key> keys_of(RunConfig& c) {
  auto& lr = c.lr_schedule;
  return {
      {"run.folder", &c.run.folder, kRequired | kPath},
      {"model.config", &c.model.config, kRequired | kPath},
      {"model.init_from", &c.model.init_from, kPath | kKept},
      {"model.init_std", &c.model.init_std, kKept, kNotNegative},
      {"data.path", &c.data.path, kRequired | kPath},
      {"data.sequence_length", &c.data.sequence_length, kRequired | kKept, kCount},
      {"data.seed", &c.data.seed, kKept},
      {"data.shuffle", &c.data.shuffle, kKept},
      {"data.max_epochs", &c.data.max_epochs, kPlain, kCount},
      {"data.heldout_fraction", &c.data.heldout_fraction, kKept, kShareBelowOne},
      {"data.document_mask", &c.data.document_mask, kKept},
      {"train.steps", &c.train.steps, kRequired, kCount},
      {"train.global_batch_size", &c.train.global_batch_size, kRequired | kKept, kCount},
      {"train.micro_batch_size", &c.train.micro_batch_size, kPlain, kCount},
      {"train.precision", &c.train.precision, kKept, one_of(R"("auto", "fp32", "bf16")")},
      {"train.on_nonfinite", &c.train.on_nonfinite, kPlain, one_of(R"("stop", "skip")")},
      {"train.eval_interval", &c.train.eval_interval, kPlain, kCountOrNone},
      {"train.eval_batches", &c.train.eval_batches, kPlain, kCountOrNone},
      {"train.log_interval", &c.train.log_interval, kPlain, kCount},
      {"optimizer.lr", &c.optimizer.lr, kRequired, kPositive},
      {"optimizer.beta1", &c.optimizer.beta1, kKept, kShareBelowOne},
      {"optimizer.beta2", &c.optimizer.beta2, kKept, kShareBelowOne},
      {"optimizer.eps", &c.optimizer.eps, kKept, kPositive},
      {"optimizer.weight_decay", &c.optimizer.weight_decay, kKept, kNotNegative},
      {"optimizer.max_grad_norm", &c.optimizer.max_grad_norm, kKept, kNotNegative},
      {"lr_schedule.kind", &lr.kind, kPlain, one_of(R"("constant", "cosine", "wsd")")},
      {"lr_schedule.warmup_ratio", &lr.warmup_ratio, kPlain, kShare},
      {"lr_schedule.decay_ratio", &lr.decay_ratio, kPlain, kShare},
      {"lr_schedule.decay_shape", &lr.decay_shape, kPlain, one_of(R"("cosine", "linear")")},
      {"lr_schedule.start_lr", &lr.start_lr, kPlain, kNotNegative},
      {"lr_schedule.final_lr", &lr.final_lr, kPlain, kNotNegative},
      {"router.balance_loss", &c.router.balance_loss, kKept,
       one_of(R"("none", "micro-batch", "sequence", "global-batch")")},
      {"router.balance_coefficient", &c.router.balance_coefficient, kKept, kNotNegative},
      {"router.force", &c.router.force, kKept, one_of(R"("none", "balanced")")},
      {"parallel.schedule", &c.parallel.schedule, kPlain, one_of(R"("auto", "1f1b", "dualpipev")")},
      {"parallel.pp", &c.parallel.pp, kPlain, kCount},
      {"parallel.cp", &c.parallel.cp, kPlain, kCount},
      {"parallel.ep", &c.parallel.ep, kPlain, kCount},
      {"parallel.dp_replicate", &c.parallel.dp_replicate, kPlain, kCount},
      {"parallel.weight_grad_batch", &c.parallel.weight_grad_batch, kPlain, kCount},
      {"parallel.gather", &c.parallel.gather, kPlain, one_of(R"("step", "layer")")},
      {"parallel.timeout_s", &c.parallel.timeout_s, kPlain, kPositive},
      {"parallel.startup_timeout_s", &c.parallel.startup_timeout_s, kPlain, kPositive},
      {"checkpoint.interval", &c.checkpoint.interval, kPlain, kCountOrNone},
      {"checkpoint.keep", &c.checkpoint.keep, kPlain, kCountOrNone},
  };
}

string text_of(const toml::node& node) {
  if (node.is_table()) return "a section";
  if (node.is_array()) return "a list";
  if (const auto number = node.value_exact<double>()) {
    char digits[32];  // the shortest that read back the same
    const string out(digits, std::to_chars(digits, digits + sizeof digits, *number).ptr);
    return out.find_first_of(".en") == string::npos ? out + ".0" : out;
  }
  std::ostringstream out;
  out << toml::toml_formatter(node, toml::format_flags::allow_unicode_strings);
  return out.str();
}

string value_text(const Slot& slot) {
  const auto print = [](const auto* value) {
    using T = std::remove_cvref_t<decltype(*value)>;
    if constexpr (std::is_integral_v<T> && !std::is_same_v<T, bool>)
      return text_of(toml::value(int64_t(*value)));
    else
      return text_of(toml::value(*value));
  };
  return std::visit(print, slot);
}

// Insertions, deletions and replacements that make `a` of `b` (Levenshtein), per letter, so that
// short names are not near everything.
double distance(string_view a, string_view b) {
  vector<int> row(b.size() + 1);
  std::iota(row.begin(), row.end(), 0);
  for (size_t i = 1; i <= a.size(); i++) {
    int diagonal = std::exchange(row[0], int(i));
    for (size_t j = 1; j <= b.size(); j++) {
      const int replaced = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = std::exchange(row[j], std::min({row[j] + 1, row[j - 1] + 1, replaced}));
    }
  }
  return row.back() / double(std::max(a.size(), b.size()));
}

// Suggests the key whose name or last word is nearest, or the section.
[[noreturn]] void unknown_key(const vector<Key>& keys, const string& place, const string& name) {
  string best;
  double least = 2;
  const auto consider = [&](double d, const string& meant) {
    if (d >= least) return;
    least = d;
    best = meant;
  };
  for (const Key& key : keys) {
    consider(distance(name, key.name), key.name);
    consider(distance(leaf_of(name), leaf_of(key.name)), key.name);
    consider(distance(name, section_of(key.name)), "[" + section_of(key.name) + "]");
  }
  bad_input(place, "is an unknown key", best);
}

const Key* find_key(const vector<Key>& keys, const string& name) {
  const auto found = std::ranges::find(keys, name, &Key::name);
  return found == keys.end() ? nullptr : &*found;
}

void check_value(const Key& key, const string& place) {
  const string got = value_text(key.slot), need = key.range.need;
  const auto good = [&](const auto* value) {
    if constexpr (std::is_arithmetic_v<std::remove_cvref_t<decltype(*value)>>)
      return *value >= key.range.least && *value <= key.range.most;
    else
      return need.empty() || need.find(got) != string::npos;
  };
  if (!std::visit(good, key.slot))
    bad_input(place, "is out of range (got " + got + ", need " + need + ")", "one of these");
}

// Whether the node has the slot's type and fits into it.
bool take(const Slot& slot, const toml::node& node) {
  const auto store = [&](auto* to) {
    using T = std::remove_reference_t<decltype(*to)>;
    constexpr bool whole = std::is_integral_v<T> && !std::is_same_v<T, bool>;
    auto value = node.value_exact<std::conditional_t<whole, int64_t, T>>();
    if constexpr (whole)
      if (value && !std::in_range<T>(*value)) value.reset();
    if constexpr (std::is_same_v<T, double>)
      if (node.is_integer()) value = node.value<double>();
    if (value) *to = static_cast<T>(*value);
    return value.has_value();
  };
  return std::visit(store, slot);
}

[[noreturn]] void wrong_type(const Key& key, const string& place, const string& got) {
  bad_input(place,
            "has the wrong type or size (got " + got + ", need " + kTypes[key.slot.index()] + ")",
            leaf_of(key.name) + " = " + value_text(key.slot));
}

void assign(const Key& key, const toml::node& node, const string& place) {
  if (!take(key.slot, node)) wrong_type(key, place, text_of(node));
  check_value(key, place);
}

// A path that is relative to `base`; none stays none.
void rebase(const Key& key, const fs::path& base) {
  if (!(key.flags & kPath)) return;
  string& path = *std::get<string*>(key.slot);
  if (path.empty()) return;
  path = fs::absolute(base / path).lexically_normal().string();
  while (path.size() > 1 && path.back() == '/') path.pop_back();
}

void read_table(const vector<Key>& keys, const toml::table& table, const string& prefix,
                const string& file) {
  for (const auto& [word, node] : table) {
    const string name = prefix + string(word.str());
    const string place =
        text("%s:%u: %s", file.c_str(), unsigned{node.source().begin.line}, name.c_str());
    const bool is_section =
        std::ranges::any_of(keys, [&](const Key& key) { return section_of(key.name) == name; });
    if (const Key* key = find_key(keys, name)) {
      assign(*key, node, place);
      rebase(*key, folder_of(file));
    } else if (is_section && node.is_table()) {
      read_table(keys, *node.as_table(), name + ".", file);
    } else {
      unknown_key(keys, place, name);
    }
  }
}

void read_override(const vector<Key>& keys, const string& argument) {
  const size_t equals = argument.find('=');
  const string name = argument.substr(0, equals), place = "--set " + name;
  if (equals == string::npos)
    bad_input(place, "has no value (got " + argument + ", need key=value)", name + "=...");
  const Key* key = find_key(keys, name);
  if (!key) unknown_key(keys, place, name);
  const string value = argument.substr(equals + 1);
  const bool quoted = value.starts_with('"') || value.starts_with('\'');
  toml::table parsed;
  try {
    if (std::holds_alternative<string*>(key->slot) && !quoted)
      parsed.insert("value", value);
    else
      parsed = toml::parse("value = " + value);
  } catch (const toml::parse_error&) {
  }
  if (parsed.size() != 1) wrong_type(*key, place, value);
  assign(*key, *parsed.get("value"), place);
}

}  // namespace

RunConfig load_run_config(const string& path, const vector<string>& overrides) {
  RunConfig config;
  const vector<Key> keys = keys_of(config);
  const string source = read_text_file(path);
  try {
    read_table(keys, toml::parse(source, path), "", path);
  } catch (const toml::parse_error& error) {
    const auto at = error.source().begin;
    bad_input(text("%s:%u:%u", path.c_str(), unsigned{at.line}, unsigned{at.column}),
              "is not valid TOML: " + string(error.description()),
              "correct it there; text is written in quotes, sections as [train]");
  }
  for (const string& argument : overrides) read_override(keys, argument);
  for (const Key& key : keys) rebase(key, fs::current_path());
  validate(config);
  return config;
}

void validate(const RunConfig& config) {
  RunConfig c = config;
  for (const Key& key : keys_of(c)) {
    const string value = value_text(key.slot);
    if ((key.flags & kRequired) && (value == "\"\"" || value == "0" || value == "0.0"))
      bad_input(key.name, "is required and not set (got " + value + ")",
                "set it in the file, or with --set " + key.name + "=...");
    check_value(key, key.name);
  }
  const LrSchedule& lr = c.lr_schedule;
  if (lr.kind == "wsd" && lr.warmup_ratio + lr.decay_ratio > 1)
    bad_input("lr_schedule.decay_ratio",
              text("warm-up and decay overlap (got %g + %g, need at most 1 together)",
                   lr.warmup_ratio, lr.decay_ratio),
              "a smaller lr_schedule.warmup_ratio or decay_ratio");
  if (c.train.global_batch_size % c.train.micro_batch_size != 0)
    bad_input("train.global_batch_size",
              text("is no multiple of train.micro_batch_size (got %ld and %ld)",
                   c.train.global_batch_size, c.train.micro_batch_size),
              "train.micro_batch_size = 1");
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
    const string here = section_of(key.name);
    if (here != section) out += (out.empty() ? "[" : "\n[") + here + "]\n";
    section = here;
    out += leaf_of(key.name) + " = " + value_text(key.slot) + "\n";
  }
  return out;
}

bool may_change_on_resume(const string& name) {
  RunConfig c;
  return std::ranges::any_of(
      keys_of(c), [&](const Key& key) { return key.name == name && !(key.flags & kKept); });
}

}  // namespace pith
