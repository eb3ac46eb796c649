// The five stages of each layer inside an action: their order, and layer-wise sharding's gathers.
#include <algorithm>

#include "engine/schedule.h"

namespace pith {

namespace {

// Steps of one micro-batch's forward, or its backward, from the first to the last.
struct Half {
  bool backward = false;
  int chunk = 0, mb = 0;
  ChunkLayers layers;
  bool weights = false;  // a backward that is followed by its weight gradients

  Step step(Part part, int layer = -1) const {
    return {.part = part, .backward = backward, .chunk = chunk, .mb = mb, .layer = layer};
  }
  // The i-th layer that it comes to.
  int layer(int i) const {
    return backward ? layers.first + layers.count - 1 - i : layers.first + i;
  }
};

struct StepList {
  vector<Step> steps = {};

  void add(const Half& h, Part part, int i) { steps.push_back(h.step(part, h.layer(i))); }
  void weights(const Half& h, UnitKind unit, int layer, int count = 1) {
    if (!h.weights) return;
    Step s = h.step(Part::Weights, layer);
    s.unit = unit;
    s.count = count;
    steps.push_back(s);
  }

  // Up to where the first layer's communication is under way. In a backward, the head's weight
  // gradients run beside it.
  void forward_begin(const Half& f) {
    if (f.layers.prolog) steps.push_back(f.step(Part::Prolog));
    forward_reach(f, 0);
  }
  void forward_reach(const Half& f, int i) {
    if (i == f.layers.count) return;
    add(f, Part::Attention, i);
    add(f, Part::Dispatch, i);
  }
  void forward_experts(const Half& f, int i) {
    add(f, Part::Experts, i);
    add(f, Part::Combine, i);
  }
  // From the combine of layer i to the dispatch of the next.
  void forward_next(const Half& f, int i) {
    add(f, Part::Residual, i);
    forward_reach(f, i + 1);
  }
  void forward_end(const Half& f) {
    if (f.layers.epilog) steps.push_back(f.step(Part::Epilog));
  }

  void backward_begin(const Half& b) {
    if (b.layers.epilog) steps.push_back(b.step(Part::Epilog));
    backward_reach(b, 0);
    if (b.layers.epilog) weights(b, UnitKind::Head, -1);
  }
  void backward_reach(const Half& b, int i) {
    if (i == b.layers.count) return;
    add(b, Part::Residual, i);
    add(b, Part::Combine, i);
  }
  // The experts' weight gradients run beside the way back of what was dispatched.
  void backward_experts(const Half& b, int i) {
    add(b, Part::Experts, i);
    add(b, Part::Dispatch, i);
    weights(b, UnitKind::Experts, b.layer(i));
  }
  // The rest's run beside the way out of the next layer's gradients.
  void backward_next(const Half& b, int i) {
    add(b, Part::Attention, i);
    backward_reach(b, i + 1);
    weights(b, UnitKind::Layer, b.layer(i));
  }
  void backward_end(const Half& b) {
    if (!b.layers.prolog) return;
    steps.push_back(b.step(Part::Prolog));
    weights(b, UnitKind::Embedding, -1);
  }
};

void forward_steps(StepList& s, const Half& f, int from = 0) {
  for (int i = from; i < f.layers.count; i++) {
    s.forward_experts(f, i);
    s.forward_next(f, i);
  }
  s.forward_end(f);
}

void backward_steps(StepList& s, const Half& b, int from = 0) {
  for (int i = from; i < b.layers.count; i++) {
    s.backward_experts(b, i);
    s.backward_next(b, i);
  }
  s.backward_end(b);
}

// Each dispatch and combine starts as soon as it can, and before what waits for it comes compute of
// the other micro-batch: the forward's dispatch runs beside the backward's experts, the backward's
// dispatch beside their weight gradients and the forward's experts, the forward's combine beside
// the backward's attention, the backward's combine beside the forward's next attention. What one
// half has more of follows by itself.
void overlapped_steps(StepList& s, const Half& f, const Half& b) {
  s.backward_begin(b);
  s.forward_begin(f);
  const int pairs = std::min(f.layers.count, b.layers.count);
  for (int i = 0; i < pairs; i++) {
    s.backward_experts(b, i);
    s.forward_experts(f, i);
    s.backward_next(b, i);
    s.forward_next(f, i);
  }
  backward_steps(s, b, pairs);
  forward_steps(s, f, pairs);
}

void weight_steps(StepList& s, const Half& b, int count) {
  if (b.layers.epilog) s.weights(b, UnitKind::Head, -1, count);
  for (int i = 0; i < b.layers.count; i++) {
    s.weights(b, UnitKind::Experts, b.layer(i), count);
    s.weights(b, UnitKind::Layer, b.layer(i), count);
  }
  if (b.layers.prolog) s.weights(b, UnitKind::Embedding, -1, count);
}

// ---- Layer-wise sharding ----

bool uses_unit(const Step& s) { return s.part != Part::Dispatch && s.part != Part::Combine; }

UnitKind unit_of(const Step& s) {
  switch (s.part) {
    case Part::Prolog: return UnitKind::Embedding;
    case Part::Epilog: return UnitKind::Head;
    case Part::Experts: return UnitKind::Experts;
    case Part::Weights: return s.unit;
    default: return UnitKind::Layer;
  }
}

// Units in full form are at most two: one in use and the next one, whose gather runs beside it.
struct Gatherer {
  const vector<Step>& in;
  bool forward_only;
  vector<Step> out = {};
  vector<Step> full = {};  // the Gather step of each

  static bool same_unit(const Step& gathered, const Step& use) {
    return uses_unit(use) && gathered.chunk == use.chunk && gathered.layer == use.layer &&
           gathered.unit == unit_of(use);
  }
  // The next step from `at` on that uses the unit.
  size_t next_use(const Step& gathered, size_t at) const {
    while (at < in.size() && !same_unit(gathered, in[at])) at++;
    return at;
  }
  bool is_full(const Step& use) const {
    return std::any_of(full.begin(), full.end(), [&](const Step& g) { return same_unit(g, use); });
  }
  void release(size_t index) {
    Step s = full[index];
    s.part = Part::Release;
    s.backward = false;
    out.push_back(s);
    full.erase(full.begin() + int64_t(index));
  }
  // Gathers what step `at` uses; where two units are full, the one needed later makes room.
  void gather(size_t at) {
    if (full.size() == 2) release(next_use(full[0], at) > next_use(full[1], at) ? 0 : 1);
    Step s = in[at];
    s.unit = unit_of(s);
    s.part = Part::Gather;
    s.count = 1;
    s.backward = false;
    for (size_t i = at; i < in.size(); i++)
      s.backward = s.backward || (adds_gradients(in[i]) && same_unit(s, in[i]));
    full.push_back(s);
    out.push_back(s);
  }
  // The head's gradient is formed with the loss, in the forward.
  bool adds_gradients(const Step& s) const {
    return s.part == Part::Weights || (s.part == Part::Epilog && !s.backward && !forward_only);
  }
  void reduce(const Step& use) {
    Step s = use;
    s.part = Part::Reduce;
    s.unit = unit_of(use);
    s.count = 1;
    out.push_back(s);
  }

  void run() {
    for (size_t at = 0; at < in.size(); at++) {
      if (uses_unit(in[at]) && !is_full(in[at])) gather(at);
      size_t next = at + 1;
      while (next < in.size() && (!uses_unit(in[next]) || is_full(in[next]))) next++;
      if (next < in.size() && full.size() < 2) gather(next);
      out.push_back(in[at]);
      if (adds_gradients(in[at])) reduce(in[at]);
      for (size_t i = full.size(); i-- > 0;)
        if (next_use(full[i], at + 1) == in.size()) release(i);
    }
  }
};

}  // namespace

vector<Step> steps_of(const Action& a, const vector<ChunkLayers>& chunks, bool forward_only,
                      bool gather_layer) {
  if (a.what != Do::F && a.what != Do::B && a.what != Do::W && a.what != Do::FB) return {};
  const bool fused = a.what == Do::FB;
  const Half f{false, a.chunk, a.mb, chunks[a.chunk], false};
  const int b_chunk = fused ? a.chunk2 : a.chunk;
  const Half b{true, b_chunk, fused ? a.mb2 : a.mb, chunks[b_chunk], a.what == Do::W || !a.defer};
  StepList s;
  switch (a.what) {
    case Do::F:
      s.forward_begin(f);
      forward_steps(s, f);
      break;
    case Do::B:
      s.backward_begin(b);
      backward_steps(s, b);
      break;
    case Do::FB: overlapped_steps(s, f, b); break;
    default: weight_steps(s, b, a.count);
  }
  if (forward_only && a.what != Do::F)
    failed("schedule", text("a forward-only list holds %s", to_text(a).c_str()));
  if (!gather_layer) return std::move(s.steps);
  Gatherer g{s.steps, forward_only};
  g.run();
  return std::move(g.out);
}

}  // namespace pith
