#include <algorithm>

#include "engine/schedule.h"

namespace pith {

namespace {

// The steps of one micro-batch's forward or backward, cut where an overlapped one takes turns:
// behind what starts communication.
struct Half {
  bool backward = false;
  int chunk = 0, mb = 0;
  bool weights = false;  // followed by its weight gradients
  ChunkLayers layers = {};
  vector<vector<Step>> pieces = {};

  // The i-th layer that it comes to.
  int layer(int i) const { return layers.first + (backward ? layers.count - 1 - i : i); }
  void add(Part part, int at_layer, UnitKind unit = UnitKind::Layer) {
    pieces.back().push_back({part, backward, chunk, mb, at_layer, unit});
  }
  void add_weights(UnitKind unit, int at_layer) {
    if (weights) add(Part::Weights, at_layer, unit);
  }
  void reach(int i) {
    if (i == layers.count) return;
    add(backward ? Part::Residual : Part::Attention, layer(i));
    add(backward ? Part::Combine : Part::Dispatch, layer(i));
  }
  // Weight gradients stand behind communication that has just started.
  void make(const ChunkLayers& c) {
    layers = c;
    const bool enters = backward ? layers.epilog : layers.prolog;
    const bool leaves = backward ? layers.prolog : layers.epilog;
    pieces.emplace_back();
    if (enters) add(backward ? Part::Epilog : Part::Prolog, -1);
    reach(0);
    if (enters) add_weights(UnitKind::Head, -1);
    for (int i = 0; i < layers.count; i++) {
      const int here = layer(i);
      pieces.emplace_back();
      add(Part::Experts, here);
      add(backward ? Part::Dispatch : Part::Combine, here);
      add_weights(UnitKind::Experts, here);
      pieces.emplace_back();
      add(backward ? Part::Attention : Part::Residual, here);
      reach(i + 1);
      add_weights(UnitKind::Layer, here);
    }
    pieces.emplace_back();
    if (leaves) add(backward ? Part::Prolog : Part::Epilog, -1);
    if (leaves) add_weights(UnitKind::Embedding, -1);
  }
};

// Each dispatch and combine runs beside compute of the other micro-batch. What one half has more of
// follows alone.
vector<Step> overlapped(const Half& f, const Half& b) {
  vector<Step> steps;
  const size_t turns = 1 + 2 * min(f.layers.count, b.layers.count);
  const auto take = [&](const Half& h, size_t i) {
    if (i < h.pieces.size()) steps.insert(steps.end(), h.pieces[i].begin(), h.pieces[i].end());
  };
  for (size_t i = 0; i < turns; i++) {
    take(b, i);
    take(f, i);
  }
  for (size_t i = turns; i < b.pieces.size(); i++) take(b, i);
  for (size_t i = turns; i < f.pieces.size(); i++) take(f, i);
  return steps;
}

bool uses_unit(const Step& s) { return s.part != Part::Dispatch && s.part != Part::Combine; }

UnitKind unit_of(const Step& s) {
  switch (s.part) {
    case Part::Prolog: return UnitKind::Embedding;
    case Part::Epilog: return UnitKind::Head;
    case Part::Experts: return UnitKind::Experts;
    default: return s.unit;
  }
}
bool same_unit(const Step& gathered, const Step& use) {
  return uses_unit(use) && gathered.chunk == use.chunk && gathered.layer == use.layer &&
         gathered.unit == unit_of(use);
}

// Adds the steps of layer-wise sharding. At most two units are full: one in use and the next one,
// whose gather runs beside it.
struct Gatherer {
  const vector<Step>& in;
  bool forward_only;
  vector<Step> out = {};
  vector<Step> full = {};  // the Gather step of each

  // The next step from `at` on that uses the unit.
  size_t next_use(const Step& gathered, size_t at) const {
    while (at < in.size() && !same_unit(gathered, in[at])) at++;
    return at;
  }
  bool needs_gather(const Step& use) const {
    const auto has = [&](const Step& g) { return same_unit(g, use); };
    return uses_unit(use) && std::none_of(full.begin(), full.end(), has);
  }
  // The head's gradient is formed with the loss, in the forward.
  bool adds_gradients(const Step& s) const {
    return s.part == Part::Weights || (s.part == Part::Epilog && !s.backward && !forward_only);
  }
  void add(Part part, Step s, bool backward) {
    s.unit = unit_of(s);
    s.part = part;
    s.backward = backward;
    s.count = 1;
    out.push_back(s);
  }
  void release(size_t index) {
    add(Part::Release, full[index], false);
    full.erase(full.begin() + i64(index));
  }
  // Gathers what step `at` uses; where two units are full, the one needed later makes room.
  void gather(size_t at) {
    if (full.size() == 2) release(next_use(full[0], at) > next_use(full[1], at) ? 0 : 1);
    add(Part::Gather, in[at], false);
    Step& g = out.back();
    for (size_t i = at; i < in.size(); i = next_use(g, i + 1))
      g.backward = g.backward || adds_gradients(in[i]);
    full.push_back(g);
  }
  void run() {
    for (size_t at = 0; at < in.size(); at++) {
      if (needs_gather(in[at])) gather(at);
      size_t next = at + 1;
      while (next < in.size() && !needs_gather(in[next])) next++;
      if (next < in.size() && full.size() < 2) gather(next);
      out.push_back(in[at]);
      if (adds_gradients(in[at])) add(Part::Reduce, in[at], in[at].backward);
      for (size_t i = full.size(); i-- > 0;)
        if (next_use(full[i], at + 1) == in.size()) release(i);
    }
  }
};

}

vector<Step> steps_of(const Action& a, const vector<ChunkLayers>& chunks, bool forward_only,
                      bool gather_layer) {
  if (forward_only && (a.what == Do::W || a.has_backward()))
    failed("schedule", text("a forward-only list holds %s", to_text(a).c_str()));
  const bool units = a.what == Do::W || a.is_collective();  // a step a unit
  Half f{false, a.chunk, a.mb}, b{true, a.backward_chunk(), a.backward_mb(), !a.defer};
  if (a.has_forward()) f.make(chunks[f.chunk]);
  if (units || a.has_backward()) b.make(chunks[b.chunk]);
  vector<Step> steps = overlapped(f, b);
  if (units) std::erase_if(steps, [](const Step& s) { return s.part != Part::Weights; });
  for (Step& s : steps) {
    s.count = a.count;
    if (a.what == Do::Gather) s.backward = !forward_only;
    if (a.is_collective()) s.part = a.what == Do::Gather ? Part::Gather : Part::Reduce;
  }
  if (a.what == Do::Gather) std::ranges::reverse(steps);
  if (!gather_layer) return steps;
  Gatherer g{steps, forward_only};
  g.run();
  return std::move(g.out);
}

}
