// checkpoint: pith checkpoint list, verify and diff.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "app/arguments.h"
#include "app/commands.h"
#include "app/model_folder.h"
#include "core/log.h"

namespace pith {

namespace {
struct Examined {
  CheckpointFolder folder;
  string error;  // empty: it is good
  int64_t bytes = 0, tensors = 0;
  Mesh mesh;
};

// Opens a checkpoint; reads all of it if `whole`.
Examined examine(const CheckpointFolder& folder, bool whole) {
  Examined e;
  e.folder = folder;
  try {
    const Checkpoint c = open_checkpoint(folder.path);
    e.folder.step = c.state.step;
    e.mesh = c.mesh;
    e.tensors = int64_t(c.tensors.size());
    for (const StoredFile& file : c.files) e.bytes += file.bytes;
    if (whole) verify(c);
  } catch (const Error& error) {
    e.error = error.what();
  }
  return e;
}

void print_json(const vector<Examined>& list) {
  JsonWriter w(2);
  w.array();
  for (const Examined& e : list) {
    w.object().key("path").value(e.folder.path).key("step").value(e.folder.step);
    w.key("good").value(e.error.empty()).key("bytes").value(e.bytes);
    w.key("tensors").value(e.tensors);
    if (!e.error.empty()) w.key("error").value(e.error);
    w.end();
  }
  printf("%s\n", w.end().str().c_str());
}

void print_lines(const vector<Examined>& list, const char* good) {
  for (const Examined& e : list) {
    if (!e.error.empty())
      printf("BAD   %s\n      %s\n", e.folder.path.c_str(), e.error.c_str());
    else
      printf("%s  %s  step %s, %s in %s tensors, saved under pp %d, dp %d, cp %d, ep %d\n", good,
             e.folder.path.c_str(), with_commas(e.folder.step).c_str(),
             bytes_text(double(e.bytes)).c_str(), with_commas(e.tensors).c_str(), e.mesh.pp,
             e.mesh.dp, e.mesh.cp, e.mesh.ep);
  }
}
// ||b - a|| / ||a|| of a weight; ||b|| where a is zero.
double relative_difference(const WeightSource& a, const WeightSource& b, const Piece& piece) {
  vector<float> x(1 << 18), y(x.size());
  const int64_t n = piece.dims.numel(), most = int64_t(x.size());
  double square = 0, norm = 0;
  for (int64_t at = 0; at < n; at += most) {
    const int64_t count = std::min(most, n - at);
    read_weight(a, piece.name, at, count, x.data());
    read_weight(b, piece.name, at, count, y.data());
    for (size_t k = 0; k < size_t(count); k++) {
      square += (double{y[k]} - x[k]) * (double{y[k]} - x[k]);
      norm += double{x[k]} * x[k];
    }
  }
  return std::sqrt(norm > 0 ? square / norm : square);
}

// Compares every weight of two folders; exit code 1 if one differs by more than `limit`.
int diff(const string& from, const string& to, double limit, bool json) {
  const WeightSource a = open_weights(from), b = open_weights(to);
  const ParameterTable whole = whole_table(model_config(a));
  check_weights(a, whole);
  check_weights(b, whole);
  vector<std::pair<double, string>> all;
  for (const Parameter& parameter : whole)
    for (const Piece& piece : parameter.pieces)
      all.emplace_back(relative_difference(a, b, piece), piece.name);
  std::sort(all.rbegin(), all.rend());
  JsonWriter w(2);
  w.array();
  size_t beyond = 0;
  for (size_t i = 0; i < all.size(); i++) {
    const auto& [difference, name] = all[i];
    beyond += difference > limit;
    w.object().key("name").value(name).key("difference").value(difference).end();
    if (!json && i < 10) printf("%.3e  %s\n", difference, name.c_str());
  }
  if (json)
    printf("%s\n", w.end().str().c_str());
  else
    printf("%zu of %zu weights differ by more than %g (relative L2; the worst are above)\n", beyond,
           all.size(), limit);
  return beyond ? kExitFailed : kExitDone;
}
}  // namespace

int run_checkpoint(int argc, char** argv) {
  Arguments args("pith checkpoint",
                 "Lists a run's checkpoints, reads them whole and checks every checksum, or "
                 "compares the weights of two.");
  string action, folder, other;
  double limit = 0;
  bool json = false;
  args.choice("action", action, {"list", "verify", "diff"},
              "list: a line each; verify: read everything; diff: exit code 1 if weights differ");
  args.positional("folder", folder, "a checkpoint, or a run folder: all of its checkpoints");
  args.positional("other", other,
                  "diff: what to compare; both may be a checkpoint, a run folder (its newest "
                  "checkpoint) or a Hugging Face folder",
                  false);
  args.option("--limit", limit, "diff: relative L2 that a weight may differ by", 0);
  args.flag("--json", json, "print the result as JSON");
  if (!args.parse(argc, argv)) return kExitDone;
  if (action == "diff" && other.empty())
    bad_input("pith checkpoint diff", "needs two folders (got 1)", "pith checkpoint diff A B");
  if (action != "diff" && (!other.empty() || args.given("--limit")))
    bad_input("pith checkpoint " + action, "takes one folder and no --limit",
              "pith checkpoint " + action + " " + folder);
  if (action == "diff") return diff(folder, other, limit, json);
  vector<CheckpointFolder> folders = list_checkpoints(folder);
  if (folders.empty()) folders.push_back({0, folder});
  vector<Examined> list;
  bool good = true;
  for (const CheckpointFolder& one : folders) {
    list.push_back(examine(one, action == "verify"));
    good = good && list.back().error.empty();
  }
  if (json)
    print_json(list);
  else
    print_lines(list, action == "verify" ? "good" : "    ");
  return good ? kExitDone : kExitBadInput;
}

}  // namespace pith
