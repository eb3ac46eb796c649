// Proofs of lists: first each rank's own order, then all ranks together, as they would run when
// every group call and every collective blocks until all of it is there.
#include <algorithm>
#include <array>
#include <map>

#include "engine/schedule.h"

namespace pith {

namespace {

struct Fault {
  int rank, action;
  string why;
};

// "rank 2, action 17 (F0.8)"
string where(int rank, const ActionList& list, int action) {
  if (action == int(list.size())) return text("rank %d, at the end", rank);
  return text("rank %d, action %d (%s)", rank, action, to_text(list[action]).c_str());
}

// ---- One rank's list ----

// What has run of a chunk and micro-batch; Gather and Reduce stand with micro-batch 0.
enum Fact : uint8_t { kRecvF, kF, kSendF, kRecvB, kB, kDeferred, kW, kSendB, kGather, kReduce };
constexpr const char* kFacts[] = {"recv F%d.%d", "F%d.%d",   "send F%d.%d", "recv B%d.%d",
                                  "B%d.%d",      "B%d.%d+",  "W%d.%d",      "send B%d.%d",
                                  "gather %d",   "reduce %d"};

// Walks a list; throws the reason at the first action that is wrong.
struct ListWalk {
  const ScheduleOptions& o;
  int rank;                                                           // of the pipeline
  vector<uint16_t> facts = vector<uint16_t>(2 * o.micro_batches, 0);  // bits
  int live = 0, peak_live = 0, deferred = 0, peak_deferred = 0;

  bool has(int chunk, int mb, Fact f) const { return facts[chunk * o.micro_batches + mb] >> f & 1; }
  void need(int chunk, int mb, Fact f, bool run = true) const {
    if (has(chunk, mb, f) != run)
      throw text(kFacts[f], chunk, mb) + (run ? " has not run" : " has run already");
  }
  void record(int chunk, int mb, Fact f) {
    need(chunk, mb, f, false);
    facts[chunk * o.micro_batches + mb] |= 1 << f;
  }
  void need_range(int chunk, int first, int count = 1) const {
    if (chunk < 0 || chunk >= chunks_of(o.kind) || first < 0 || count < 1 ||
        first + count > o.micro_batches)
      throw string("names no chunk and micro-batch of this rank");
  }
  // The rank where (chunk, mb) comes from or goes to; -1: there is none, or it is this one.
  int peer(int chunk, int step) const {
    const int other = rank_beside(o, rank, chunk, step);
    return other == rank ? -1 : other;
  }
  // What (chunk, mb) computes on: received, or made here by the stage at `step`.
  void need_input(int chunk, int mb, int step) const {
    if (peer(chunk, step) >= 0) need(chunk, mb, step < 0 ? kRecvF : kRecvB);
    if (rank_beside(o, rank, chunk, step) == rank) need(1 - chunk, mb, step < 0 ? kF : kB);
  }

  void forward(int chunk, int mb) {
    need_range(chunk, mb);
    if (o.gather_step) need(chunk, 0, kGather);
    need_input(chunk, mb, -1);
    record(chunk, mb, kF);
    peak_live = std::max(peak_live, ++live);
    if (o.forward_only) {  // an output stays until it is sent or has become an input
      live -= rank_beside(o, rank, chunk, 1) < 0;
      live -= rank_beside(o, rank, chunk, -1) == rank;
    }
  }
  void backward(int chunk, int mb, bool defer) {
    need_range(chunk, mb);
    need(chunk, mb, kF);
    need(chunk, 0, kReduce, false);
    need_input(chunk, mb, 1);
    record(chunk, mb, kB);
    record(chunk, mb, defer ? kDeferred : kW);
    live--;
    deferred += defer;
    peak_deferred = std::max(peak_deferred, deferred);
  }
  void bound_live() const {
    const int limit = o.kind == ScheduleKind::DualPipeV ? 2 * o.pp + 1 : o.pp - rank;
    if (peak_live <= limit || o.forward_only) return;
    const auto oldest =
        std::ranges::find_if(facts, [](uint16_t f) { return (f >> kF & 1) && !(f >> kB & 1); });
    const int i = int(oldest - facts.begin());
    throw text(
        "activations of too many micro-batches are held (got %d, need at most %d); "
        "B%d.%d has not run",
        peak_live, limit, i / o.micro_batches, i % o.micro_batches);
  }
  void weight_grads(const Action& a) {
    need_range(a.chunk, a.mb, a.count);
    need(a.chunk, 0, kReduce, false);
    for (int mb = a.mb; mb < a.mb + a.count; mb++) {
      need(a.chunk, mb, kDeferred);
      if (peer(a.chunk, -1) >= 0) need(a.chunk, mb, kSendB);  // W frees what is sent
      record(a.chunk, mb, kW);
    }
    deferred -= a.count;
  }
  void message(const Action& a) {
    const bool send = a.what == Do::Send, activation = a.payload == Payload::Activation;
    need_range(a.chunk, a.mb);
    const int other = peer(a.chunk, send == activation ? 1 : -1);
    if (a.peer != other || other < 0)
      throw text("goes to the wrong rank (got %d, need %s)", a.peer,
                 other < 0 ? "none" : std::to_string(other).c_str());
    if (send || !activation) need(a.chunk, a.mb, send && !activation ? kB : kF);
    record(a.chunk, a.mb, activation ? (send ? kSendF : kRecvF) : (send ? kSendB : kRecvB));
    live -= o.forward_only && send;
  }
  void collective(const Action& a) {
    need_range(a.chunk, 0);
    if (!o.gather_step) throw string("weights are not gathered for the whole step");
    for (int mb = 0; mb < o.micro_batches && a.what == Do::Reduce; mb++) {
      need(a.chunk, mb, kB);
      need(a.chunk, mb, kW);
    }
    record(a.chunk, 0, a.what == Do::Gather ? kGather : kReduce);
  }
  void step(const Action& a) {
    if (o.forward_only && (a.has_backward() || a.what == Do::W || a.what == Do::Reduce ||
                           a.payload == Payload::Gradient))
      throw string("a forward-only list has no backward");
    if (a.is_message()) message(a);
    if (a.is_collective()) collective(a);
    if (a.what == Do::W) weight_grads(a);
    if (a.has_forward()) forward(a.chunk, a.mb);
    if (a.has_backward()) backward(a.backward_chunk(), a.backward_mb(), a.defer);
    bound_live();
  }
  // What a complete list has done.
  void end() const {
    for (int chunk = 0; chunk < chunks_of(o.kind); chunk++) {
      for (int mb = 0; mb < o.micro_batches; mb++) {
        need(chunk, mb, kF);
        if (peer(chunk, 1) >= 0) need(chunk, mb, kSendF);
        if (o.forward_only) continue;
        need(chunk, mb, kB);
        need(chunk, mb, kW);
        if (peer(chunk, -1) >= 0) need(chunk, mb, kSendB);
      }
      if (o.gather_step) need(chunk, 0, kGather);
      if (o.gather_step && !o.forward_only) need(chunk, 0, kReduce);
    }
  }
};

void walk_list(const ScheduleOptions& o, const Mesh& mesh, int rank, const ActionList& list,
               ScheduleCheck& result) {
  ListWalk walk{o, coord_of(mesh, rank).pp_rank};
  int i = 0;
  try {
    for (; i < int(list.size()); i++) walk.step(list[i]);
    walk.end();
  } catch (const string& why) {
    throw Fault{rank, i, why};
  }
  result.peak_live = std::max(result.peak_live, walk.peak_live);
  result.peak_deferred = std::max(result.peak_deferred, walk.peak_deferred);
}

// ---- All ranks together ----

// A rank in a collective, or at one end of a message. The n-th visits of all members of a place
// are one meeting, which ends when all are there.
struct Place;
struct Visit {
  Place* place;
  int seat;  // the rank's index among the members
  int rank, action;
  Step what;        // in which all members must agree; of a message: direction, stage, micro-batch
  size_t turn = 0;  // visits before this one
  double time = 0;
};
struct Place {
  vector<int> members;                       // ranks; sender and receiver
  vector<vector<const Visit*>> visits = {};  // by seat
};

// What a rank does next: computes for a while, then stands in a collective or in the messages of
// one group call, which begins with `action`.
struct Event {
  int action = 0;
  double duration = 0;
  vector<Visit> visits = {};
};

string collective_text(const Step& s) {
  constexpr const char* parts[] = {"prolog",  "attention", "dispatch", "experts",
                                   "combine", "residual",  "epilog",   "weights",
                                   "gather",  "release",   "reduce"};
  constexpr const char* units[] = {"embedding", "layer", "experts", "head"};
  const bool sharding = s.part == Part::Gather || s.part == Part::Reduce;
  return text("%s%s of chunk %d, layer %d, ", parts[int(s.part)], s.backward ? " (backward)" : "",
              s.chunk, s.layer) +
         (sharding ? units[int(s.unit)] : text("micro-batch %d", s.mb));
}

struct Replay {
  struct RankState {
    vector<Event> events = {};
    size_t next = 0;
    bool inside = false;  // of the next event
    double time = 0;
    bool ended() const { return next == events.size(); }
    const Event& event() const { return events[next]; }
  };

  const ScheduleOptions& o;
  const Mesh& mesh;
  const vector<ActionList>& lists;  // by global rank
  ScheduleCheck& result;
  vector<RankState> ranks = vector<RankState>(lists.size());
  std::map<std::array<int, 3>, Place> places = {};  // by group, first member, receiver

  // ---- What a rank does ----

  Visit message(int rank, int action) {
    const Action& a = lists[rank][action];
    const bool send = a.what == Do::Send;
    MeshCoord coord = coord_of(mesh, rank);
    const int stage = message_stage(o, coord.pp_rank, a);
    coord.pp_rank = a.peer;
    const int peer = rank_of(mesh, coord), from = send ? rank : peer, to = send ? peer : rank;
    Place& place = places[{int(Group::Pp), from, to}];
    place.members = {from, to};
    const Step what{.backward = a.payload == Payload::Gradient, .mb = a.mb, .layer = stage};
    return {&place, send ? 0 : 1, rank, action, what};
  }
  void add_collective(int rank, int action, Step s) {
    const bool experts = s.unit == UnitKind::Experts;
    Group group = experts ? Group::ExpertShard : Group::DenseShard;
    if (s.part == Part::Dispatch || s.part == Part::Combine)
      group = Group::Ep;
    else if (s.part == Part::Attention)
      group = Group::Cp;
    else if (s.part == Part::Gather || s.part == Part::Reduce)
      s.mb = s.backward = 0;  // a unit's, whatever micro-batch it is for
    else
      return;
    const vector<int> members = group_members(mesh, group, rank);
    if (members.size() == 1) return;
    Place& place = places[{int(group), members[0], 0}];
    place.members = members;
    const auto seat = std::ranges::find(members, rank) - members.begin();
    ranks[rank].events.push_back(
        {.action = action, .visits = {{&place, int(seat), rank, action, s}}});
  }
  // Gather and Reduce actions: all units of the chunk, in order or in reverse.
  void add_units(int rank, int action, const ChunkLayers& c) {
    const Action& a = lists[rank][action];
    vector<Step> units;
    const auto add = [&](UnitKind unit, int layer) {
      const Part part = a.what == Do::Gather ? Part::Gather : Part::Reduce;
      units.push_back({.part = part, .chunk = a.chunk, .layer = layer, .unit = unit});
    };
    if (c.prolog) add(UnitKind::Embedding, -1);
    for (int layer = c.first; layer < c.first + c.count; layer++) {
      add(UnitKind::Layer, layer);
      add(UnitKind::Experts, layer);
    }
    if (c.epilog) add(UnitKind::Head, -1);
    if (a.what == Do::Reduce) std::ranges::reverse(units);
    for (const Step& s : units) add_collective(rank, action, s);
  }
  // Messages and times alone; with `layers` > 0, collectives too.
  void add_events(int rank, int layers, bool gather_layer) {
    const ActionList& list = lists[rank];
    vector<ChunkLayers> chunks;
    if (layers) chunks = chunk_layers(o.kind, o.pp, coord_of(mesh, rank).pp_rank, layers);
    for (int i = 0; i < int(list.size()); i++) {
      const Action& a = list[i];
      vector<Event>& events = ranks[rank].events;
      if (!a.is_message() || i == 0 || !list[i - 1].is_message()) {
        const int backward = a.has_backward() ? (a.defer ? 1 : 2) : 0;
        const int weights = a.what == Do::W ? a.count : 0;
        events.push_back({i, double(a.has_forward() + backward + weights)});
      }
      if (a.is_message()) events.back().visits.push_back(message(rank, i));
      if (!layers) continue;
      if (a.is_collective()) add_units(rank, i, chunks[a.chunk]);
      for (const Step& s : steps_of(a, chunks, o.forward_only, gather_layer))
        add_collective(rank, i, s);
    }
  }

  // ---- All of them ----

  void come(Visit& v, double time) {
    auto& visits = v.place->visits;
    visits.resize(v.place->members.size());
    v.turn = visits[v.seat].size();
    v.time = time;
    visits[v.seat].push_back(&v);
    for (const auto& others : visits) {
      if (others.size() <= v.turn || others[v.turn]->what == v.what) continue;
      const Visit& other = *others[v.turn];
      string why = "does not match " + where(other.rank, lists[other.rank], other.action);
      if (!lists[v.rank][v.action].is_message())
        why += ": " + collective_text(v.what) + " against " + collective_text(other.what);
      throw Fault{v.rank, v.action, why};
    }
  }
  // Who has not come to what the rank stands in; -1: nobody.
  int missing(int rank) const {
    for (const Visit& v : ranks[rank].event().visits)
      for (size_t seat = 0; seat < v.place->members.size(); seat++)
        if (v.place->visits[seat].size() <= v.turn) return v.place->members[seat];
    return -1;
  }
  // Begins the rank's next event, and ends it unless someone is missing. Whether it ended.
  bool advance(int rank) {
    RankState& r = ranks[rank];
    vector<ActionTime>& times = result.times[rank];
    if (r.ended()) return false;
    Event& e = r.events[r.next];
    if (!r.inside) {
      if (times[e.action].begin < 0) times[e.action].begin = r.time;
      r.time += e.duration;
      result.busy += e.duration;
      for (Visit& v : e.visits) come(v, r.time);
      r.inside = true;
    }
    if (missing(rank) >= 0) return false;
    for (const Visit& v : e.visits)
      for (const auto& others : v.place->visits) r.time = std::max(r.time, others[v.turn]->time);
    times[e.action].end = r.time;
    for (const Visit& v : e.visits)
      if (v.action != e.action) times[v.action] = times[e.action];
    r.inside = false;
    r.next++;
    return true;
  }
  [[noreturn]] void deadlock(int rank) const {
    for (size_t i = 0; i < ranks.size(); i++)  // into the circle, or to who waits in vain
      if (!ranks[missing(rank)].ended()) rank = missing(rank);
    string chain = "deadlock: waits";
    int at = rank;
    do {
      at = missing(at);
      chain += text(" for rank %d, which ", at);
      chain += ranks[at].ended() ? "has ended"
                                 : "waits in " + where(at, lists[at], ranks[at].event().action);
    } while (at != rank && !ranks[at].ended());
    throw Fault{rank, ranks[rank].event().action, chain};
  }
  void run() {
    for (const ActionList& list : lists) result.times.emplace_back(list.size(), ActionTime{-1, -1});
    const int count = int(ranks.size());
    for (bool moved = true; moved;) {
      moved = false;
      for (int r = 0; r < count; r++)
        while (advance(r)) moved = true;
    }
    for (int r = 0; r < count; r++) {
      if (!ranks[r].ended()) deadlock(r);
      result.makespan = std::max(result.makespan, ranks[r].time);
    }
  }
};

}  // namespace

ScheduleCheck check_collectives(const ScheduleOptions& o, const Mesh& mesh, int layers,
                                bool gather_layer, const vector<ActionList>& lists) {
  ScheduleCheck result;
  result.ranks = int(lists.size());
  if (result.ranks != mesh.world()) {
    result.rank = result.action = 0;
    result.why = text("lists of %d ranks (need %d)", result.ranks, mesh.world());
    return result;
  }
  try {
    for (int r = 0; r < result.ranks; r++) walk_list(o, mesh, r, lists[r], result);
    Replay replay{o, mesh, lists, result};
    for (int r = 0; r < result.ranks; r++) replay.add_events(r, layers, gather_layer);
    replay.run();
  } catch (const Fault& fault) {
    result.rank = fault.rank;
    result.action = fault.action;
    result.why = where(fault.rank, lists[fault.rank], fault.action) + ": " + fault.why;
  }
  return result;
}

ScheduleCheck check_schedule(const ScheduleOptions& o, const vector<ActionList>& lists) {
  return check_collectives(o, Mesh{.pp = o.pp}, 0, false, lists);
}

}  // namespace pith
