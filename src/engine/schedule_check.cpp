// What is wrong with lists is thrown as a string.
#include <array>
#include <map>
#include <set>

#include "engine/schedule.h"

namespace pith {

namespace {

string where(const vector<ActionList>& lists, int rank, int action) {
  if (action == int(lists[rank].size())) return text("rank %d, at the end", rank);
  return text("rank %d, action %d (%s)", rank, action, to_text(lists[rank][action]).c_str());
}

// Parts of an action, of which a list holds each once.
vector<Action> deeds_of(const Action& a) {
  int chunk = a.backward_chunk(), mb = a.backward_mb();
  vector<Action> deeds;
  if (a.has_forward()) deeds.push_back({Do::F, a.chunk, a.mb});
  if (a.has_backward()) deeds.push_back({Do::B, chunk, mb});
  for (int i = 0; i < a.count && a.has_weights(); i++) deeds.push_back({Do::W, chunk, mb + i});
  if (deeds.empty())
    deeds.push_back({.what = a.what, .chunk = chunk, .mb = mb, .payload = a.payload});
  return deeds;
}

struct ListWalk {
  const ScheduleOptions& o;
  std::map<Action, int> peers = {};  // of all deeds
  std::set<Action> done = {};
  int live = 0, peak_live = 0;
  int peak = 0;  // the action where the most are live

  ListWalk(const ScheduleOptions& options, int rank) : o(options) {
    for (const Action& a : make_schedule(o, rank))
      for (const Action& deed : deeds_of(a)) peers[deed] = a.peer;
  }
  [[noreturn]] static void fail(const Action& deed, const char* what) {
    string name = to_text(deed);
    throw name.substr(0, name.find_first_of("<>") - deed.is_message()) + what;
  }
  void need(Do what, int chunk, int mb, Payload payload = Payload::Activation) const {
    const Action deed{.what = what, .chunk = chunk, .mb = mb, .payload = payload};
    if (peers.contains(deed) && !done.contains(deed)) fail(deed, " has not run");
  }
  void run(const Action& a, int action) {
    vector<Action> own = deeds_of(a);
    if (o.forward_only && a.has_backward()) throw string("a forward-only list has no backward");
    for (const Action& deed : own)
      if (auto at = peers.find(deed); at == peers.end() || at->second != a.peer)
        throw string("names no chunk and micro-batch of this rank, or goes to the wrong rank");
    int chunk = a.backward_chunk(), mb = a.backward_mb();
    if (a.what == Do::Send) need(a.payload == Payload::Activation ? Do::F : Do::B, chunk, mb);
    if (a.has_forward()) {
      need(Do::Gather, a.chunk, 0);
      need(Do::Recv, a.chunk, a.mb);
      if (a.chunk == 1) need(Do::F, 0, a.mb);
    }
    if (a.has_backward()) {
      need(Do::F, chunk, mb);
      need(Do::Recv, chunk, mb, Payload::Gradient);
      if (chunk == 0) need(Do::B, 1, mb);
    }
    for (int i = mb; i < mb + a.count && a.what == Do::W; i++) {
      need(Do::B, chunk, i);
      need(Do::Send, chunk, i, Payload::Gradient);  // W frees what is sent
    }
    for (int i = 0; i < o.micro_batches && a.what == Do::Reduce; i++) {
      need(Do::B, chunk, i);
      need(Do::W, chunk, i);
    }
    for (const Action& deed : own)
      if (!done.insert(deed).second) fail(deed, " has run already");
    if (a.has_forward() && ++live > peak_live) {
      peak_live = live;
      peak = action;
    }
    // In a forward-only list an output stays until it is sent.
    live -= o.forward_only
                ? a.what == Do::Send || (a.has_forward() && !peers.contains({Do::Send, chunk, mb}))
                : a.has_backward();
  }
  void end() const {
    for (const auto& [deed, peer] : peers)
      if (!done.contains(deed)) fail(deed, " has not run");
  }
};

// In a collective, or at an end of a message; all members agree on `what`.
struct Visit {
  int event, action;
  string what;
};
using Place = std::map<int, vector<Visit>>;  // by member: the n-th visits of all of them meet

struct Event {
  int action;
  int time = 0;  // it takes
  vector<std::pair<const Place*, size_t>> visits = {};
  int begin = 0;
};

// All ranks, where every group call and collective blocks.
struct Replay {
  const ScheduleOptions& o;
  const Mesh& mesh;
  const vector<ActionList>& lists;  // by global rank
  ScheduleCheck& result;
  std::map<std::array<int, 3>, Place> places = {};  // by group, first and last member
  vector<vector<Event>> events = vector<vector<Event>>(lists.size());
  vector<int> next = vector<int>(lists.size());

  bool ended(int rank) const { return next[rank] == int(events[rank].size()); }

  void add_visit(int rank, int action, Group group, const vector<int>& members, string what) {
    Place& place = places[{int(group), members.front(), members.back()}];
    for (const int member : members) place[member];
    size_t turn = place[rank].size();
    for (const auto& [other, visits] : place)
      if (visits.size() > turn && visits[turn].what != what) {
        result.action = action;
        throw "does not match " + where(lists, other, visits[turn].action) + ": " + what +
            " against " + visits[turn].what;
      }
    events[rank].back().visits.emplace_back(&place, turn);
    place[rank].push_back({int(events[rank].size()) - 1, action, std::move(what)});
  }
  void add_message(int rank, int action) {
    const Action& a = lists[rank][action];
    MeshCoord coord = coord_of(mesh, rank);
    int stage = message_stage(o, coord.pp_rank, a);
    coord.pp_rank = a.peer;
    int peer = rank_of(mesh, coord);
    bool send = a.what == Do::Send;
    add_visit(rank, action, Group::Pp, {send ? rank : peer, send ? peer : rank},
        text("%c of stage %d, micro-batch %d", a.payload == Payload::Activation ? 'F' : 'B', stage,
            a.mb));
  }
  void add_collective(int rank, int action, const Step& s) {
    constexpr const char* kUnits[] = {"embedding", "layer", "experts", "head"};
    string what = text("%s of chunk %d, layer %d, ", name_of(s.part), s.chunk, s.layer);
    Group group = s.part == Part::Attention ? Group::Cp : Group::Ep;
    if (s.part == Part::Gather || s.part == Part::Reduce) {
      group = s.unit == UnitKind::Experts ? Group::ExpertShard : Group::DenseShard;
      what += kUnits[int(s.unit)];
    } else if (s.part == Part::Attention || s.starts_communication()) {
      what += text("micro-batch %d%s", s.mb, s.backward ? ", backward" : "");
    } else {
      return;
    }
    const vector<int> members = group_members(mesh, group, rank);
    if (members.size() == 1) return;
    events[rank].push_back({action});
    add_visit(rank, action, group, members, what);
  }
  void add_events(int rank, int layers, bool gather_layer) {
    const ActionList& list = lists[rank];
    vector<ChunkLayers> chunks;
    if (layers) chunks = chunk_layers(o.kind, o.pp, coord_of(mesh, rank).pp_rank, layers);
    for (int i = 0; i < int(list.size()); i++) {
      const Action& a = list[i];
      if (!a.is_message() || i == 0 || !list[i - 1].is_message())
        events[rank].push_back({i, duration(a)});
      if (a.is_message()) add_message(rank, i);
      if (!layers || a.is_message()) continue;
      for (const Step& s : steps_of(a, chunks, o.forward_only, gather_layer))
        add_collective(rank, i, s);
    }
  }

  int missing(int rank) const {
    for (const auto& [place, turn] : events[rank][next[rank]].visits)
      for (const auto& [member, visits] : *place)
        if (turn >= visits.size() || visits[turn].event > next[member]) return member;
    return -1;
  }
  bool advance(int rank) {
    if (ended(rank) || missing(rank) >= 0) return false;
    const Event& e = events[rank][next[rank]++];
    int end = e.begin + e.time;
    for (const auto& [place, turn] : e.visits)
      for (const auto& [member, visits] : *place)
        end = max(end, events[member][visits[turn].event].begin);
    if (!ended(rank)) events[rank][next[rank]].begin = end;
    if (e.time > 0) result.begin[rank][e.action] = e.begin;
    result.makespan = max(result.makespan, end);
    return true;
  }
  void deadlock(int rank) {
    string why = "deadlock: waits";
    result.rank = rank;
    result.action = events[rank][next[rank]].action;
    for (size_t i = 0; i < lists.size() && !ended(rank); i++) {
      rank = missing(rank);
      why += text(" for rank %d, which ", rank);
      why += ended(rank) ? "has ended"
                         : "waits in " + where(lists, rank, events[rank][next[rank]].action);
    }
    throw why;
  }
  void run() {
    int count = int(lists.size());
    for (bool moved = true; moved;) {
      moved = false;
      for (int r = 0; r < count; r++)
        while (advance(r)) moved = true;
    }
    for (int r = 0; r < count; r++)
      if (!ended(r)) deadlock(r);
  }
};

}

ScheduleCheck check_schedule(const ScheduleOptions& o, const vector<ActionList>& lists,
    const Mesh& given, int layers, bool gather_layer) {
  const Mesh mesh = layers > 0 ? given : Mesh{.pp = o.pp};
  int count = int(lists.size());
  if (count != mesh.world())
    return {0, 0, text("lists of %d ranks (need %d)", count, mesh.world())};
  ScheduleCheck c;
  try {
    Replay replay{o, mesh, lists, c};
    for (c.rank = 0; c.rank < count; c.rank++) {
      const ActionList& list = lists[c.rank];
      int pp_rank = coord_of(mesh, c.rank).pp_rank;
      ListWalk walk(o, pp_rank);
      for (c.action = 0; c.action < int(list.size()); c.action++)
        walk.run(list[c.action], c.action);
      walk.end();
      int live = walk.peak_live;
      int most = o.kind == ScheduleKind::DualPipeV ? 2 * o.pp + 1 : o.pp - pp_rank;
      c.action = walk.peak;
      if (live > most && !o.forward_only)
        throw text(
            "activations of too many micro-batches are held (got %d, need at most %d)", live, most);
      c.peak_live = max(c.peak_live, live);
      c.begin.emplace_back(list.size());
      for (const Action& a : list) c.busy += duration(a);
      replay.add_events(c.rank, layers, gather_layer);
    }
    replay.run();
    c.rank = c.action = -1;
  } catch (const string& why) {
    c.why = where(lists, c.rank, c.action) + ": " + why;
  }
  return c;
}

}
