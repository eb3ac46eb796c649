// Every parallel layout trains the same model: the promise of the whole engine.
#include "layouts/layouts.h"

#include <cmath>
#include <cstring>
#include <numeric>
#include <set>

#include "comm/launch.h"
#include "engine/checkpoint.h"
#include "engine/child.h"
#include "engine/small_run.h"

namespace pith {
namespace {

// In 8 steps at this learning rate rounding moves router logits by up to 2e-6. The seeds below are
// such that no token's choice of experts is closer than this, so that all layouts must choose
// alike.
constexpr double kRate = 3e-4, kClosest = 2.5e-6;

RunConfig seeded_run(uint64_t seed, const SmallModel& model = {}) {
  RunConfig c = small_run(model);
  c.optimizer.lr = kRate;
  c.data.seed = seed;
  return c;
}

std::vector<Layout> parse_all(const std::vector<const char*>& names) {
  std::vector<Layout> layouts;
  for (const char* name : names) layouts.push_back(parse_layout(name));
  return layouts;
}

// Of all layouts, those of [least, most] ranks for which change(layout) holds.
std::vector<Layout> layouts_of(int least, int most, bool (*change)(Layout&)) {
  std::vector<Layout> layouts;
  for (Layout l : all_layouts(16))
    if (l.ranks() >= least && l.ranks() <= most && change(l)) layouts.push_back(l);
  return layouts;
}
bool as_is(Layout&) { return true; }
bool replicated(Layout& l) {
  l.dp_replicate = l.dp;
  return l.dp > 1;
}
bool by_layer(Layout& l) {
  l.gather_layer = true;
  l.micro_batch = 2;
  return true;
}

std::string described(const Layout& l, const LayoutResult& r) {
  return layout_text(l) + ": " + r.why +
         text(
             " (gradient %.1e of %s, norm %.1e, loss %.1e, balance %.1e, weights %.1e of %s, "
             "%lld routed otherwise, gap %.1e)",
             r.gradient, r.gradient_of.c_str(), r.norm, r.loss, r.balance, r.weights,
             r.weights_of.c_str(), static_cast<long long>(r.routed_otherwise), r.logit_gap);
}

void expect_whole(const Probe& p, const SmallModel& model) {
  ASSERT_EQ(p.loss.size(), size_t(p.steps));
  ASSERT_EQ(p.routing.size(), size_t(p.steps));
  ASSERT_EQ(p.gradients.size(), 3u + model.layers * (9 + 3 * model.experts));
  for (const auto& [name, values] : p.gradients)
    for (const float v : values) ASSERT_TRUE(std::isfinite(v)) << name;
}

double smallest_gap(const Probe& p) {
  float smallest = INFINITY;
  for (const RoutingStep& step : p.routing)
    for (const float gap : step.gaps) smallest = std::min(smallest, gap);
  return smallest;
}

// The reference is one rank with the given micro-batch size.
void expect_equal(const RunConfig& config, const std::vector<Layout>& layouts,
    const SmallModel& model = {}, int64_t micro_batch = 1, int64_t steps = 8) {
  Probe reference;
  reference.steps = steps;
  run_layout(config, {.micro_batch = micro_batch}, reference);
  ASSERT_NO_FATAL_FAILURE(expect_whole(reference, model));
  ASSERT_GT(smallest_gap(reference), kClosest) << "take another seed";
  for (const Layout& layout : layouts) {
    Probe probe;
    probe.steps = steps;
    run_layout(config, layout, probe);
    const LayoutResult r = compare_layouts(reference, probe);
    EXPECT_TRUE(r.pass) << described(layout, r);
    EXPECT_EQ(r.routed_otherwise, 0) << described(layout, r);
  }
}

// ---- all layouts ----

constexpr uint64_t kSeed = 5;

TEST(SlowLayouts, Sharded1To4) { expect_equal(seeded_run(kSeed), layouts_of(1, 4, as_is)); }
TEST(SlowLayouts, Sharded8) { expect_equal(seeded_run(kSeed), layouts_of(8, 8, as_is)); }
TEST(SlowLayouts, Sharded16) { expect_equal(seeded_run(kSeed), layouts_of(16, 16, as_is)); }
TEST(SlowLayouts, Replicated1To8) { expect_equal(seeded_run(kSeed), layouts_of(1, 8, replicated)); }
TEST(SlowLayouts, Replicated16) { expect_equal(seeded_run(kSeed), layouts_of(16, 16, replicated)); }
TEST(SlowLayouts, ByLayer1To4) { expect_equal(seeded_run(kSeed), layouts_of(1, 4, by_layer)); }
TEST(SlowLayouts, ByLayer8) { expect_equal(seeded_run(kSeed), layouts_of(8, 8, by_layer)); }
TEST(SlowLayouts, ByLayer16) { expect_equal(seeded_run(kSeed), layouts_of(16, 16, by_layer)); }

// Few and small enough for the sanitizers, which run them too (scripts/threads.sh).
TEST(Layouts, AFewOfASmallerModel) {
  const SmallModel model{.layers = 4, .length = 16, .global_batch = 16, .documents = 100};
  expect_equal(seeded_run(kSeed, model),
      parse_all({"pp2-ep2", "dp2-cp2-ep2-layer", "pp2-dp2-cp2-hsdp", "ep4-mb2"}), model, 1, 2);
}

TEST(Layouts, TheFullProduct) {
  EXPECT_EQ(layouts_of(1, 16, as_is).size(), 31u);
  EXPECT_EQ(layouts_of(1, 16, replicated).size(), 14u);
  for (const Layout& l : layouts_of(1, 16, by_layer)) EXPECT_EQ(parse_layout(layout_text(l)), l);
}

// ---- balance losses ----

const std::vector<const char*> kEight = {"pp2-ep2", "pp4-dp2", "cp2-ep4", "pp2-dp2-cp2-ep2",
    "dp2-ep4-hsdp", "dp2-cp2-ep2-layer", "pp4-cp2-ep2", "pp2-cp2-ep4-layer"};

RunConfig balanced_run(uint64_t seed, const char* kind) {
  RunConfig c = seeded_run(seed);
  c.router.balance_loss = kind;
  c.router.balance_coefficient = 1;
  return c;
}

// Layouts are equal at equal micro-batch size; in micro-batches of 1 this loss is that of
// sequences.
TEST(SlowLayouts, BalanceOfMicroBatches) {
  std::vector<Layout> layouts = parse_all(kEight);
  for (Layout& l : layouts) l.micro_batch = 2;
  expect_equal(balanced_run(3, "micro-batch"), layouts, {}, 2);
}
// And these at any.
TEST(SlowLayouts, BalanceOfSequences) {
  std::vector<Layout> layouts = parse_all(kEight);
  layouts[2].micro_batch = layouts[7].micro_batch = 2;
  expect_equal(balanced_run(12, "sequence"), layouts);
}
constexpr uint64_t kGlobalBatchSeed = 6;
TEST(SlowLayouts, BalanceOfGlobalBatches) {
  std::vector<Layout> layouts = parse_all(kEight);
  layouts[2].micro_batch = layouts[7].micro_batch = 2;
  expect_equal(balanced_run(kGlobalBatchSeed, "global-batch"), layouts);
}

// ---- sizes that do not divide, documents ----

TEST(SlowLayouts, GroupsOf3And5) {
  const SmallModel model{.length = 30, .global_batch = 60};
  expect_equal(seeded_run(3, model),
      parse_all({"dp3", "cp3", "dp5", "cp5", "dp3-hsdp", "pp2-dp3-layer", "cp3-ep2", "dp3-ep4",
          "pp2-cp5-layer-mb2", "dp5-ep2-layer"}),
      model);
}

TEST(SlowLayouts, UnevenStages) {
  for (const int layers : {9, 11}) {
    const SmallModel model{.layers = layers};
    RunConfig c = seeded_run(layers == 9 ? 5 : 13, model);
    expect_equal(c, parse_all({"pp4", "pp4-dp2-ep2", "pp4-cp2-layer-mb2"}), model);
    c.parallel.schedule = "1f1b";
    c.parallel.weight_grad_batch = 3;
    expect_equal(c, parse_all({"pp4", "pp4-ep2-layer"}), model);
  }
}

TEST(SlowLayouts, Documents) {
  RunConfig c = seeded_run(27);
  c.data.document_mask = true;
  expect_equal(c, parse_all({"cp2", "dp2-cp2", "pp2-cp2-ep2", "pp4-dp2-layer-mb2",
                      "pp2-dp2-cp2-ep2", "cp2-ep4"}));
}

// ---- skewed routing ----

// All tokens of a layer choose one expert, so that other experts and whole ranks get none.
int busy_expert(int64_t layer) { return static_cast<int>((5 + 3 * layer) % 8); }

std::string forced_routing(const RunConfig& c, const SmallModel& model) {
  const std::string folder = c.run.folder + "-forced";
  const int64_t tokens = model.global_batch * model.length;
  for (int step = 1; step <= 8; step++) {
    RoutingStep routing;
    begin_trace(routing, model.layers, tokens, 1);
    for (int64_t i = 0; i < model.layers * tokens; i++) {
      routing.ids[i] = busy_expert(i / tokens);
      routing.weights[i] = 1;
    }
    write_routing(folder, step, routing);
  }
  return folder;
}

TEST(SlowLayouts, OneExpertTakesAll) {
  const SmallModel model{.top_k = 1};
  const RunConfig c = seeded_run(kSeed, model);
  const std::string folder = forced_routing(c, model);
  Probe reference;
  run_layout(c, {}, reference, folder);
  ASSERT_NO_FATAL_FAILURE(expect_whole(reference, model));
  for (const Layout& layout : parse_all({"pp1", "ep2", "ep4", "dp2-ep4", "cp2-ep4-layer-mb2",
           "pp2-ep4", "pp4-dp2-ep2-hsdp", "pp2-dp2-cp2-ep2-layer"})) {
    Probe probe;
    run_layout(c, layout, probe, folder);
    const LayoutResult r = compare_layouts(reference, probe);
    EXPECT_TRUE(r.pass) << described(layout, r);
    int idle = 0;
    for (const auto& [name, values] : probe.gradients) {
      int layer = 0, expert = 0;
      if (sscanf(name.c_str(), "model.layers.%d.mlp.experts.%d.", &layer, &expert) != 2) continue;
      const bool zero = std::all_of(values.begin(), values.end(), [](float v) { return v == 0; });
      EXPECT_EQ(zero, expert != busy_expert(layer)) << layout_text(layout) << " " << name;
      idle += zero;
    }
    EXPECT_EQ(idle, model.layers * (model.experts - 1) * 3);
  }
}

// ---- faults are found ----

TEST(SlowLayouts, AWrongScaleOfExpertGradientsIsFound) {
  const RunConfig c = seeded_run(kSeed);
  Probe reference;
  run_layout(c, {}, reference);
  for (const Layout& layout : parse_all({"ep2", "pp2-ep4", "dp2-cp2-ep2-layer"})) {
    Probe probe;
    probe.gradient_fault = layout.ep;
    run_layout(c, layout, probe);
    const LayoutResult r = compare_layouts(reference, probe);
    EXPECT_FALSE(r.pass);
    EXPECT_NE(r.why.find("gradient"), std::string::npos) << r.why;
    EXPECT_NE(r.gradient_of.find(".mlp.experts."), std::string::npos) << r.gradient_of;
  }
}

// Each limit is judged: a probe that differs in one thing fails, and says in which.
TEST(Layouts, EachDifferenceIsNamed) {
  Probe reference;
  reference.loss = reference.norm = reference.balance = {1, 1};
  reference.gradients = {{"a", {3, 4}}, {"b", {1}}};
  reference.weights = {{"a", {1, 1}}};
  RoutingStep step{.layers = 2, .tokens = 2, .top_k = 2};
  step.ids = {0, 1, 0, 2, 3, 1, 2, 3};
  step.gaps = {1e-6f, 1, 1, 1};
  reference.routing = {step, step};
  const auto copy = [&](Probe& to) {
    to.loss = to.norm = to.balance = {1, 1};
    to.gradients = reference.gradients;
    to.weights = reference.weights;
    to.routing = reference.routing;
  };
  const struct {
    const char* why;  // empty: passes
    void (*change)(Probe&);
  } cases[] = {
      {"", [](Probe&) {}},
      {"", [](Probe& p) { p.loss[1] *= 1 + 9e-6; }},
      {"loss 2.0e-05 > 1e-05", [](Probe& p) { p.loss[1] *= 1 + 2e-5; }},
      {"loss inf > 1e-05", [](Probe& p) { p.loss.pop_back(); }},
      {"loss inf > 1e-05", [](Probe& p) { p.loss[0] = NAN; }},
      {"gradient norm 2.0e-05 > 1e-05", [](Probe& p) { p.norm[0] *= 1 + 2e-5; }},
      {"", [](Probe& p) { p.norm[1] *= 2; }},
      {"balance loss 1.0e+00 > 1e-05", [](Probe& p) { p.balance[0] = 0; }},
      {"gradient 2.0e-01 > 1e-05 (a)", [](Probe& p) { p.gradients["a"][0] += 1; }},
      {"gradient inf > 1e-05 (b)", [](Probe& p) { p.gradients["b"][0] = NAN; }},
      {"gradient inf > 1e-05 (b)", [](Probe& p) { p.gradients.erase("b"); }},
      {"weights 1.0e+00 > 1e-03 (a)",
          [](Probe& p) {
            p.weights["a"] = {0, 0};
          }},
      {"", [](Probe& p) { std::swap(p.routing[0].ids[0], p.routing[0].ids[1]); }},
      {"", [](Probe& p) { p.routing[0].ids[0] = 2; }},
      {"", [](Probe& p) { p.routing[0].ids[0] = p.routing[0].ids[4] = p.routing[1].ids[2] = 5; }},
      {"logit gap of the first other experts 1.0e+00 > 1e-05",
          [](Probe& p) { p.routing[0].ids[0] = p.routing[0].ids[2] = 5; }},
      {"logit gap of the first other experts 1.0e+00 > 1e-05",
          [](Probe& p) { p.routing[1].ids[7] = 5; }},
  };
  for (const auto& c : cases) {
    Probe probe;
    copy(probe);
    c.change(probe);
    const LayoutResult r = compare_layouts(reference, probe);
    EXPECT_EQ(r.why, c.why);
    EXPECT_EQ(r.pass, !*c.why);
  }
}

// ---- the same bits again ----

// FNV-1a of everything a probe saw.
uint64_t hash_of(const Probe& p) {
  uint64_t hash = 0xcbf29ce484222325;
  const auto add = [&](const void* data, size_t bytes) {
    for (size_t i = 0; i < bytes; i++)
      hash = (hash ^ static_cast<const unsigned char*>(data)[i]) * 0x100000001b3;
  };
  for (const auto* tensors : {&p.gradients, &p.weights})
    for (const auto& [name, values] : *tensors) add(values.data(), values.size() * 4);
  for (const auto* numbers : {&p.loss, &p.norm}) add(numbers->data(), numbers->size() * 8);
  for (const RoutingStep& s : p.routing) add(s.weights.data(), s.weights.size() * 4);
  return hash;
}

TEST(SlowLayouts, FreshProcessesRepeatBitForBit) {
  if (!child_role().empty()) {
    Probe probe;
    run_layout(seeded_run(kSeed), parse_layout("pp2-dp2-cp2-ep2-layer"), probe);
    printf("\nhash %016llx\n", static_cast<unsigned long long>(hash_of(probe)));
    return;
  }
  std::set<std::string> hashes;
  for (int i = 0; i < 6; i++) {
    const Child child = run_child("repeat");
    const size_t at = child.output.find("\nhash ");
    ASSERT_TRUE(child.exit_code == 0 && at != std::string::npos) << child.output;
    hashes.insert(child.output.substr(at + 6, 16));
  }
  EXPECT_EQ(hashes.size(), 1u);
}

// ---- saved under one layout, resumed under another ----

RunConfig saved_run(const std::string& folder, int64_t steps) {
  RunConfig c = balanced_run(kGlobalBatchSeed, "global-batch");
  c.run.folder = folder;
  c.train.steps = steps;
  c.train.log_interval = 100;
  return c;
}

void train_under(const Layout& layout, const RunConfig& c) {
  train(plan_layout(c, layout), {.exit_on_failure = false});
}

// `from` as the layout's ranks hold it, saved again by them in `folder`.
Checkpoint passed_on(
    const RunConfig& c, const Layout& layout, const Checkpoint& from, const std::string& folder) {
  std::filesystem::create_directories(folder);
  const RunPlan plan = plan_layout(c, layout);
  run_ranks(plan.mesh, Device::CPU, {}, [&](Rank& rank) {
    Instance instance = make_instance(rank, plan.model, plan.pipeline);
    load_state(rank, *instance.parameters, from);
    CheckpointSaver saver(rank, *instance.parameters, {.folder = folder});
    saver.begin(rank, from.state);
    if (!saver.finish(rank)) failed("test", "not saved");
  });
  return open_checkpoint(folder + text("/step-%08lld", static_cast<long long>(from.state.step)));
}

std::vector<float> elements(const Checkpoint& c, const StoredTensor& t) {
  std::vector<float> values(t.numel());
  read_elements(c, t, 0, t.numel(), values.data());
  return values;
}

// Largest relative L2 difference of a tensor, moments among them.
double worst_difference(const Checkpoint& a, const Checkpoint& b) {
  double worst = 0;
  for (const auto& [name, t] : a.tensors) {
    const auto other = b.tensors.find(name);
    if (other == b.tensors.end()) return INFINITY;
    const std::vector<float> x = elements(a, t), y = elements(b, other->second);
    double difference = 0, norm = 1e-30;
    for (size_t i = 0; i < x.size(); i++) {
      difference += std::pow(double{x[i]} - y[i], 2);
      norm += double{y[i]} * y[i];
    }
    worst = std::max(worst, std::sqrt(difference / norm));
  }
  return a.tensors.size() == b.tensors.size() ? worst : INFINITY;
}

TEST(SlowLayouts, ResumeUnderAnotherLayout) {
  const std::string folder = small_run().run.folder;
  train_under({}, saved_run(folder, 8));
  const Checkpoint whole = *find_checkpoint(folder);
  ASSERT_EQ(whole.state.step, 8);
  const char* pairs[][2] = {{"pp1", "pp2-dp2-cp2-ep2"}, {"pp4-ep4", "dp2-cp2"},
      {"dp2-hsdp", "cp2-ep4"}, {"pp2-cp2-layer", "pp4-dp2-ep2-hsdp"}, {"dp2-ep4", "pp1-mb2"},
      {"cp2-ep2-layer-mb2", "pp4"}};
  for (const auto& [before, after] : pairs) {
    const Layout from = parse_layout(before), to = parse_layout(after);
    const std::string run = folder + "-" + before;
    train_under(from, saved_run(run, 4));
    const Checkpoint saved = *find_checkpoint(run);
    ASSERT_EQ(saved.state.step, 4);
    EXPECT_EQ(saved.mesh.world(), from.ranks());
    // Weights and moments to the bit, in the other layout's hands.
    const Checkpoint passed = passed_on(saved_run(run, 4), to, saved, run + "-passed");
    EXPECT_EQ(passed.tensors.size(), saved.tensors.size());
    EXPECT_EQ(worst_difference(passed, saved), 0) << before << " to " << after;
    // And what it makes of them is what an uninterrupted run makes.
    train_under(to, saved_run(run, 8));
    const Checkpoint resumed = *find_checkpoint(run);
    ASSERT_EQ(resumed.state.step, 8);
    EXPECT_EQ(resumed.state.samples, whole.state.samples);
    EXPECT_EQ(resumed.mesh.world(), to.ranks());
    EXPECT_LE(worst_difference(resumed, whole), 1e-4) << before << " to " << after;
  }
}

}  // namespace
}  // namespace pith
