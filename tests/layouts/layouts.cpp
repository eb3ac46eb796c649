#include "layouts/layouts.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "comm/launch.h"

namespace pith {

string layout_text(const Layout& l) {
  return text("pp%d-dp%d-cp%d-ep%d", l.pp, l.dp, l.cp, l.ep) + (l.dp_replicate > 1 ? "-hsdp" : "") +
         (l.gather_layer ? "-layer" : "") +
         (l.micro_batch > 1 ? text("-mb%ld", l.micro_batch) : "");
}

Layout parse_layout(const string& name) {
  Layout l;
  bool hsdp = false, known = !name.empty();
  for (size_t at = 0; at < name.size() && known;) {
    const size_t end = std::min(name.find('-', at), name.size());
    const string word = name.substr(at, end - at);
    at = end + 1;
    const size_t digits = std::min(word.find_first_of("0123456789"), word.size());
    const string axis = word.substr(0, digits);
    const int size = atoi(word.c_str() + digits);
    if (word == "hsdp")
      hsdp = true;
    else if (word == "layer")
      l.gather_layer = true;
    else if (size < 1 || word.find_first_not_of("0123456789", digits) != string::npos)
      known = false;
    else if (axis == "pp")
      l.pp = size;
    else if (axis == "dp")
      l.dp = size;
    else if (axis == "cp")
      l.cp = size;
    else if (axis == "ep")
      l.ep = size;
    else if (axis == "mb")
      l.micro_batch = size;
    else
      known = false;
  }
  if (!known)
    bad_input("layout", text("cannot be read (got \"%s\")", name.c_str()),
        "a form such as pp2-dp2-cp1-ep4-hsdp-layer-mb2");
  if (hsdp) l.dp_replicate = l.dp;
  return l;
}

vector<Layout> all_layouts(int max_ranks) {
  vector<Layout> all;
  for (const int pp : {1, 2, 4})
    for (const int dp : {1, 2})
      for (const int cp : {1, 2})
        for (const int ep : {1, 2, 4})
          if (pp * dp * cp * ep <= max_ranks)
            all.push_back({.pp = pp, .dp = dp, .cp = cp, .ep = ep});
  return all;
}

RunPlan plan_layout(const RunConfig& config, const Layout& layout) {
  RunConfig c = config;
  c.parallel.pp = layout.pp;
  c.parallel.cp = layout.cp;
  c.parallel.ep = layout.ep;
  c.parallel.dp_replicate = layout.dp_replicate;
  c.parallel.gather = layout.gather_layer ? "layer" : "step";
  c.train.micro_batch_size = layout.micro_batch;
  return plan_run(c, Device::CPU, layout.ranks());
}

// Copies this rank's part of every unit's `value` into full tensors by name.
static void collect(
    Trainer& t, Probe& probe, std::map<string, vector<float>>& out, Tensor FlatUnit::*value) {
  if (group_rank(t.rank, Group::Replicate) != 0) return;
  const std::lock_guard lock(probe.mutex);
  for (const Fragment& f : fragments(t.parameters)) {
    vector<float>& whole = out[f.piece->name];
    whole.resize(f.piece->dims.numel());
    const float* from = (t.parameters.units[f.unit].*value).f32() + f.offset;
    std::copy(from, from + f.count, whole.begin() + f.begin);
  }
}

static void probe_rank(Trainer& t, Probe& probe) {
  while (t.state.step < probe.steps) {
    StepMetrics m = t.compute_gradients();
    for (const FlatUnit& unit : t.parameters.units)
      for (int64_t i = 0; unit.kind == UnitKind::Experts && i < unit.shard_count; i++)
        unit.grad_shard.f32()[i] *= float(probe.gradient_fault);
    if (t.state.step == 0) collect(t, probe, probe.gradients, &FlatUnit::grad_shard);
    if (t.rank.id == 0) probe.routing.push_back(t.run.routing);
    t.update(m);
    if (t.rank.id != 0) continue;
    probe.loss.push_back(m.loss);
    probe.norm.push_back(m.gradient_norm);
    probe.balance.push_back(m.mean_balance_loss());
  }
  collect(t, probe, probe.weights, &FlatUnit::master);
}

void run_probe(const RunPlan& plan, Probe& probe, const string& routing_replay) {
  const RunConfig& config = plan.config;
  Run run{.plan = plan, .routing_replay = routing_replay, .tracing = true};
  run.data.require_samples(probe.steps * plan.batch.global_batch);
  if (!config.model.init_from.empty()) run.init_from = open_weights(config.model.init_from);
  run_ranks(plan.mesh, plan.device, {}, [&](Rank& rank) {
    Trainer trainer(rank, run);
    probe_rank(trainer, probe);
  });
}

void run_layout(
    const RunConfig& config, const Layout& layout, Probe& probe, const string& routing_replay) {
  run_probe(plan_layout(config, layout), probe, routing_replay);
}

// ||a - b|| / ||b||; infinite where sizes differ or a value is not a number.
static double relative_error(const vector<float>& a, const vector<float>& b) {
  if (a.size() != b.size()) return INFINITY;
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); i++) {
    difference += (double{a[i]} - b[i]) * (double{a[i]} - b[i]);
    norm += double{b[i]} * b[i];
  }
  const double error = std::sqrt(norm > 0 ? difference / norm : difference);
  return std::isfinite(error) ? error : INFINITY;
}

using Tensors = std::map<string, vector<float>>;

static double worst_tensor(const Tensors& got, const Tensors& want, string& name) {
  double worst = 0;
  for (const auto& [key, values] : want) {
    const auto found = got.find(key);
    const double error = found == got.end() ? INFINITY : relative_error(found->second, values);
    if (error <= worst && !name.empty()) continue;
    worst = error;
    name = key;
  }
  return got.size() == want.size() ? worst : INFINITY;
}

static double worst_step(const vector<double>& got, const vector<double>& want) {
  if (got.size() != want.size()) return INFINITY;
  double worst = 0;
  for (size_t i = 0; i < want.size(); i++) {
    const double scale = want[i] == 0 ? 1 : std::fabs(want[i]);
    const double error = std::fabs(got[i] - want[i]) / scale;
    worst = std::isfinite(error) ? std::max(worst, error) : INFINITY;
  }
  return worst;
}

// Counts tokens with other experts. Only the first of them, in the earliest step and layer, need
// have been near a tie: what follows is computed from other activations.
static void compare_routing(const Probe& reference, const Probe& probe, LayoutResult& r) {
  std::pair<size_t, int64_t> first_at{SIZE_MAX, 0};
  for (size_t s = 0; s < std::min(reference.routing.size(), probe.routing.size()); s++) {
    const RoutingStep &want = reference.routing[s], &got = probe.routing[s];
    const int64_t k = want.top_k;
    for (int64_t at = 0; at < want.layers * want.tokens; at++) {
      const int32_t* ids = &want.ids[at * k];
      if (std::is_permutation(ids, ids + k, &got.ids[at * k])) continue;
      const std::pair<size_t, int64_t> here{s, at / want.tokens};
      if (r.routed_otherwise++ == 0) first_at = here;
      if (here == first_at) r.logit_gap = std::max(r.logit_gap, double{want.gaps[at]});
    }
  }
}

LayoutResult compare_layouts(
    const Probe& reference, const Probe& probe, const LayoutLimits& limits) {
  LayoutResult r;
  r.gradient = worst_tensor(probe.gradients, reference.gradients, r.gradient_of);
  r.weights = worst_tensor(probe.weights, reference.weights, r.weights_of);
  // Later norms follow the weights, which drift; the first one is of the same weights.
  r.norm = worst_step({probe.norm.begin(), probe.norm.begin() + !probe.norm.empty()},
      {reference.norm.begin(), reference.norm.begin() + 1});
  r.loss = worst_step(probe.loss, reference.loss);
  r.balance = worst_step(probe.balance, reference.balance);
  compare_routing(reference, probe, r);
  const auto demand = [&](const char* what, double error, double limit, const string& of) {
    if (error <= limit) return;
    r.why += (r.why.empty() ? "" : "; ") + text("%s %.1e > %.0e", what, error, limit) +
             (of.empty() ? "" : " (" + of + ")");
  };
  demand("gradient", r.gradient, limits.gradient, r.gradient_of);
  demand("gradient norm", r.norm, limits.norm, "");
  demand("loss", r.loss, limits.loss, "");
  demand("balance loss", r.balance, limits.balance, "");
  demand("weights", r.weights, limits.weights, r.weights_of);
  demand("logit gap of the first other experts", r.logit_gap, limits.logit_gap, "");
  r.pass = r.why.empty();
  return r;
}

}  // namespace pith
