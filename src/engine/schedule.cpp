#include "engine/schedule.h"

#include <algorithm>

namespace pith {

const char* name_of(ScheduleKind kind) {
  return kind == ScheduleKind::DualPipeV ? "dualpipev" : "1f1b";
}

ScheduleKind schedule_kind(const string& name, int pp, int ep) {
  bool dual = name == "dualpipev" || (name == "auto" && (pp > 1 || ep > 1));
  return dual ? ScheduleKind::DualPipeV : ScheduleKind::OneF1B;
}

int stage_of(ScheduleKind kind, int pp, int rank, int chunk) {
  return chunk == 0 ? rank : stages_of(kind, pp) - 1 - rank;
}

int rank_of_stage(ScheduleKind kind, int pp, int stage) {
  return stage < pp ? stage : stages_of(kind, pp) - 1 - stage;
}

vector<int> layer_partition(int layers, int stages) {
  if (layers < stages)
    bad_input("layers",
        text("are fewer than the pipeline's stages (got %d layers and %d stages)", layers, stages),
        "a smaller parallel.pp, or parallel.schedule = \"1f1b\"");
  vector<int> count(stages, layers / stages);
  int interior = max(stages - 2, 0);
  for (int i = 0; i < layers % stages; i++) count[i < interior ? i + 1 : 0]++;
  return count;
}

vector<ChunkLayers> chunk_layers(ScheduleKind kind, int pp, int rank, int layers) {
  int stages = stages_of(kind, pp);
  vector<int> count = layer_partition(layers, stages);
  vector<ChunkLayers> chunks;
  for (int chunk = 0; chunk < chunks_of(kind); chunk++) {
    int stage = stage_of(kind, pp, rank, chunk);
    int first = 0;
    for (int s = 0; s < stage; s++) first += count[s];
    chunks.push_back({first, count[stage], stage == 0, stage == stages - 1});
  }
  return chunks;
}

int message_stage(const ScheduleOptions& o, int rank, const Action& transfer) {
  int step = transfer.payload == Payload::Activation ? -1 : 1;
  return stage_of(o.kind, o.pp, rank, transfer.chunk) + (transfer.what == Do::Recv ? step : 0);
}

int rank_beside(const ScheduleOptions& o, int rank, int chunk, int step) {
  int stage = stage_of(o.kind, o.pp, rank, chunk) + step;
  bool exists = stage >= 0 && stage < stages_of(o.kind, o.pp);
  return exists ? rank_of_stage(o.kind, o.pp, stage) : -1;
}

int min_micro_batches(const ScheduleOptions& o) {
  return o.kind == ScheduleKind::DualPipeV && !o.forward_only ? 2 * o.pp : 1;
}

int duration(const Action& a) {
  return a.has_forward() + a.has_backward() + a.has_weights() * a.count;
}

namespace {

struct Builder {
  const ScheduleOptions& o;
  int rank;
  ActionList list = {};
  ActionList due = {}, late = {};  // run behind the next messages; behind those after them
  ActionList deferred = {};
  int received[2] = {}, forwards[2] = {}, backwards[2] = {};
  bool zero_bubble = false;  // weight gradients wait for w()

  void message(Do what, Payload payload, int chunk, int mb) {
    Action a{.what = what, .chunk = chunk, .mb = mb, .payload = payload};
    bool onward = (what == Do::Send) == (payload == Payload::Activation);
    a.peer = rank_beside(o, rank, chunk, onward ? 1 : -1);
    if (a.peer >= 0 && a.peer != rank) list.push_back(a);
  }
  void recv_f(int chunk) { message(Do::Recv, Payload::Activation, chunk, received[chunk]++); }
  void recv_b(int chunk) { message(Do::Recv, Payload::Gradient, chunk, backwards[chunk]); }
  void send_f(int chunk) { message(Do::Send, Payload::Activation, chunk, forwards[chunk] - 1); }
  void send_b(int chunk) { message(Do::Send, Payload::Gradient, chunk, backwards[chunk] - 1); }

  // A chunk's last weight gradients are followed by its Reduce.
  void add(const Action& a) {
    list.push_back(a);
    if (o.gather_step && a.has_weights() && a.backward_mb() + a.count == o.micro_batches)
      due.push_back({.what = Do::Reduce, .chunk = a.backward_chunk()});
  }
  void compute(const Action& a) {
    for (const Action& w : std::exchange(due, std::exchange(late, {}))) add(w);
    if (a.count > 0) add(a);
  }

  Action take_deferred(int chunk, int most) {
    Action batch{.what = Do::W, .chunk = chunk, .count = 0};
    std::erase_if(deferred, [&](const Action& w) {
      if (w.chunk != chunk || batch.count == most) return false;
      if (batch.count++ == 0) batch.mb = w.mb;
      return true;
    });
    return batch;
  }
  bool defers() const { return zero_bubble || o.weight_grad_batch > 1; }
  // Batches fall due on all ranks at once, so that none waits for another's: in DualPipeV by slot,
  // even ones of one chunk and odd ones of the other.
  void end_backward(int chunk) {
    int mb = backwards[chunk]++, n = o.weight_grad_batch;
    if (!defers()) return;
    deferred.push_back({.what = Do::W, .chunk = chunk, .mb = mb});
    int slot = (2 * mb + 2 * o.pp - 1 - stage_of(o.kind, o.pp, rank, chunk)) % (2 * n);
    bool falls_due = o.kind == ScheduleKind::OneF1B ? mb % n == n - 1
                                                    : slot == 2 * n - 1 || slot == (n - 1) / 2 * 2;
    if (falls_due && !zero_bubble) due.push_back(take_deferred(chunk, n));
  }

  void forward(int chunk) {
    if (received[chunk] == forwards[chunk]) recv_f(chunk);
    compute({.what = Do::F, .chunk = chunk, .mb = forwards[chunk]++});
  }
  void f(int chunk) {
    forward(chunk);
    send_f(chunk);
  }
  void b(int chunk) {
    recv_b(chunk);
    compute({.what = Do::B, .chunk = chunk, .mb = backwards[chunk], .defer = defers()});
    end_backward(chunk);
    send_b(chunk);
  }
  void fb(int chunk) {
    int b_chunk = 1 - chunk;
    if (received[chunk] == forwards[chunk]) recv_f(chunk);
    recv_b(b_chunk);
    compute({Do::FB, chunk, forwards[chunk]++, b_chunk, backwards[b_chunk], 1, defers()});
    end_backward(b_chunk);
    send_f(chunk);
    send_b(b_chunk);
  }
  void w(int most = 1) { compute(take_deferred(deferred.empty() ? 0 : deferred[0].chunk, most)); }
};

void build_dualpipev(Builder& s) {
  int r = s.rank, below = s.o.pp - r - 1;
  for (int i = 0; i < 2 * below; i++) s.f(0);  // fill, down leg
  for (int i = 0; i <= r; i++) {               // fill, both legs
    s.forward(0);
    s.recv_f(0);
    s.forward(1);
    if (below > 0 || i < r) s.send_f(1);
    s.send_f(0);
  }
  for (int i = 0; i < below; i++) {  // weight gradients fill the bubble
    s.zero_bubble = true;
    s.b(1);
    s.zero_bubble = false;
    s.recv_f(1);
    s.w();
    s.f(1);
  }
  for (int i = 0; i < s.o.micro_batches - s.o.pp - below; i++) {  // the steady state
    if (i == 0 && below == 0) {  // unfused: the first backward starts sooner
      s.forward(0);
      s.send_f(1);
      s.b(1);
    } else {
      s.fb(0);
    }
    s.fb(1);
  }
  for (int i = 0; i < below; i++) {
    s.b(1);
    s.fb(1);
  }
  for (int i = 0; i <= r; i++) {  // drain; deferral begins half-way
    if (2 * i == r + 1) s.zero_bubble = true;
    s.b(1);
    if (2 * i == r) s.zero_bubble = true;
    s.b(0);
  }
  for (int i = 0; i < below; i++) {
    s.w();
    s.b(0);
  }
}

void build_1f1b(Builder& s) {
  int n = s.o.micro_batches, ahead = min(s.o.pp - s.rank - 1, n);
  for (int i = 0; i < ahead; i++) s.f(0);
  for (int i = ahead; i < n; i++) {
    s.f(0);
    s.b(0);
  }
  s.zero_bubble = s.defers();
  for (int i = 0; i < ahead; i++) {
    s.w();
    s.b(0);
  }
}

// One enters every `chunks` slots and moves on a stage a slot: no two meet on a rank.
void build_forward(Builder& s) {
  const auto& o = s.o;
  int chunks = chunks_of(o.kind), n = o.micro_batches;
  for (int slot = 0; slot < chunks * (n - 1) + stages_of(o.kind, o.pp); slot++)
    for (int chunk = 0; chunk < chunks; chunk++) {
      int age = slot - stage_of(o.kind, o.pp, s.rank, chunk);
      if (age >= 0 && age % chunks == 0 && age / chunks < n) s.f(chunk);
    }
}

}

ActionList make_schedule(const ScheduleOptions& o, int rank) {
  int least = min_micro_batches(o);
  if (o.micro_batches < least)
    bad_input("schedule",
        text("%s at pp = %d gets too few micro-batches (got %d, need at least %d)", name_of(o.kind),
            o.pp, o.micro_batches, least),
        "more micro-batches in a step, a smaller pp, or schedule = \"1f1b\"");
  Builder s{o, rank};
  // Gathers stand first, where ranks wait anyhow; rank 0 begins before its second.
  for (int chunk = 0; chunk < chunks_of(o.kind) && o.gather_step; chunk++)
    (chunk > rank ? s.late : s.list).push_back({.what = Do::Gather, .chunk = chunk});
  if (o.forward_only)
    build_forward(s);
  else if (o.kind == ScheduleKind::DualPipeV)
    build_dualpipev(s);
  else
    build_1f1b(s);
  while (!s.due.empty() || !s.deferred.empty()) s.w(o.weight_grad_batch);
  return std::move(s.list);
}

vector<ActionList> make_schedules(const ScheduleOptions& o) {
  vector<ActionList> lists;
  while (int(lists.size()) < o.pp) lists.push_back(make_schedule(o, int(lists.size())));
  return lists;
}

string to_text(const Action& a) {
  string f = text("F%d.%d", a.chunk, a.mb);
  string b = text("B%d.%d", a.backward_chunk(), a.backward_mb()) + (a.defer ? "+" : "");
  const string& payload = a.payload == Payload::Activation ? f : b;
  switch (a.what) {
    case Do::F: return f;
    case Do::B: return b;
    case Do::FB: return f + "|" + b;
    case Do::W:
      return text("W%d.%d", a.chunk, a.mb) + (a.count == 1 ? "" : text("-%d", a.mb + a.count - 1));
    case Do::Send: return "send " + payload + text(" > %d", a.peer);
    case Do::Recv: return "recv " + payload + text(" < %d", a.peer);
    case Do::Gather: return text("gather %d", a.chunk);
    case Do::Reduce: return text("reduce %d", a.chunk);
  }
  return "";
}

namespace {

Step with_part(Part part, Step s, bool backward) {
  s.part = part;
  s.backward = backward;
  return s;
}

// Cut where an overlapped one takes turns: behind what starts communication and the weight
// gradients that run beside it.
vector<vector<Step>> pieces_of(
    bool backward, int chunk, int mb, bool weights, const ChunkLayers& held) {
  vector<Step> all, beside;
  auto add = [&](Part part, int layer, UnitKind unit = UnitKind::Layer) {
    all.push_back({part, backward, chunk, mb, layer, unit});
  };
  if (held.prolog) add(Part::Prolog, -1, UnitKind::Embedding);
  for (int layer = held.first; layer < held.first + held.count; layer++) {
    add(Part::Attention, layer);
    add(Part::Dispatch, layer);
    add(Part::Experts, layer, UnitKind::Experts);
    add(Part::Combine, layer);
    add(Part::Residual, layer);
  }
  if (held.epilog) add(Part::Epilog, -1, UnitKind::Head);
  if (backward) std::ranges::reverse(all);
  vector<vector<Step>> pieces(1);
  for (const Step& s : all) {
    bool starts = s.starts_communication();
    pieces.back().push_back(s);
    if (weights && !starts && s.part != Part::Residual)
      beside.push_back(with_part(Part::Weights, s, true));
    if (!starts && &s != &all.back()) continue;
    pieces.back().insert(pieces.back().end(), beside.begin(), beside.end());
    beside.clear();
    if (starts) pieces.emplace_back();
  }
  return pieces;
}

// Full are the unit in use and the next.
vector<Step> with_sharding(const vector<Step>& in, bool forward_only) {
  vector<Step> out, full;
  auto same_unit = [](const Step& a, const Step& b) {
    return a.chunk == b.chunk && a.layer == b.layer && a.unit == b.unit;
  };
  auto add_each = [&](Part part, const vector<Step>& units, const vector<Step>& but) {
    for (const Step& unit : units)
      if (std::ranges::none_of(but, [&](const Step& s) { return same_unit(s, unit); }))
        out.push_back(with_part(part, unit, false));
  };
  auto hold = [&](const vector<Step>& units) {
    add_each(Part::Release, full, units);
    add_each(Part::Gather, units, full);
    full = units;
  };
  for (auto s = in.begin(); s < in.end(); s++) {
    auto uses_another = [&](const Step& later) {
      return !later.starts_communication() && !same_unit(later, *s);
    };
    if (!s->starts_communication()) {
      vector<Step> units = {*s};
      auto next = std::find_if(s, in.end(), uses_another);
      if (next < in.end()) units.push_back(*next);
      hold(units);
    }
    out.push_back(*s);
    // The head's gradient is formed with the loss, in the forward.
    if (s->part != Part::Weights && (s->part != Part::Epilog || s->backward || forward_only))
      continue;
    auto gather = std::find_if(out.rbegin(), out.rend(),
        [&](const Step& before) { return before.part == Part::Gather && same_unit(before, *s); });
    gather->backward = true;
    out.push_back(with_part(Part::Reduce, *s, s->backward));
  }
  hold({});
  return out;
}

}

vector<Step> steps_of(
    const Action& a, const vector<ChunkLayers>& chunks, bool forward_only, bool gather_layer) {
  bool gathers = a.what == Do::Gather, reduces = a.what == Do::Reduce;
  bool units = a.what == Do::W || gathers || reduces;
  int chunk = a.backward_chunk();
  vector<vector<Step>> f, b;
  if (a.has_forward()) f = pieces_of(false, a.chunk, a.mb, false, chunks[a.chunk]);
  if (a.has_backward() || units)
    b = pieces_of(true, chunk, a.backward_mb(), !a.defer, chunks[chunk]);
  vector<Step> steps;
  for (size_t i = 0; i < max(f.size(), b.size()); i++)
    for (const auto* half : {&b, &f})
      if (i < half->size()) steps.insert(steps.end(), (*half)[i].begin(), (*half)[i].end());
  if (units) std::erase_if(steps, [](const Step& s) { return s.part != Part::Weights; });
  for (Step& s : steps) {
    s.count = a.count;
    if (gathers) s = with_part(Part::Gather, s, !forward_only);
    if (reduces) s.part = Part::Reduce;
  }
  if (gathers) std::ranges::reverse(steps);
  return gather_layer ? with_sharding(steps, forward_only) : steps;
}

const char* name_of(Part part) {
  constexpr const char* kNames[] = {
      "prolog",
      "attention",
      "dispatch",
      "experts",
      "combine",
      "residual",
      "epilog",
      "weights",
      "gather",
      "release",
      "reduce",
  };
  return kNames[int(part)];
}

string name_of(const Step& step) {
  constexpr Part kUnits[] = {Part::Prolog, Part::Attention, Part::Experts, Part::Epilog};
  if (step.part == Part::Weights) return name_of(kUnits[int(step.unit)]) + string(" weights");
  return name_of(step.part) + string(step.backward ? " backward" : " forward");
}

}
