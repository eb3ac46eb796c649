#include "engine/config.h"

#include <toml++/toml.h>
#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <limits>
#include <numeric>
#include <sstream>
#include <variant>

#include "core/json.h"
#include "data/dataset.h"

namespace pith {

namespace fs = std::filesystem;

namespace {

constexpr double kNoLimit = std::numeric_limits<double>::infinity();
constexpr double kMaxInt = std::numeric_limits<int32_t>::max();

struct Range {
    double least = -kNoLimit, most = kNoLimit;
    bool above = false;  // more than `least`, not `least` itself
    bool below = false;  // less than `most`
};
const Range kAny = {}, kCount = {1, kMaxInt}, kCountOrNone = {0, kMaxInt};
const Range kPositive = {.least = 0, .above = true}, kNotNegative = {.least = 0};
const Range kShare = {0, 1}, kShareBelowOne = {.least = 0, .most = 1, .below = true};

enum Flag : unsigned {
    kPlain = 0,
    kRequired = 1,   // no default
    kPath = 2,       // of a file or folder
    kMayChange = 4,  // when a run is resumed
};

using Slot = std::variant<std::string*, bool*, int*, int64_t*, uint64_t*, double*>;

struct Key {
    const char* name;
    Slot slot;
    unsigned flags = kPlain;
    Range range = kAny;
    std::vector<const char*> choices = {};
};

// Every key there is.
std::vector<Key> keys_of(RunConfig& c) {
    return {
        {"run.folder", &c.run.folder, kRequired | kPath | kMayChange},
        {"model.config", &c.model.config, kRequired | kPath | kMayChange},
        {"model.init_from", &c.model.init_from, kPath},
        {"model.init_std", &c.model.init_std, kPlain, kNotNegative},
        {"data.path", &c.data.path, kRequired | kPath | kMayChange},
        {"data.sequence_length", &c.data.sequence_length, kRequired, kCount},
        {"data.seed", &c.data.seed},
        {"data.shuffle", &c.data.shuffle},
        {"data.max_epochs", &c.data.max_epochs, kMayChange, kCount},
        {"data.heldout_fraction", &c.data.heldout_fraction, kPlain, kShareBelowOne},
        {"data.document_mask", &c.data.document_mask},
        {"train.steps", &c.train.steps, kRequired | kMayChange, kCount},
        {"train.global_batch_size", &c.train.global_batch_size, kRequired, kCount},
        {"train.micro_batch_size", &c.train.micro_batch_size, kMayChange, kCount},
        {"train.precision", &c.train.precision, kPlain, kAny, {"auto", "fp32", "bf16"}},
        {"train.on_nonfinite", &c.train.on_nonfinite, kMayChange, kAny, {"stop", "skip"}},
        {"train.eval_interval", &c.train.eval_interval, kMayChange, kCountOrNone},
        {"train.eval_batches", &c.train.eval_batches, kMayChange, kCountOrNone},
        {"train.log_interval", &c.train.log_interval, kMayChange, kCount},
        {"optimizer.lr", &c.optimizer.lr, kRequired | kMayChange, kPositive},
        {"optimizer.beta1", &c.optimizer.beta1, kPlain, kShareBelowOne},
        {"optimizer.beta2", &c.optimizer.beta2, kPlain, kShareBelowOne},
        {"optimizer.eps", &c.optimizer.eps, kPlain, kPositive},
        {"optimizer.weight_decay", &c.optimizer.weight_decay, kPlain, kNotNegative},
        {"optimizer.max_grad_norm", &c.optimizer.max_grad_norm, kPlain, kNotNegative},
        {"lr_schedule.kind", &c.lr_schedule.kind, kMayChange, kAny, {"constant", "cosine", "wsd"}},
        {"lr_schedule.warmup_ratio", &c.lr_schedule.warmup_ratio, kMayChange, kShare},
        {"lr_schedule.decay_ratio", &c.lr_schedule.decay_ratio, kMayChange, kShare},
        {"lr_schedule.decay_shape",
         &c.lr_schedule.decay_shape,
         kMayChange,
         kAny,
         {"cosine", "linear"}},
        {"lr_schedule.start_lr", &c.lr_schedule.start_lr, kMayChange, kNotNegative},
        {"lr_schedule.final_lr", &c.lr_schedule.final_lr, kMayChange, kNotNegative},
        {"router.balance_loss",
         &c.router.balance_loss,
         kPlain,
         kAny,
         {"none", "micro-batch", "sequence", "global-batch"}},
        {"router.balance_coefficient", &c.router.balance_coefficient, kPlain, kNotNegative},
        {"router.force", &c.router.force, kPlain, kAny, {"none", "balanced"}},
        {"parallel.schedule",
         &c.parallel.schedule,
         kMayChange,
         kAny,
         {"auto", "1f1b", "dualpipev"}},
        {"parallel.pp", &c.parallel.pp, kMayChange, kCount},
        {"parallel.cp", &c.parallel.cp, kMayChange, kCount},
        {"parallel.ep", &c.parallel.ep, kMayChange, kCount},
        {"parallel.dp_replicate", &c.parallel.dp_replicate, kMayChange, kCount},
        {"parallel.gather", &c.parallel.gather, kMayChange, kAny, {"step", "layer"}},
        {"parallel.timeout_s", &c.parallel.timeout_s, kMayChange, kPositive},
        {"parallel.startup_timeout_s", &c.parallel.startup_timeout_s, kMayChange, kPositive},
        {"checkpoint.interval", &c.checkpoint.interval, kMayChange, kCountOrNone},
        {"checkpoint.keep", &c.checkpoint.keep, kMayChange, kCountOrNone},
    };
}

// ---- Values as text -----------------------------------------------------------------------------

std::string toml_string(const std::string& value) {
    std::string out = "\"";
    for (const char c : value) {
        if (c == '"' || c == '\\') out += '\\';
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f)
            out += text("\\u%04x", static_cast<unsigned>(c));
        else
            out += c;
    }
    return out + '"';
}

std::string number_text(double value) {
    char digits[32];
    const auto end = std::to_chars(digits, digits + sizeof digits, value).ptr;
    std::string out(digits, end);
    if (out.find_first_of(".en") == std::string::npos) out += ".0";  // TOML's mark of a float
    return out;
}

std::string value_text(const Slot& slot) {
    return std::visit(
        [](const auto* value) -> std::string {
            using T = std::remove_cvref_t<decltype(*value)>;
            if constexpr (std::is_same_v<T, std::string>)
                return toml_string(*value);
            else if constexpr (std::is_same_v<T, bool>)
                return *value ? "true" : "false";
            else if constexpr (std::is_same_v<T, double>)
                return number_text(*value);
            else
                return std::to_string(*value);
        },
        slot);
}

const char* need_of(const Slot& slot) {
    if (std::holds_alternative<std::string*>(slot)) return "text in quotes";
    if (std::holds_alternative<bool*>(slot)) return "true or false";
    return std::holds_alternative<double*>(slot) ? "a number" : "a whole number";
}

std::string range_text(const Range& range) {
    std::string low = text(range.above ? "more than %.15g" : "%.15g or more", range.least);
    if (range.most == kNoLimit) return low;
    return low + text(range.below ? ", less than %.15g" : ", at most %.15g", range.most);
}

// ---- Names --------------------------------------------------------------------------------------

// Insertions, deletions and replacements that make `a` of `b` (Levenshtein).
int edit_distance(std::string_view a, std::string_view b) {
    std::vector<int> row(b.size() + 1);
    std::iota(row.begin(), row.end(), 0);
    for (size_t i = 1; i <= a.size(); i++) {
        int diagonal = row[0];
        row[0] = static_cast<int>(i);
        for (size_t j = 1; j <= b.size(); j++) {
            const int replaced = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = std::min({row[j] + 1, row[j - 1] + 1, replaced});
        }
    }
    return row.back();
}

std::string_view leaf_of(std::string_view name) { return name.substr(name.rfind('.') + 1); }

// Edits per letter, so that short names are not near everything.
double distance(std::string_view a, std::string_view b) {
    return static_cast<double>(edit_distance(a, b)) /
           static_cast<double>(std::max(a.size(), b.size()));
}

// The key, or the section, that `name` may have been meant to be.
std::string nearest(const std::vector<Key>& keys, const std::string& name, bool section) {
    constexpr double kWrongSection = 0.1;
    std::string best;
    double least = 2;
    for (const Key& key : keys) {
        const std::string full = key.name, head = full.substr(0, full.find('.'));
        const double d = section ? distance(name, head)
                                 : std::min(distance(name, full),
                                            distance(leaf_of(name), leaf_of(full)) + kWrongSection);
        if (d >= least) continue;
        least = d;
        best = section ? "[" + head + "]" : full;
    }
    return best;
}

const Key* find_key(const std::vector<Key>& keys, const std::string& name) {
    for (const Key& key : keys)
        if (name == key.name) return &key;
    return nullptr;
}

bool is_section(const std::vector<Key>& keys, const std::string& name) {
    return std::any_of(keys.begin(), keys.end(), [&](const Key& key) {
        return std::string_view(key.name).starts_with(name + ".");
    });
}

[[noreturn]] void unknown_key(const std::vector<Key>& keys, const std::string& place,
                              const std::string& name, bool section) {
    bad_input(place, std::string("is an unknown ") + (section ? "section" : "key"),
              nearest(keys, name, section));
}

// ---- Reading ------------------------------------------------------------------------------------

std::string describe(const toml::node& node) {
    std::ostringstream out;
    if (node.is_table())
        out << "a section";
    else if (node.is_array())
        out << "a list";
    else
        node.visit([&](const auto& value) { out << value; });
    return out.str();
}

void check_value(const Key& key, const std::string& place) {
    double number = 0;
    if (const auto* choice = std::get_if<std::string*>(&key.slot)) {
        std::string list;
        for (const char* c : key.choices) {
            if (**choice == c) return;
            list += (list.empty() ? "" : ", ") + toml_string(c);
        }
        if (key.choices.empty()) return;
        bad_input(place,
                  "has an unknown value (got " + toml_string(**choice) + ", need " + list + ")",
                  "one of these");
    }
    std::visit(
        [&](const auto* value) {
            if constexpr (std::is_arithmetic_v<std::remove_cvref_t<decltype(*value)>>)
                number = static_cast<double>(*value);
        },
        key.slot);
    const Range& r = key.range;
    const bool inside = std::isfinite(number) && number >= r.least && number <= r.most &&
                        !(r.above && number == r.least) && !(r.below && number == r.most);
    if (!inside)
        bad_input(place,
                  "is out of range (got " + value_text(key.slot) + ", need " +
                      (r.least == -kNoLimit ? "a finite number" : range_text(r)) + ")",
                  "a value in this range");
}

std::string absolute_path(const fs::path& base, const std::string& path) {
    if (path.empty()) return path;
    std::string out = fs::absolute(base / path).lexically_normal().string();
    while (out.size() > 1 && out.back() == '/') out.pop_back();
    return out;
}

// Whether the node has the slot's type and fits into it.
bool take(const Slot& slot, const toml::node& node) {
    return std::visit(
        [&](auto* to) {
            using T = std::remove_reference_t<decltype(*to)>;
            if constexpr (std::is_same_v<T, double>) {
                const auto whole = node.value_exact<int64_t>();
                const auto number = node.value_exact<double>();
                if (number) *to = *number;
                if (whole) *to = static_cast<double>(*whole);
                return number || whole;
            } else if constexpr (std::is_same_v<T, bool> || std::is_same_v<T, std::string>) {
                const auto value = node.value_exact<T>();
                if (value) *to = *value;
                return value.has_value();
            } else {
                const auto value = node.value_exact<int64_t>();
                if (!value || !std::in_range<T>(*value)) return false;
                *to = static_cast<T>(*value);
                return true;
            }
        },
        slot);
}

[[noreturn]] void wrong_type(const Key& key, const std::string& place, const std::string& got) {
    bad_input(place, "has the wrong type or size (got " + got + ", need " + need_of(key.slot) + ")",
              std::string(leaf_of(key.name)) + " = " + value_text(key.slot));
}

// `base` is what a relative path is relative to.
void assign(const Key& key, const toml::node& node, const std::string& place,
            const fs::path& base) {
    if (!take(key.slot, node)) wrong_type(key, place, describe(node));
    if (key.flags & kPath) {
        std::string& path = *std::get<std::string*>(key.slot);
        path = absolute_path(base, path);
    }
    check_value(key, place);
}

void read_table(const std::vector<Key>& keys, const toml::table& table, const std::string& prefix,
                const std::string& file) {
    for (const auto& [name, node] : table) {
        const std::string full = prefix + std::string(name.str());
        const std::string place =
            text("%s:%u: %s", file.c_str(), static_cast<unsigned>(node.source().begin.line),
                 full.c_str());
        if (const Key* key = find_key(keys, full)) {
            assign(*key, node, place, folder_of(file));
        } else if (!is_section(keys, full)) {
            unknown_key(keys, place, full, prefix.empty() && node.is_table());
        } else if (const toml::table* section = node.as_table()) {
            read_table(keys, *section, full + ".", file);
        } else {
            bad_input(place, "is a section (got " + describe(node) + ", need keys below it)",
                      "[" + full + "] on a line of its own");
        }
    }
}

void read_override(const std::vector<Key>& keys, const std::string& argument) {
    const size_t equals = argument.find('=');
    const std::string name = argument.substr(0, equals), place = "--set " + name;
    if (equals == std::string::npos)
        bad_input(place, "has no value (got " + argument + ", need key=value)", name + "=...");
    const Key* key = find_key(keys, name);
    if (!key) unknown_key(keys, place, name, false);
    const std::string value = argument.substr(equals + 1);
    const bool quotes = !value.empty() && (value[0] == '"' || value[0] == '\'');
    toml::table parsed;
    if (std::holds_alternative<std::string*>(key->slot) && !quotes) {
        parsed.insert("value", value);
    } else {
        try {
            parsed = toml::parse("value = " + value);
        } catch (const toml::parse_error&) {
            parsed.clear();
        }
        if (parsed.size() != 1) wrong_type(*key, place, value);
    }
    assign(*key, *parsed.get("value"), place, fs::current_path());
}

}  // namespace

RunConfig load_run_config(const std::string& path, const std::vector<std::string>& overrides) {
    RunConfig config;
    const std::vector<Key> keys = keys_of(config);
    const std::string source = read_text_file(path);
    try {
        read_table(keys, toml::parse(source, path), "", path);
    } catch (const toml::parse_error& error) {
        const auto at = error.source().begin;
        bad_input(text("%s:%u:%u", path.c_str(), static_cast<unsigned>(at.line),
                       static_cast<unsigned>(at.column)),
                  "is not valid TOML: " + std::string(error.description()),
                  "correct it there; text is written in quotes, sections as [train]");
    }
    for (const std::string& argument : overrides) read_override(keys, argument);
    for (const Key& key : keys)
        if (key.flags & kPath) {
            std::string& value = *std::get<std::string*>(key.slot);
            value = absolute_path(fs::current_path(), value);
        }
    validate(config);
    return config;
}

void validate(const RunConfig& config) {
    RunConfig c = config;
    for (const Key& key : keys_of(c)) {
        const std::string value = value_text(key.slot);
        if ((key.flags & kRequired) && (value == "\"\"" || value == "0" || value == "0.0"))
            bad_input(key.name, "is required and not set (got " + value + ")",
                      "set it in the file, or with --set " + std::string(key.name) + "=...");
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
                  text("is no multiple of train.micro_batch_size (got %lld and %lld)",
                       static_cast<long long>(c.train.global_batch_size),
                       static_cast<long long>(c.train.micro_batch_size)),
                  "train.micro_batch_size = 1");
    zigzag_blocks(c.data.sequence_length, c.parallel.cp, 0);
    if (c.train.eval_interval > 0 && c.data.heldout_fraction == 0)
        bad_input("train.eval_interval",
                  "evaluation needs held-out documents (got data.heldout_fraction = 0)",
                  "data.heldout_fraction = 0.01, or train.eval_interval = 0");
    if (c.router.balance_loss == "none" && c.router.balance_coefficient != 0)
        bad_input("router.balance_coefficient",
                  text("has no balance loss to scale (got %g and router.balance_loss = \"none\")",
                       c.router.balance_coefficient),
                  "router.balance_loss = \"global-batch\"");
}

std::string to_toml(const RunConfig& config) {
    RunConfig c = config;
    std::string out, section;
    for (const Key& key : keys_of(c)) {
        const std::string name = key.name, here = name.substr(0, name.find('.'));
        if (here != section) out += (out.empty() ? "[" : "\n[") + here + "]\n";
        section = here;
        out += std::string(leaf_of(name)) + " = " + value_text(key.slot) + "\n";
    }
    return out;
}

std::vector<ConfigDifference> differences(const RunConfig& before, const RunConfig& after) {
    RunConfig a = before, b = after;
    const std::vector<Key> old_keys = keys_of(a), new_keys = keys_of(b);
    std::vector<ConfigDifference> found;
    for (size_t i = 0; i < old_keys.size(); i++) {
        const std::string was = value_text(old_keys[i].slot), is = value_text(new_keys[i].slot);
        if (was != is) found.push_back({old_keys[i].name, was, is});
    }
    return found;
}

bool may_change_on_resume(const std::string& name) {
    RunConfig c;
    const std::vector<Key> keys = keys_of(c);
    const Key* key = find_key(keys, name);
    if (!key) failed("may_change_on_resume", "unknown key " + name);
    return key->flags & kMayChange;
}

}  // namespace pith
