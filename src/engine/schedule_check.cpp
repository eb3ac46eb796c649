// Proofs of lists: first each rank's own order, then all ranks together, as they would run when
// every group call and every collective blocks. What is wrong is thrown as a string.
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

// What has run of a chunk and micro-batch; gathers and reduces stand with micro-batch 0.
enum Fact : u8 { kRecvF, kF, kSendF, kRecvB, kB, kW, kSendB, kGather, kReduce };
constexpr const char* kFacts[] = {"recv F%d.%d", "F%d.%d",    "send F%d.%d",
                                  "recv B%d.%d", "B%d.%d",    "W%d.%d",
                                  "send B%d.%d", "gather %d", "reduce %d"};

// Walks one rank's list. An index `i` is chunk * n + micro-batch.
struct ListWalk {
  const ScheduleOptions& o;
  int rank;  // of the pipeline
  int n = o.micro_batches;
  vector<u16> facts = vector<u16>(2 * n, 0);  // bits
  int live = 0, peak_live = 0;

  bool has(Fact f, int i) const { return facts[i] >> f & 1; }
  void need(Fact f, int i) const {
    if (!has(f, i)) throw text(kFacts[f], i / n, i % n) + " has not run";
  }
  void record(Fact f, int i) {
    if (has(f, i)) throw text(kFacts[f], i / n, i % n) + " has run already";
    facts[i] |= 1 << f;
  }
  int index(int chunk, int mb, int count = 1) const {
    if (chunk < 0 || chunk >= chunks_of(o.kind) || mb < 0 || count < 1 || mb + count > n)
      throw string("names no chunk and micro-batch of this rank");
    return chunk * n + mb;
  }
  // The other rank before or behind a chunk; -1: there is none.
  int peer(int i, int step) const {
    const int other = rank_beside(o, rank, i / n, step);
    return other == rank ? -1 : other;
  }
  // What a chunk computes on: received, or made here by the stage at `step`.
  void need_input(int i, int step) const {
    if (peer(i, step) >= 0) need(step < 0 ? kRecvF : kRecvB, i);
    if (rank_beside(o, rank, i / n, step) == rank) need(step < 0 ? kF : kB, (i + n) % (2 * n));
  }

  void message(const Action& a, int i) {
    const bool send = a.what == Do::Send, activation = a.payload == Payload::Activation;
    const int other = peer(i, send == activation ? 1 : -1);
    if (a.peer != other || other < 0)
      throw text("goes to the wrong rank (got %d, need %s)", a.peer,
                 other < 0 ? "none" : std::to_string(other).c_str());
    if (send) need(activation ? kF : kB, i);
    record(activation ? (send ? kSendF : kRecvF) : (send ? kSendB : kRecvB), i);
    live -= o.forward_only && send;
  }
  void bound_live() const {
    const int limit = o.kind == ScheduleKind::DualPipeV ? 2 * o.pp + 1 : o.pp - rank;
    if (peak_live <= limit || o.forward_only) return;
    int i = 0;
    while (has(kF, i) == has(kB, i)) i++;
    throw text(
        "activations of too many micro-batches are held (got %d, need at most %d); "
        "B%d.%d has not run",
        peak_live, limit, i / n, i % n);
  }
  void run(const Action& a) {
    if (o.forward_only && (a.has_backward() || a.what == Do::W || a.what == Do::Reduce ||
                           a.payload == Payload::Gradient))
      throw string("a forward-only list has no backward");
    if (a.is_collective() && !o.gather_step)
      throw string("weights are not gathered for the whole step");
    const int i = index(a.chunk, a.is_collective() ? 0 : a.mb, a.count);
    if (a.is_message()) message(a, i);
    if (a.what == Do::Gather) record(kGather, i);
    if (a.what == Do::Reduce) {
      for (int mb = 0; mb < n; mb++) need(kB, i + mb);
      for (int mb = 0; mb < n; mb++) need(kW, i + mb);
      record(kReduce, i);
    }
    for (int mb = 0; mb < a.count && a.what == Do::W; mb++) {
      need(kB, i + mb);
      if (peer(i, -1) >= 0) need(kSendB, i + mb);  // W frees what is sent
      record(kW, i + mb);
    }
    if (a.has_forward()) {
      if (o.gather_step) need(kGather, a.chunk * n);
      need_input(i, -1);
      record(kF, i);
      peak_live = max(peak_live, ++live);
      if (o.forward_only) {  // an output stays until it is sent or has become an input
        live -= rank_beside(o, rank, a.chunk, 1) < 0;
        live -= rank_beside(o, rank, a.chunk, -1) == rank;
      }
    }
    if (a.has_backward()) {
      const int b = index(a.backward_chunk(), a.backward_mb());
      need(kF, b);
      need_input(b, 1);
      record(kB, b);
      if (!a.defer) record(kW, b);
      live--;
    }
    bound_live();
  }
  void end() const {
    for (int i = 0; i < n * chunks_of(o.kind); i++) {
      need(kF, i);
      if (peer(i, 1) >= 0) need(kSendF, i);
      if (o.gather_step && i % n == 0) need(kGather, i);
      if (o.forward_only) continue;
      need(kB, i);
      need(kW, i);
      if (peer(i, -1) >= 0) need(kSendB, i);
      if (o.gather_step && i % n == 0) need(kReduce, i);
    }
  }
};

// A rank in a collective, or at one end of a message.
struct Visit;
using Place = std::map<int, vector<Visit>>;  // by member: the n-th visits of all of them meet
struct Visit {
  Place* place;
  int action;
  string what;  // in which all members must agree
  int time = 0;
};
// What a rank does next: a collective, or the messages of one group call, which begins with
// `action`; without visits it computes.
struct Event {
  int action;
  vector<Visit> visits = {};
};

struct Replay {
  struct RankState {
    vector<Event> events = {};
    size_t next = 0;
    bool inside = false;  // of the next event
    int time = 0;
    bool ended() const { return next == events.size(); }
    const Event& event() const { return events[next]; }
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
              text("%c of stage %d, micro-batch %d", a.payload == Payload::Activation ? 'F' : 'B',
                   stage, a.mb));
  }
  void add_collective(int rank, int action, const Step& s) {
    const bool sharding = s.part == Part::Gather || s.part == Part::Reduce;
    Group group = s.unit == UnitKind::Experts ? Group::ExpertShard : Group::DenseShard;
    const char* name = s.part == Part::Gather ? "gather" : "reduce";
    if (s.part == Part::Attention) {
      group = Group::Cp;
      name = "attention";
    } else if (s.part == Part::Dispatch || s.part == Part::Combine) {
      group = Group::Ep;
      name = s.part == Part::Dispatch ? "dispatch" : "combine";
    } else if (!sharding) {
      return;
    }
    const vector<int> members = group_members(mesh, group, rank);
    if (members.size() == 1) return;
    constexpr const char* units[] = {"embedding", "layer", "experts", "head"};
    ranks[rank].events.push_back({action});
    add_visit(rank, action, group, members,
              text("%s of chunk %d, layer %d, ", name, s.chunk, s.layer) +
                  (sharding ? units[int(s.unit)]
                            : text("micro-batch %d%s", s.mb, s.backward ? ", backward" : "")));
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
      if (!layers || a.is_message()) continue;
      for (const Step& s : steps_of(a, chunks, o.forward_only, gather_layer))
        add_collective(rank, i, s);
    }
  }

  void come(int rank, const Visit& v) {
    vector<Visit>& own = v.place->at(rank);
    const size_t turn = own.size();
    own.push_back({v.place, v.action, v.what, ranks[rank].time});
    result.rank = rank;
    result.action = v.action;
    for (const auto& [other, visits] : *v.place)
      if (visits.size() > turn && visits[turn].what != v.what)
        throw "does not match " + where(lists, other, visits[turn].action) + ": " + v.what +
            " against " + visits[turn].what;
  }
  // Who has not come to what the rank stands in; -1: nobody.
  int missing(int rank) const {
    for (const Visit& v : ranks[rank].event().visits)
      for (const auto& [member, visits] : *v.place)
        if (visits.size() < v.place->at(rank).size()) return member;
    return -1;
  }
  // Begins the rank's next event and, unless someone is missing, ends it.
  bool advance(int rank) {
    RankState& r = ranks[rank];
    if (r.ended()) return false;
    const Event& e = r.event();
    if (e.visits.empty()) {
      result.begin[rank][e.action] = r.time;
      r.time += duration(lists[rank][e.action]);
    }
    for (size_t i = 0; i < e.visits.size() && !r.inside; i++) come(rank, e.visits[i]);
    r.inside = missing(rank) >= 0;
    if (r.inside) return false;
    for (const Visit& v : e.visits)
      for (const auto& [_, visits] : *v.place)
        r.time = max(r.time, visits[v.place->at(rank).size() - 1].time);
    r.next++;
    return true;
  }
  void deadlock(int rank) {
    string why = "deadlock: waits";
    result.rank = rank;
    result.action = ranks[rank].event().action;
    for (size_t i = 0; i < ranks.size() && !ranks[rank].ended(); i++) {
      rank = missing(rank);
      why += text(" for rank %d, which ", rank);
      why += ranks[rank].ended() ? "has ended"
                                 : "waits in " + where(lists, rank, ranks[rank].event().action);
    }
    throw why;
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
      result.makespan = max(result.makespan, ranks[r].time);
    }
  }
};

}

ScheduleCheck check_collectives(const ScheduleOptions& o, const Mesh& mesh, int layers,
                                bool gather_layer, const vector<ActionList>& lists) {
  const int count = int(lists.size());
  if (count != mesh.world())
    return {0, 0, text("lists of %d ranks (need %d)", count, mesh.world())};
  ScheduleCheck c;
  try {
    for (c.rank = 0; c.rank < count; c.rank++) {  // where the check is
      const ActionList& list = lists[c.rank];
      ListWalk walk{o, coord_of(mesh, c.rank).pp_rank};
      for (c.action = 0; c.action < int(list.size()); c.action++) walk.run(list[c.action]);
      walk.end();
      c.peak_live = max(c.peak_live, walk.peak_live);
      c.begin.emplace_back(list.size());
      for (const Action& a : list) c.busy += duration(a);
    }
    Replay replay{o, mesh, lists, c};
    for (int rank = 0; rank < count; rank++) replay.add_events(rank, layers, gather_layer);
    replay.run();
    c.rank = c.action = -1;
  } catch (const string& why) {
    c.why = where(lists, c.rank, c.action) + ": " + why;
  }
  return c;
}

ScheduleCheck check_schedule(const ScheduleOptions& o, const vector<ActionList>& lists) {
  return check_collectives(o, Mesh{.pp = o.pp}, 0, false, lists);
}

}
