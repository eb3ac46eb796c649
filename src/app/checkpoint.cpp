#include <algorithm>

#include "app/commands.h"
#include "core/log.h"

namespace pith {

static int verify_all(const string& named, bool json) {
  std::map<i64, string> folders = list_checkpoints(named);
  if (folders.empty()) folders[0] = named;
  JsonWriter w;
  w.array();
  int code = kExitDone;
  for (const auto& [step, path] : folders) {
    Checkpoint c;
    string error;
    try {
      c = open_checkpoint(path);
      verify(c);
    } catch (const Error& e) {
      error = e.what();
      code = kExitBadInput;
    }
    i64 bytes = 0;
    for (const StoredFile& file : c.files) bytes += file.bytes;
    w.object().members("path", path, "good", error.empty(), "error", error);
    w.members("step", c.state.step, "bytes", bytes, "tensors", c.tensors.size()).end();
  }
  print_result(w.end().str(), json);
  return code;
}

// ||b - a|| / ||a|| of a weight; ||b|| where a is zero.
static double relative_difference(const Checkpoint& a, const Checkpoint& b, const string& name) {
  vector<float> x = read_tensor(a, a.tensors.at(name));
  vector<float> y = read_tensor(b, b.tensors.at(name));
  double square = 0, norm = 0;
  for (size_t k = 0; k < x.size(); k++) {
    square += (double{y[k]} - x[k]) * (double{y[k]} - x[k]);
    norm += double{x[k]} * x[k];
  }
  return std::sqrt(norm > 0 ? square / norm : square);
}

// Worst first. Exit code 1 if a weight differs by more than `limit`.
static int diff(const string& from, const string& to, double limit, bool json) {
  const ModelFolder a = open_model(from);
  const Checkpoint b = open_weights(to);
  check_weights(b, a.table);
  vector<std::pair<double, string>> all;
  for (const TensorDecl& weight : declarations(a.table))
    all.emplace_back(relative_difference(a.weights, b, weight.name), weight.name);
  std::sort(all.rbegin(), all.rend());
  JsonWriter w;
  w.array();
  size_t beyond = 0;
  for (const auto& [difference, name] : all) {
    beyond += difference > limit;
    w.object().members("name", name, "difference", difference).end();
  }
  print_result(w.end().str(), json);
  log_info("%zu of %zu weights differ by more than %g", beyond, all.size(), limit);
  return beyond ? kExitFailed : kExitDone;
}

int run_checkpoint(int argc, char** argv) {
  Arguments args("pith checkpoint");
  string action;
  vector<string> folders;
  double limit = 0;
  bool json = false;
  args.choice(
      "action", action, {"verify", "diff"}, "diff: exit code 1 if weights of the two differ");
  args.list("folder", folders,
      "checkpoint, or run folder: all of its checkpoints; diff: two, also Hugging Face's", ' ');
  args.option("--limit", limit, "diff: relative L2 that a weight may differ by", 0);
  args.flag("--json", json, "print the result as JSON");
  if (!args.parse(argc, argv)) return kExitDone;
  bool two = action == "diff";
  if (folders.size() != (two ? 2 : 1) || (limit > 0 && !two))
    bad_input("pith checkpoint " + action,
        two ? "needs two folders" : "takes one folder and no --limit", "--help");
  return two ? diff(folders[0], folders[1], limit, json) : verify_all(folders[0], json);
}

}
