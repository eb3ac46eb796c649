#include "engine/config.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <sstream>

#include "core/json.h"
#include "helpers.h"

namespace pith {

namespace fs = std::filesystem;

namespace {

const char* const kSmallest =
    "[model]\nconfig = \"m/config.json\"\n"
    "[data]\npath = \"tokens\"\nsequence_length = 64\n"
    "[train]\nsteps = 10\nglobal_batch_size = 8\n"
    "[optimizer]\nlr = 1e-3\n";

RunConfig load_text(const std::string& path, const std::string& toml,
    const std::vector<std::string>& overrides = {}) {
  std::ofstream(path) << toml;
  return load_run_config(path, overrides);
}

struct KeyLine {
  std::string key, value;
};
std::vector<KeyLine> keys_in(const std::string& toml) {
  std::vector<KeyLine> keys;
  std::istringstream in(toml);
  std::string line, section;
  while (std::getline(in, line)) {
    if (line.starts_with("[")) section = line.substr(1, line.size() - 2);
    if (const size_t at = line.find(" = "); at != std::string::npos)
      keys.push_back({section + "." + line.substr(0, at), line.substr(at + 3)});
  }
  return keys;
}

}  // namespace

TEST(Config, ReadsTheFileThenOverrides) {
  const std::string folder = fresh_folder("config"), path = folder + "/run.toml";
  const std::string toml = std::string(kSmallest) +
                           "weight_decay = 0\nbeta2 = 0.95\n"
                           "[lr_schedule]\nkind = 'wsd'\n"
                           "[parallel]\ntimeout_s = 5\nep = 4\n"
                           "[data_is_not_here]\n";
  expect_error(error_of([&] { load_text(path, toml); }), {"data_is_not_here"});
  const std::string good = toml.substr(0, toml.find("[data_is"));
  RunConfig c = load_text(path, good);
  EXPECT_EQ(c.data.sequence_length, 64);
  EXPECT_EQ(c.data.seed, 1234u);
  EXPECT_EQ(c.optimizer.lr, 1e-3);
  EXPECT_EQ(c.optimizer.weight_decay, 0);
  EXPECT_EQ(c.optimizer.beta2, 0.95);
  EXPECT_EQ(c.lr_schedule.kind, "wsd");
  EXPECT_EQ(c.parallel.timeout_s, 5);
  EXPECT_EQ(c.parallel.ep, 4);
  c = load_text(path, good,
      {"train.steps=1_000", "optimizer.lr=2e-4", "data.document_mask=true",
          "lr_schedule.kind=cosine", "router.balance_loss=\"sequence\"",
          "router.balance_coefficient=1", "train.steps=20", "run.folder=it's=odd"});
  EXPECT_EQ(c.train.steps, 20);
  EXPECT_EQ(c.optimizer.lr, 2e-4);
  EXPECT_TRUE(c.data.document_mask);
  EXPECT_EQ(c.lr_schedule.kind, "cosine");
  EXPECT_EQ(c.router.balance_loss, "sequence");
  EXPECT_EQ(c.router.balance_coefficient, 1);
  EXPECT_EQ(c.run.folder, fs::current_path().string() + "/it's=odd");
}

TEST(Config, PathsAreRelativeToWhereTheyAreWritten) {
  const std::string folder = fresh_folder("paths"), path = folder + "/run.toml";
  const std::string here = fs::current_path().string();
  RunConfig c = load_text(path, kSmallest);
  EXPECT_EQ(c.model.config, folder + "/m/config.json");
  EXPECT_EQ(c.data.path, folder + "/tokens");
  EXPECT_EQ(c.model.init_from, "");
  EXPECT_EQ(c.run.folder, here + "/runs/default");
  c = load_text(
      path, kSmallest, {"data.path=a/../b/", "model.init_from=/x/./y", "run.folder=\"out\""});
  EXPECT_EQ(c.data.path, here + "/b");
  EXPECT_EQ(c.model.init_from, "/x/y");
  EXPECT_EQ(c.run.folder, here + "/out");
  // A file named by a relative path.
  const fs::path before = fs::current_path();
  fs::current_path(folder);
  EXPECT_EQ(load_run_config("run.toml", {}).data.path, fs::current_path().string() + "/tokens");
  fs::current_path(before);
}

TEST(Config, RefusesBadFiles) {
  const std::string path = fresh_folder("bad_config") + "/run.toml";
  const struct {
    const char* add;  // behind the smallest file, whose last section is [optimizer]
    std::vector<std::string> parts;
  } cases[] = {
      {"learning_rate = 1", {"run.toml:11: optimizer.learning_rate: ", "unknown key"}},
      {"bata1 = 1", {"optimizer.bata1: is an unknown key", "Try: optimizer.beta1"}},
      {"[train2]\nsteps = 1", {"run.toml:11: train2: ", "Try: [train]"}},
      {"[parallel]\nlr = 1", {"run.toml:12: parallel.lr: ", "Try: optimizer.lr"}},
      {"[lr_schedule]\nlr = 1", {"run.toml:12: lr_schedule.lr: ", "Try: optimizer.lr"}},
      {"[checkpoint]\nintervall = 1", {"Try: checkpoint.interval"}},
      {"steps = 3", {"optimizer.steps: ", "Try: train.steps"}},
      {"[lr_schedule.warmup]\nratio = 1", {"lr_schedule.warmup: ", "lr_schedule.warmup_ratio"}},
      {"[run.folder]\na = 1", {"run.folder: has the wrong type", "got a section"}},
      {"beta1 = '0.9'", {"got \"0.9\", need a number", "Try: beta1 = 0.9"}},
      {"[checkpoint]\nkeep = 1.0", {"checkpoint.keep: ", "got 1.0, need a whole number"}},
      {"[checkpoint]\nkeep = true", {"got true, need a whole number"}},
      {"[checkpoint]\nkeep = [1]", {"got a list, need a whole number"}},
      {"[parallel]\npp = 4294967297", {"parallel.pp: has the wrong type or size"}},
      {"[run]\nfolder = 3", {"run.folder: ", "got 3, need text in quotes"}},
      {"[router]\nforce = false", {"router.force: ", "got false, need text in quotes"}},
      {"beta1 = 1", {"run.toml:11: optimizer.beta1: ", "got 1.0, need 0 or more, less than 1"}},
      {"eps = 0", {"optimizer.eps: is out of range (got 0.0, need more than 0)"}},
      {"eps = nan", {"optimizer.eps: is out of range"}},
      {"weight_decay = inf", {"optimizer.weight_decay: is out of range (got inf"}},
      {"weight_decay = -0.1", {"got -0.1, need 0 or more"}},
      {"[checkpoint]\ninterval = -1", {"checkpoint.interval: ", "got -1, need 0 or more"}},
      {"[parallel]\ncp = 0", {"parallel.cp: ", "got 0, need 1 or more"}},
      {"[lr_schedule]\nwarmup_ratio = 1.5", {"got 1.5, need 0 or more, at most 1"}},
      {"[lr_schedule]\nkind = 'linear'",
          {"got \"linear\", need \"constant\", \"cosine\", \"wsd\""}},
      {"[router]\nbalance_loss = 'global'", {"router.balance_loss: ", "\"global-batch\""}},
      {"[router]\nbalance_coefficient = 0.1", {"router.balance_coefficient: ", "\"none\""}},
      {"[parallel]\nschedule = '1F1B'", {"parallel.schedule: ", "\"1f1b\""}},
      {"[parallel]\ncp = 3", {"data.sequence_length: ", "got 64 and cp = 3", "66"}},
      {"[lr_schedule]\nkind = 'wsd'\nwarmup_ratio = 0.95", {"lr_schedule.decay_ratio: ", "0.95"}},
      {"lr = 2", {"run.toml:11:", "is not valid TOML"}},
      {"[optimizer]", {"run.toml:11:", "is not valid TOML"}},
      {"weight_decay = ", {"is not valid TOML", "Try: "}},
      {"weight_decay = 0.1 0.2", {"is not valid TOML"}},
      {"[run]\nfolder = \"unfinished", {"run.toml:12:", "is not valid TOML"}},
  };
  for (const auto& c : cases) {
    const std::string got =
        error_of([&] { load_text(path, std::string(kSmallest) + c.add + "\n"); });
    expect_error(got, c.parts);
    EXPECT_NE(got.find("Try: "), std::string::npos) << got;
  }
  expect_error(error_of([&] { load_text(path, "train = 3\n"); }),
      {"run.toml:1: train: is an unknown key", "Try: [train]"});
  expect_error(error_of([&] { load_run_config(path + ".none", {}); }), {path + ".none: "});
}

TEST(Config, NamesWhatIsMissing) {
  const std::string path = fresh_folder("missing") + "/run.toml";
  for (const auto& [line, key] :
      std::map<std::string, std::string>{{"config = \"m/config.json\"\n", "model.config"},
          {"path = \"tokens\"\n", "data.path"}, {"sequence_length = 64\n", "data.sequence_length"},
          {"steps = 10\n", "train.steps"}, {"global_batch_size = 8\n", "train.global_batch_size"},
          {"lr = 1e-3\n", "optimizer.lr"}}) {
    std::string toml = kSmallest;
    toml.erase(toml.find(line), line.size());
    expect_error(error_of([&] { load_text(path, toml); }),
        {key + ": is required and not set", "--set " + key + "="});
  }
  expect_error(error_of([&] { load_text(path, ""); }), {"is required and not set"});
}

TEST(Config, RefusesBadOverrides) {
  const std::string path = fresh_folder("overrides") + "/run.toml";
  const struct {
    const char* argument;
    std::vector<std::string> parts;
  } cases[] = {
      {"train.stps=3", {"--set train.stps: is an unknown key", "Try: train.steps"}},
      {"lr=3", {"--set lr: is an unknown key", "Try: optimizer.lr"}},
      {"steps=3", {"--set steps: is an unknown key", "Try: train.steps"}},
      {"train=3", {"--set train: is an unknown key"}},
      {"train.steps", {"--set train.steps: has no value"}},
      {"train.steps=", {"--set train.steps: ", "need a whole number"}},
      {"train.steps=ten", {"got ten, need a whole number"}},
      {"train.steps=1e3", {"got 1000.0, need a whole number"}},
      {"train.steps=3 4", {"got 3 4, need a whole number"}},
      {"train.steps=3\nx = 1", {"need a whole number"}},
      {"train.steps=0", {"train.steps: is out of range (got 0, need 1 or more"}},
      {"data.seed=-1", {"got -1, need a whole number"}},
      {"data.document_mask=yes", {"got yes, need true or false"}},
      {"train.on_nonfinite=go", {"got \"go\", need \"stop\", \"skip\""}},
      {"run.folder=\"open", {"--set run.folder: "}},
      {"run.folder=", {"run.folder: is required and not set"}},
      {"train.eval_interval=5", {"train.eval_interval: ", "data.heldout_fraction = 0"}},
      {"data.heldout_fraction=1", {"data.heldout_fraction: ", "less than 1"}},
  };
  for (const auto& c : cases)
    expect_error(error_of([&] { load_text(path, kSmallest, {c.argument}); }), c.parts);
}

TEST(Config, TextReadsBackTheSame) {
  const std::string folder = fresh_folder("round_trip");
  const RunConfig c = load_text(folder + "/a.toml", kSmallest,
      {"optimizer.eps=1.2345678901234567e-8", "optimizer.lr=0.1", "run.folder=a \"b\"\\\t\x01z",
          "data.seed=9223372036854775807", "data.shuffle=false", "parallel.timeout_s=1e20",
          "lr_schedule.kind=wsd", "lr_schedule.decay_shape=linear", "model.init_from=x",
          "router.balance_loss=global-batch", "router.balance_coefficient=1e-3"});
  const std::string toml = to_toml(c);
  fs::create_directories(folder + "/elsewhere");
  const RunConfig again = load_text(folder + "/elsewhere/b.toml", toml);
  EXPECT_EQ(to_toml(again), toml);
  EXPECT_EQ(again.optimizer.eps, 1.2345678901234567e-8);
  EXPECT_EQ(again.run.folder, fs::current_path().string() + "/a \"b\"\\\t\x01z");
}

// What a resumed run may not change: everything else may.
TEST(Config, KeysThatAResumedRunKeeps) {
  const std::set<std::string> kept = {"model.init_from", "model.init_std", "data.sequence_length",
      "data.seed", "data.shuffle", "data.heldout_fraction", "data.document_mask",
      "train.global_batch_size", "optimizer.beta1", "optimizer.beta2", "optimizer.eps",
      "optimizer.weight_decay", "optimizer.max_grad_norm", "router.balance_loss",
      "router.balance_coefficient", "router.force"};
  std::set<std::string> found;
  for (const KeyLine& line : keys_in(to_toml(RunConfig{})))
    if (!may_change_on_resume(line.key)) found.insert(line.key);
  EXPECT_EQ(found, kept);
}

// docs/configuration.md has a row for every key, and none for another:
// | `key` | type | default | resume | meaning |
TEST(Config, TheDocumentedKeysAreTheKeys) {
  const std::string path = std::string(SOURCE_DIR) + "/docs/configuration.md";
  std::map<std::string, std::vector<std::string>> rows;
  std::istringstream in(read_text_file(path));
  for (std::string line; std::getline(in, line);) {
    if (!line.starts_with("| `")) continue;
    std::vector<std::string> cells;
    std::istringstream row(line.substr(2));
    for (std::string cell; std::getline(row, cell, '|');)
      cells.push_back(cell.substr(0, cell.find_last_not_of(' ') + 1).substr(cell[0] == ' '));
    const std::string key = cells[0].substr(1, cells[0].size() - 2);
    EXPECT_TRUE(rows.emplace(key, cells).second) << key << " has two rows";
    EXPECT_EQ(cells.size(), 5u) << line;
    cells.resize(5);
  }
  const std::set<std::string> required = {"model.config", "data.path", "data.sequence_length",
      "train.steps", "train.global_batch_size", "optimizer.lr"};
  for (const auto& [key, value] : keys_in(to_toml(RunConfig{}))) {
    const auto found = rows.find(key);
    ASSERT_NE(found, rows.end()) << path << " has no row for " << key;
    const std::vector<std::string> cells = found->second;
    rows.erase(found);
    const bool is_path =
        std::set<std::string>{"run.folder", "model.config", "model.init_from", "data.path"}
            .contains(key);
    const char* type = value[0] == '"'  ? (is_path ? "path" : "text")
                       : value[0] > '9' ? "boolean"
                       : value.find_first_of(".e") == std::string::npos ? "integer"
                                                                        : "number";
    EXPECT_EQ(cells[1], type) << key;
    EXPECT_EQ(cells[2], required.contains(key) ? "required" : value) << key;
    EXPECT_EQ(cells[3], may_change_on_resume(key) ? "yes" : "no") << key;
    EXPECT_GT(cells[4].size(), 10u) << key;
  }
  for (const auto& [key, cells] : rows) ADD_FAILURE() << path << " has a row for no key: " << key;
}

}  // namespace pith
