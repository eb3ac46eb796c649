// layouts_check: runs layouts of a configuration and compares each with one rank.
#include <cstdio>
#include <map>

#include "app/commands.h"
#include "core/json.h"
#include "core/log.h"
#include "core/process.h"
#include "layouts/layouts.h"

namespace pith {

namespace {
void print_line(const Layout& layout, const LayoutResult& r, double seconds, bool json) {
  const string name = layout_text(layout);
  if (json) {
    JsonWriter w;
    w.object().key("layout").value(name).key("ranks").value(layout.ranks());
    w.key("pass").value(r.pass).key("gradient").value(r.gradient);
    w.key("gradient_of").value(r.gradient_of).key("norm").value(r.norm);
    w.key("loss").value(r.loss).key("balance").value(r.balance);
    w.key("weights").value(r.weights).key("weights_of").value(r.weights_of);
    w.key("routed_otherwise").value(r.routed_otherwise).key("logit_gap").value(r.logit_gap);
    w.key("seconds").value(seconds).key("why").value(r.why).end();
    printf("%s\n", w.str().c_str());
  } else {
    const string gap = r.routed_otherwise ? text(" (logit gap %.1e)", r.logit_gap) : "";
    printf(
        "%-4s  %-28s %2d ranks  gradient %.1e  norm %.1e  loss %.1e  balance %.1e  weights "
        "%.1e  experts %ld%s  %.1f s%s%s\n",
        r.pass ? "PASS" : "FAIL", name.c_str(), layout.ranks(), r.gradient, r.norm, r.loss,
        r.balance, r.weights, r.routed_otherwise, gap.c_str(), seconds, r.pass ? "" : "  ",
        r.why.c_str());
  }
  fflush(stdout);
}
}  // namespace

static int run(int argc, char** argv) {
  // Runs each layout for some steps on CPU ranks and compares gradients, losses, experts and
  // weights with one rank. Exit code 1 if one differs.
  Arguments args("layouts_check");
  string file;
  vector<string> set, names;
  bool all = false, json = false;
  int64_t max_ranks = 16, steps = 8;
  double fault = 1;
  args.option("run", file, "run.toml");
  args.list("--set", set, "KEY=VALUE, as for pith train");
  args.list("--layout", names, "such as pp2-dp1-cp2-ep2, pp1-dp2-cp1-ep1-hsdp-layer-mb2", ',');
  args.flag("--all", all, "pp 1,2,4 x dp 1,2 x cp 1,2 x ep 1,2,4");
  args.option("--max-ranks", max_ranks, "leave out larger ones of --all", 1, 256);
  args.option("--steps", steps, "of each run", 1, 1000);
  args.option("--expert-gradient-fault", fault,
      "plants a fault: this factor on the experts' gradients of every layout");
  args.flag("--json", json, "a JSON object a line");
  if (!args.parse(argc, argv)) return kExitDone;
  vector<Layout> layouts;
  for (const string& name : names) layouts.push_back(parse_layout(name));
  if (all)
    for (const Layout& l : all_layouts(int(max_ranks))) layouts.push_back(l);
  if (layouts.empty())
    bad_input("layouts_check", "no layout is given", "--all, or --layout pp2-ep2");
  RunConfig config = load_run_config(file, set);
  config.train.steps = std::max(config.train.steps, steps);
  // Only the balance loss of micro-batches depends on their size.
  const bool by_size = config.router.balance_loss == "micro-batch";
  std::map<int64_t, Probe> references;
  int failures = 0;
  for (const Layout& layout : layouts) {
    if (stop_requested()) return kExitStopped;
    const int64_t size = by_size ? layout.micro_batch : 1;
    Probe& reference = references[size];
    if (reference.loss.empty()) {
      reference.steps = steps;
      run_layout(config, {.micro_batch = size}, reference);
    }
    Probe probe;
    probe.steps = steps;
    probe.gradient_fault = fault;
    const double began = now_s();
    run_layout(config, layout, probe);
    const LayoutResult result = compare_layouts(reference, probe);
    print_line(layout, result, now_s() - began, json);
    failures += !result.pass;
  }
  if (!json)
    printf("%s: %d of %zu layouts equal one rank\n", failures ? "FAIL" : "PASS",
        int(layouts.size()) - failures, layouts.size());
  return failures ? kExitFailed : kExitDone;
}

}  // namespace pith

int main(int argc, char** argv) { return pith::run_program(argc, argv, pith::run); }
