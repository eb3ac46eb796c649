// layouts: the proof that every parallel layout trains the same model.
//
// A layout is run for some steps and compared with a reference run of one rank: every tensor's
// gradient of step 1 before clipping and the gradient norm (the sharp test: Adam hides scale errors
// from the loss), losses, experts chosen, and the weights at the end. Longer curves diverge by
// chaos, not by error.
#pragma once
#include <map>
#include <mutex>

#include "engine/trainer.h"

namespace pith {

// What the equality of layouts is judged by; filled by all ranks of a run.
struct Probe {
  int64_t steps = 8;                          // the run ends after these
  std::mutex mutex;                           // of the maps, which ranks fill
  vector<double> loss, norm;                  // by step; loss in nats a label
  vector<double> balance;                     // by step: mean over layers, unscaled
  std::map<string, vector<float>> gradients;  // of step 1, before clipping, by tensor
  std::map<string, vector<float>> weights;    // after the last step
  vector<RoutingStep> routing;                // by step: ids, and the logit gap behind each
  double gradient_fault = 1;                  // a fault to plant: factor on the experts' gradients
};

struct Layout {
  int pp = 1, dp = 1, cp = 1, ep = 1;
  int dp_replicate = 1;
  bool gather_layer = false;
  int64_t micro_batch = 1;
  int ranks() const { return pp * dp * cp * ep; }
  bool operator==(const Layout&) const = default;
};
// "pp2-dp2-cp1-ep4", with "-hsdp" (weights replicated over all of dp), "-layer", "-mb2" behind.
string layout_text(const Layout& layout);
Layout parse_layout(const string& text);  // Exit code 2.
// {pp 1, 2, 4} x {dp 1, 2} x {cp 1, 2} x {ep 1, 2, 4} of at most `max_ranks` ranks.
vector<Layout> all_layouts(int max_ranks);

// Relative errors that still count as equal.
struct LayoutLimits {
  double gradient = 1e-5;  // a tensor's, in L2
  double norm = 1e-5, loss = 1e-5, balance = 1e-5;
  double weights = 1e-3;    // a tensor's, in L2, after the last step
  double logit_gap = 1e-5;  // of the first tokens whose experts differ
};

struct LayoutResult {
  double gradient = 0, norm = 0, loss = 0, balance = 0, weights = 0;  // worst relative errors
  string gradient_of, weights_of;                                     // the tensors
  int64_t routed_otherwise = 0;  // (layer, token, step) triples with other experts
  double logit_gap = 0;          // largest in the first step and layer that has any
  bool pass = false;
  string why;  // what is beyond its limit; empty if it passes
};

// Runs `probe.steps` steps of the plan, with the experts of a folder of traces if one is named.
// Nothing is written.
void run_probe(const RunPlan& plan, Probe& probe, const string& routing_replay = "");
RunPlan plan_layout(const RunConfig& config, const Layout& layout);
void run_layout(
    const RunConfig& config, const Layout& layout, Probe& probe, const string& routing_replay = "");
LayoutResult compare_layouts(
    const Probe& reference, const Probe& probe, const LayoutLimits& limits = {});

}  // namespace pith
