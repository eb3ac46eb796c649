// Proofs of lists: first each rank's own order, then all ranks together, as they would run when
// every group call and every collective blocks until all of it is there. A fault is thrown.
#include <algorithm>
#include <array>
#include <map>

#include "engine/schedule.h"

namespace pith {

namespace {

// "rank 2, action 17 (F0.8)"
string where(const vector<ActionList>& lists, int rank, int action) {
  if (action == int(lists[rank].size())) return text("rank %d, at the end", rank);
  return text("rank %d, action %d (%s)", rank, action, to_text(lists[rank][action]).c_str());
}

// What has run of a chunk and micro-batch; Gather and Reduce stand with micro-batch 0.
enum Fact : uint8_t { kRecvF, kF, kSendF, kRecvB, kB, kDeferred, kW, kSendB, kGather, kReduce };
constexpr const char* kFacts[] = {"recv F%d.%d", "F%d.%d",   "send F%d.%d", "recv B%d.%d",
                                  "B%d.%d",      "B%d.%d+",  "W%d.%d",      "send B%d.%d",
                                  "gather %d",   "reduce %d"};

// Walks one rank's list; throws the reason at the first action that is wrong.
struct ListWalk {
  const ScheduleOptions& o;
  int rank;                                                           // of the pipeline
  vector<uint16_t> facts = vector<uint16_t>(2 * o.micro_batches, 0);  // bits
  int live = 0, peak_live = 0, deferred = 0, peak_deferred = 0;

  bool has(Fact f, int i) const { return facts[i] >> f & 1; }
  void need(Fact f, int chunk, int mb, bool run = true) const {
    if (has(f, chunk * o.micro_batches + mb) != run)
      throw text(kFacts[f], chunk, mb) + (run ? " has not run" : " has run already");
  }
  void record(Fact f, int chunk, int mb) {
    need(f, chunk, mb, false);
    facts[chunk * o.micro_batches + mb] |= 1 << f;
  }
  void need_range(int chunk, int first, int count) const {
    if (chunk < 0 || chunk >= chunks_of(o.kind) || first < 0 || count < 1 ||
        first + count > o.micro_batches)
      throw string("names no chunk and micro-batch of this rank");
  }
  // The other rank that a chunk's input comes from or its output goes to; -1: there is none.
  int peer(int chunk, int step) const {
    const int other = rank_beside(o, rank, chunk, step);
    return other == rank ? -1 : other;
  }
  // What (chunk, mb) computes on: received, or made here by the stage at `step`.
  void need_input(int chunk, int mb, int step) const {
    if (peer(chunk, step) >= 0) need(step < 0 ? kRecvF : kRecvB, chunk, mb);
    if (rank_beside(o, rank, chunk, step) == rank) need(step < 0 ? kF : kB, 1 - chunk, mb);
  }

  void forward(int chunk, int mb) {
    if (o.gather_step) need(kGather, chunk, 0);
    need_input(chunk, mb, -1);
    record(kF, chunk, mb);
    if (!o.forward_only) peak_live = std::max(peak_live, ++live);
  }
  void backward(int chunk, int mb, bool defer) {
    need(kF, chunk, mb);
    need_input(chunk, mb, 1);
    record(kB, chunk, mb);
    record(defer ? kDeferred : kW, chunk, mb);
    live--;
    deferred += defer;
    peak_deferred = std::max(peak_deferred, deferred);
  }
  void weight_grads(const Action& a) {
    for (int mb = a.mb; mb < a.mb + a.count; mb++) {
      need(kDeferred, a.chunk, mb);
      if (peer(a.chunk, -1) >= 0) need(kSendB, a.chunk, mb);  // W frees what is sent
      record(kW, a.chunk, mb);
    }
    deferred -= a.count;
  }
  void message(const Action& a) {
    const bool send = a.what == Do::Send, activation = a.payload == Payload::Activation;
    const int other = peer(a.chunk, send == activation ? 1 : -1);
    if (a.peer != other || other < 0)
      throw text("goes to the wrong rank (got %d, need %s)", a.peer,
                 other < 0 ? "none" : std::to_string(other).c_str());
    if (send) need(activation ? kF : kB, a.chunk, a.mb);
    record(activation ? (send ? kSendF : kRecvF) : (send ? kSendB : kRecvB), a.chunk, a.mb);
  }
  void collective(const Action& a) {
    if (!o.gather_step) throw string("weights are not gathered for the whole step");
    for (int mb = 0; mb < o.micro_batches && a.what == Do::Reduce; mb++) {
      need(kB, a.chunk, mb);
      need(kW, a.chunk, mb);
    }
    record(a.what == Do::Gather ? kGather : kReduce, a.chunk, 0);
  }
  void bound_live() const {
    const int limit = o.kind == ScheduleKind::DualPipeV ? 2 * o.pp + 1 : o.pp - rank;
    if (peak_live <= limit) return;
    int i = 0;
    while (has(kF, i) == has(kB, i)) i++;
    throw text(
        "activations of too many micro-batches are held (got %d, need at most %d); "
        "B%d.%d has not run",
        peak_live, limit, i / o.micro_batches, i % o.micro_batches);
  }
  void run(const Action& a) {
    if (o.forward_only && (a.has_backward() || a.what == Do::W || a.what == Do::Reduce ||
                           a.payload == Payload::Gradient))
      throw string("a forward-only list has no backward");
    need_range(a.chunk, a.mb, a.count);
    need_range(a.backward_chunk(), a.backward_mb(), 1);
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
        need(kF, chunk, mb);
        if (peer(chunk, 1) >= 0) need(kSendF, chunk, mb);
        if (o.forward_only) continue;
        need(kB, chunk, mb);
        need(kW, chunk, mb);
        if (peer(chunk, -1) >= 0) need(kSendB, chunk, mb);
      }
      if (o.gather_step) need(kGather, chunk, 0);
      if (o.gather_step && !o.forward_only) need(kReduce, chunk, 0);
    }
  }
};

// A collective's group, or the two ranks of a message: the n-th visits of all members meet.
struct Arrival {
  int action;
  string what;  // in which all members must agree
  int time;
};
using Place = std::map<int, vector<Arrival>>;  // by member

// What a rank does next: stands in a collective, or in the messages of one group call, which begins
// with `action`; without visits it computes.
struct Visit {
  Place* place;
  int action;
  string what;
};
struct Event {
  int action;
  vector<Visit> visits = {};
};

constexpr struct {
  Part part;
  Group group;
  const char* name;
} kCollectives[] = {{Part::Attention, Group::Cp, "attention"},
                    {Part::Dispatch, Group::Ep, "dispatch"},
                    {Part::Combine, Group::Ep, "combine"},
                    {Part::Gather, Group::DenseShard, "gather"},
                    {Part::Reduce, Group::DenseShard, "reduce"}};
constexpr const char* kUnits[] = {"embedding", "layer", "experts", "head"};

struct Replay {
  struct RankState {
    vector<Event> events = {};
    size_t next = 0;
    bool inside = false;  // of the next event
    int time = 0;
    bool ended() const { return next == events.size(); }
  };

  const ScheduleOptions& o;
  const Mesh& mesh;
  const vector<ActionList>& lists;  // by global rank
  ScheduleCheck& result;
  vector<RankState> ranks = vector<RankState>(lists.size());
  std::map<std::array<int, 3>, Place> places = {};  // by group, first and last member

  void add_visit(int rank, int action, Group group, const vector<int>& members, string what) {
    Place& place = places[{int(group), members.front(), members.back()}];
    for (const int member : members) place[member];
    ranks[rank].events.back().visits.push_back({&place, action, std::move(what)});
  }
  void add_message(int rank, int action) {
    const Action& a = lists[rank][action];
    MeshCoord coord = coord_of(mesh, rank);
    const int stage = message_stage(o, coord.pp_rank, a);
    coord.pp_rank = a.peer;
    const int peer = rank_of(mesh, coord);
    const bool send = a.what == Do::Send;
    add_visit(rank, action, Group::Pp, {send ? rank : peer, send ? peer : rank},
              text("%s of stage %d, micro-batch %d",
                   a.payload == Payload::Activation ? "activation" : "gradient", stage, a.mb));
  }
  void add_collective(int rank, int action, const Step& s) {
    for (const auto& c : kCollectives) {
      if (c.part != s.part) continue;
      const bool sharding = s.part == Part::Gather || s.part == Part::Reduce;
      const bool experts = sharding && s.unit == UnitKind::Experts;
      const auto members = group_members(mesh, experts ? Group::ExpertShard : c.group, rank);
      if (members.size() == 1) continue;
      ranks[rank].events.push_back({action});
      add_visit(rank, action, experts ? Group::ExpertShard : c.group, members,
                text("%s%s of chunk %d, layer %d, ", c.name,
                     s.backward && !sharding ? " (backward)" : "", s.chunk, s.layer) +
                    (sharding ? kUnits[int(s.unit)] : text("micro-batch %d", s.mb)));
    }
  }
  // Messages and computations; with `layers` > 0, collectives too.
  void add_events(int rank, int layers, bool gather_layer) {
    const ActionList& list = lists[rank];
    vector<ChunkLayers> chunks;
    if (layers) chunks = chunk_layers(o.kind, o.pp, coord_of(mesh, rank).pp_rank, layers);
    for (int i = 0; i < int(list.size()); i++) {
      const Action& a = list[i];
      if (!a.is_message() || i == 0 || !list[i - 1].is_message()) ranks[rank].events.push_back({i});
      if (a.is_message()) add_message(rank, i);
      if (!layers) continue;
      // Gather and Reduce: all units of the chunk, which are those of a W, in Reduce's order.
      const bool units = a.is_collective();
      vector<Step> steps = steps_of(units ? Action{.what = Do::W, .chunk = a.chunk} : a, chunks,
                                    o.forward_only && !units, gather_layer && !units);
      if (a.what == Do::Gather) std::ranges::reverse(steps);
      for (Step& s : steps) {
        if (units) s.part = a.what == Do::Gather ? Part::Gather : Part::Reduce;
        add_collective(rank, i, s);
      }
    }
  }

  [[noreturn]] void fail(int rank, int action, const string& why) const {
    throw ScheduleCheck{rank, action, where(lists, rank, action) + ": " + why};
  }
  void come(int rank, const Visit& v) const {
    vector<Arrival>& own = v.place->at(rank);
    const size_t turn = own.size();
    own.push_back({v.action, v.what, ranks[rank].time});
    for (const auto& [other, arrivals] : *v.place)
      if (arrivals.size() > turn && arrivals[turn].what != v.what)
        fail(rank, v.action,
             "does not match " + where(lists, other, arrivals[turn].action) + ": " + v.what +
                 " against " + arrivals[turn].what);
  }
  // Who has not come to what the rank stands in; -1: nobody.
  int missing(int rank) const {
    const RankState& r = ranks[rank];
    for (const Visit& v : r.events[r.next].visits)
      for (const auto& [member, arrivals] : *v.place)
        if (arrivals.size() < v.place->at(rank).size()) return member;
    return -1;
  }
  // Begins the rank's next event, and ends it unless someone is missing. Whether it ended.
  bool advance(int rank) {
    RankState& r = ranks[rank];
    if (r.ended()) return false;
    const Event& e = r.events[r.next];
    if (e.visits.empty()) {
      result.begin[rank][e.action] = r.time;
      r.time += duration(lists[rank][e.action]);
      result.busy += duration(lists[rank][e.action]);
    }
    for (size_t i = 0; i < e.visits.size() && !r.inside; i++) come(rank, e.visits[i]);
    r.inside = missing(rank) >= 0;
    if (r.inside) return false;
    for (const Visit& v : e.visits)
      for (const auto& [_, arrivals] : *v.place)
        r.time = std::max(r.time, arrivals[v.place->at(rank).size() - 1].time);
    r.next++;
    return true;
  }
  [[noreturn]] void deadlock(int rank) const {
    const auto action = [&](int r) { return ranks[r].events[ranks[r].next].action; };
    string why = "deadlock: waits";
    int at = rank;
    for (size_t i = 0; i < ranks.size() && !ranks[at].ended(); i++) {
      at = missing(at);
      why += text(" for rank %d, which ", at) +
             (ranks[at].ended() ? "has ended" : "waits in " + where(lists, at, action(at)));
    }
    fail(rank, action(rank), why);
  }
  void run() {
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
  const int count = int(lists.size());
  if (count != mesh.world())
    return {0, 0, text("lists of %d ranks (need %d)", count, mesh.world())};
  ScheduleCheck result;
  Replay replay{o, mesh, lists, result};
  try {
    for (int rank = 0; rank < count; rank++) {
      ListWalk walk{o, coord_of(mesh, rank).pp_rank};
      int i = 0;
      try {
        for (; i < int(lists[rank].size()); i++) walk.run(lists[rank][i]);
        walk.end();
      } catch (const string& why) {
        replay.fail(rank, i, why);
      }
      result.peak_live = std::max(result.peak_live, walk.peak_live);
      result.peak_deferred = std::max(result.peak_deferred, walk.peak_deferred);
      result.begin.emplace_back(lists[rank].size());
    }
    for (int rank = 0; rank < count; rank++) replay.add_events(rank, layers, gather_layer);
    replay.run();
  } catch (const ScheduleCheck& fault) {
    return fault;
  }
  return result;
}

ScheduleCheck check_schedule(const ScheduleOptions& o, const vector<ActionList>& lists) {
  return check_collectives(o, Mesh{.pp = o.pp}, 0, false, lists);
}

}  // namespace pith
