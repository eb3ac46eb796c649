// Proofs of lists: first each rank's own order, then all ranks together, as they would run when
// every group call and every collective blocks until all of it is there.
#include <algorithm>

#include "engine/schedule.h"

namespace pith {

namespace {

bool is_message(const Action& a) { return a.what == Do::Send || a.what == Do::Recv; }

// "rank 2, action 17 (F0.8)"
std::string where(int rank, const ActionList& list, int action) {
    if (action == static_cast<int>(list.size())) return text("rank %d, at the end", rank);
    return text("rank %d, action %d (%s)", rank, action, to_text(list[action]).c_str());
}

// ---- One rank's list ----

enum Done : uint8_t {
    kReceived = 1,
    kForward = 2,
    kSent = 4,
    kGradReceived = 8,
    kBackward = 16,
    kDeferred = 32,
    kWeights = 64,
    kGradSent = 128,
};

// Walks a list and stops at the first action that is wrong: `why` says so.
struct ListWalk {
    const ScheduleOptions& o;
    int rank;  // of the pipeline
    std::vector<uint8_t> state = std::vector<uint8_t>(2 * o.micro_batches, 0);
    bool gathered[2] = {}, reduced[2] = {};
    int live = 0, peak_live = 0, deferred = 0, peak_deferred = 0;
    std::string why = {};

    uint8_t& at(int chunk, int mb) { return state[chunk * o.micro_batches + mb]; }
    bool has(int chunk, int mb, Done what) { return at(chunk, mb) & what; }
    bool in_range(int chunk, int mb) const {
        return chunk >= 0 && chunk < chunks_of(o.kind) && mb >= 0 && mb < o.micro_batches;
    }
    // The rank of the stage before or behind chunk's (step -1, 1); -1: there is none.
    int rank_beside(int chunk, int step) const {
        const int stage = stage_of(o.kind, o.pp, rank, chunk) + step;
        const bool exists = stage >= 0 && stage < stages_of(o.kind, o.pp);
        return exists ? rank_of_stage(o.kind, o.pp, stage) : -1;
    }
    bool need(bool holds, const std::string& otherwise) {
        if (!holds && why.empty()) why = otherwise;
        return why.empty();
    }
    std::string name(char what, int chunk, int mb) const {
        return text("%c%d.%d", what, chunk, mb);
    }

    // What the F or B of (chunk, mb) computes on: received, or made here by the stage at `step`.
    bool ready(int chunk, int mb, int step, Done received, Done made) {
        const int from = rank_beside(chunk, step);
        const char* what = received == kReceived ? "input" : "output's gradient";
        if (from < 0) return true;
        if (from != rank)
            return need(has(chunk, mb, received),
                        text("the %s of %s has not been received", what,
                             name(received == kReceived ? 'F' : 'B', chunk, mb).c_str()));
        return need(has(1 - chunk, mb, made),
                    text("needs %s, which has not run",
                         name(made == kForward ? 'F' : 'B', 1 - chunk, mb).c_str()));
    }
    bool check_forward(int chunk, int mb) {
        return need(in_range(chunk, mb), "names no chunk and micro-batch of this rank") &&
               need(!has(chunk, mb, kForward), name('F', chunk, mb) + " has run already") &&
               need(!o.gather_step || gathered[chunk],
                    text("the weights of chunk %d have not been gathered", chunk)) &&
               ready(chunk, mb, -1, kReceived, kForward);
    }
    bool check_backward(int chunk, int mb) {
        return need(in_range(chunk, mb), "names no chunk and micro-batch of this rank") &&
               need(!o.forward_only, "a forward-only list has no backward") &&
               need(has(chunk, mb, kForward), name('F', chunk, mb) + " has not run") &&
               need(!has(chunk, mb, kBackward), name('B', chunk, mb) + " has run already") &&
               need(!reduced[chunk],
                    text("the gradients of chunk %d have been reduced already", chunk)) &&
               ready(chunk, mb, 1, kGradReceived, kBackward);
    }
    std::string oldest_live() {
        for (int i = 0; i < 2 * o.micro_batches; i++)
            if ((state[i] & (kForward | kBackward)) == kForward)
                return name('B', i / o.micro_batches, i % o.micro_batches);
        return "";
    }
    void forward(int chunk, int mb) {
        at(chunk, mb) |= kForward;
        peak_live = std::max(peak_live, ++live);
        const int limit = o.kind == ScheduleKind::DualPipeV ? 2 * o.pp + 1 : o.pp - rank;
        if (!o.forward_only && live > limit)
            need(false, text("activations of too many micro-batches are held (got %d, need at most "
                             "%d); %s has not run",
                             live, limit, oldest_live().c_str()));
        if (o.forward_only && rank_beside(chunk, 1) < 0) live--;
        if (o.forward_only && rank_beside(chunk, -1) == rank) live--;
    }
    void backward(int chunk, int mb, bool defer) {
        at(chunk, mb) |= kBackward | (defer ? kDeferred : kWeights);
        live--;
        deferred += defer;
        peak_deferred = std::max(peak_deferred, deferred);
    }
    void weight_grads(const Action& a) {
        if (!need(a.count >= 1 && in_range(a.chunk, a.mb) && in_range(a.chunk, a.mb + a.count - 1),
                  "names no chunk and micro-batches of this rank"))
            return;
        for (int mb = a.mb; mb < a.mb + a.count; mb++) {
            const int before = rank_beside(a.chunk, -1);
            need(has(a.chunk, mb, kDeferred), text("%s has not left its weight gradients for later",
                                                   name('B', a.chunk, mb).c_str()));
            need(!has(a.chunk, mb, kWeights), name('W', a.chunk, mb) + " has run already");
            need(before < 0 || before == rank || has(a.chunk, mb, kGradSent),
                 name('B', a.chunk, mb) + "'s gradient would be freed before it is sent");
            need(!reduced[a.chunk],
                 text("the gradients of chunk %d have been reduced already", a.chunk));
            at(a.chunk, mb) |= kWeights;
            deferred--;
        }
    }
    void message(const Action& a) {
        const bool send = a.what == Do::Send, activation = a.payload == Payload::Activation;
        if (!need(in_range(a.chunk, a.mb), "names no chunk and micro-batch of this rank") ||
            !need(activation || !o.forward_only, "a forward-only list has no gradients"))
            return;
        const int peer = rank_beside(a.chunk, send == activation ? 1 : -1);
        const Done what =
            send ? (activation ? kSent : kGradSent) : (activation ? kReceived : kGradReceived);
        if (!need(peer >= 0 && peer != rank, send ? "there is no rank to send this to"
                                                  : "there is no rank to receive this from") ||
            !need(a.peer == peer, text("goes to the wrong rank (got %d, need %d)", a.peer, peer)) ||
            !need(!has(a.chunk, a.mb, what),
                  send ? "has been sent already" : "has been received already"))
            return;
        if (send)
            need(has(a.chunk, a.mb, activation ? kForward : kBackward),
                 name(activation ? 'F' : 'B', a.chunk, a.mb) + " has not run");
        else if (!activation)
            need(has(a.chunk, a.mb, kForward),
                 name('F', a.chunk, a.mb) + " has not run, so nobody can have its gradient");
        at(a.chunk, a.mb) |= what;
        live -= o.forward_only && send;
    }
    void collective(const Action& a) {
        bool* done = a.what == Do::Gather ? gathered : reduced;
        if (!need(in_range(a.chunk, 0), "names no chunk of this rank") ||
            !need(o.gather_step, "weights are not gathered for the whole step") ||
            !need(!done[a.chunk], "has run already"))
            return;
        done[a.chunk] = true;
        for (int mb = 0; mb < o.micro_batches && a.what == Do::Reduce; mb++)
            need(has(a.chunk, mb, kWeights),
                 name(has(a.chunk, mb, kBackward) ? 'W' : 'B', a.chunk, mb) +
                     " has not run; its gradients would be lost");
    }
    void step(const Action& a) {
        switch (a.what) {
            case Do::F:
                if (check_forward(a.chunk, a.mb)) forward(a.chunk, a.mb);
                break;
            case Do::B:
                if (check_backward(a.chunk, a.mb)) backward(a.chunk, a.mb, a.defer);
                break;
            case Do::FB:
                if (!check_forward(a.chunk, a.mb) || !check_backward(a.chunk2, a.mb2)) break;
                forward(a.chunk, a.mb);
                backward(a.chunk2, a.mb2, a.defer);
                break;
            case Do::W: weight_grads(a); break;
            case Do::Gather:
            case Do::Reduce: collective(a); break;
            default: message(a);
        }
    }
    // What a complete list has done.
    void end() {
        for (int chunk = 0; chunk < chunks_of(o.kind); chunk++) {
            const auto leaves = [&](int step) {
                const int peer = rank_beside(chunk, step);
                return peer >= 0 && peer != rank;
            };
            for (int mb = 0; mb < o.micro_batches; mb++) {
                const auto missing = [&](Done what, const char* form) {
                    if (!has(chunk, mb, what)) need(false, text(form, chunk, mb));
                };
                missing(kForward, "F%d.%d is missing");
                if (leaves(1)) missing(kSent, "the output of F%d.%d has not been sent");
                if (o.forward_only) continue;
                missing(kBackward, "B%d.%d is missing");
                missing(kWeights, "W%d.%d is missing");
                if (leaves(-1)) missing(kGradSent, "the gradient of B%d.%d has not been sent");
            }
            if (!o.gather_step) continue;
            need(gathered[chunk], text("gather %d is missing", chunk));
            need(o.forward_only || reduced[chunk], text("reduce %d is missing", chunk));
        }
    }
};

// Checks the list of one rank by itself; `rank` is its number in messages.
bool check_list(const ScheduleOptions& o, int pp_rank, int rank, const ActionList& list,
                ScheduleCheck& result) {
    ListWalk walk{o, pp_rank};
    int i = 0;
    for (; i < static_cast<int>(list.size()) && walk.why.empty(); i++) walk.step(list[i]);
    if (walk.why.empty())
        walk.end();
    else
        i--;
    result.peak_live = std::max(result.peak_live, walk.peak_live);
    result.peak_deferred = std::max(result.peak_deferred, walk.peak_deferred);
    if (walk.why.empty()) return true;
    result.rank = rank;
    result.action = i;
    result.why = where(rank, list, i) + ": " + walk.why;
    return false;
}

// ---- All ranks together ----

// A collective: members of a group must come to it with equal labels.
struct Label {
    Part part = Part::Gather;
    bool backward = false;
    int chunk = 0, mb = 0, layer = -1;
    UnitKind unit = UnitKind::Layer;
    bool operator==(const Label&) const = default;
};

std::string to_text(const Label& l) {
    static const char* const parts[] = {"prolog",  "attention", "dispatch", "experts",
                                        "combine", "residual",  "epilog",   "weights",
                                        "gather",  "release",   "reduce"};
    static const char* const units[] = {"embedding", "layer", "experts", "head"};
    const char* part = parts[static_cast<int>(l.part)];
    if (l.part == Part::Gather || l.part == Part::Reduce)
        return text("%s of chunk %d, layer %d, %s", part, l.chunk, l.layer,
                    units[static_cast<int>(l.unit)]);
    return text("%s%s of chunk %d, layer %d, micro-batch %d", part, l.backward ? " (backward)" : "",
                l.chunk, l.layer, l.mb);
}

// What a rank does next: computes for a while, then stands in a collective (group >= 0), or in the
// group call of actions [action, end).
struct Event {
    int action = 0, end = 0;
    double duration = 0;
    int group = -1;
    Label label = {};
};

double duration(const Action& a, const ActionCosts& c) {
    const double b = c.backward_input + (a.defer ? 0 : c.weight_grad);
    switch (a.what) {
        case Do::F: return c.forward;
        case Do::B: return b;
        case Do::FB: return c.forward + b;
        case Do::W: return c.weight_grad * a.count;
        default: return 0;
    }
}

struct Simulation {
    struct Post {
        int rank, action;
        double time;
    };
    struct Channel {  // from one rank to another: posts that wait for their other end
        std::vector<Post> sends = {}, recvs = {};
        size_t sent = 0, received = 0;
    };
    struct RankState {
        size_t next = 0;  // event
        bool waits = false;
        int open = 0;  // messages of the group call that are not matched
        double time = 0, ready = 0;
    };
    struct Meeting {
        std::vector<int> members = {}, here = {};
        double time = 0;
    };

    const ScheduleOptions& o;
    const std::vector<ActionList>& lists;
    int world_pp_stride;  // ranks of one pipeline: rank % stride is equal
    ScheduleCheck& result;
    std::vector<std::vector<Event>> events = {};
    std::vector<Meeting> meetings = {};
    std::vector<RankState> ranks = {};
    std::vector<Channel> channels = {};

    int pp_rank(int rank) const { return rank / world_pp_stride; }
    int peer_of(int rank, const Action& a) const {
        return a.peer * world_pp_stride + rank % world_pp_stride;
    }
    Channel& channel(int from, int to) { return channels[pp_rank(from) * ranks.size() + to]; }
    const Event& event(int rank) const { return events[rank][ranks[rank].next]; }
    void fault(int rank, int action, const std::string& why) {
        if (!result.ok()) return;
        result.rank = rank;
        result.action = action;
        result.why = where(rank, lists[rank], action) + ": " + why;
    }

    // The heads of a channel meet: message and expectation must be the same.
    void match(Channel& c) {
        while (c.sent < c.sends.size() && c.received < c.recvs.size()) {
            const Post& s = c.sends[c.sent++];
            const Post& r = c.recvs[c.received++];
            const Action& sent = lists[s.rank][s.action];
            const Action& wanted = lists[r.rank][r.action];
            if (sent.payload != wanted.payload || sent.mb != wanted.mb ||
                message_stage(o, pp_rank(s.rank), sent) !=
                    message_stage(o, pp_rank(r.rank), wanted))
                fault(r.rank, r.action,
                      "gets another message: the next one on this way is of " +
                          where(s.rank, lists[s.rank], s.action));
            for (const Post& end : {s, r}) {
                RankState& rank = ranks[end.rank];
                rank.ready = std::max({rank.ready, s.time, r.time});
                rank.open--;
            }
        }
    }
    void post(int rank, const Event& e) {
        for (int i = e.action; i < e.end; i++) {
            const Action& a = lists[rank][i];
            const int peer = peer_of(rank, a);
            ranks[rank].open++;
            Channel& c = a.what == Do::Send ? channel(rank, peer) : channel(peer, rank);
            (a.what == Do::Send ? c.sends : c.recvs).push_back({rank, i, ranks[rank].time});
        }
        for (int i = e.action; i < e.end; i++) {
            const Action& a = lists[rank][i];
            const int peer = peer_of(rank, a);
            match(a.what == Do::Send ? channel(rank, peer) : channel(peer, rank));
        }
    }
    void meet(int rank, const Event& e) {
        Meeting& m = meetings[e.group];
        m.time = std::max(m.time, ranks[rank].time);
        if (!m.here.empty() && !(event(m.here[0]).label == e.label))
            fault(rank, e.action,
                  text("comes to the %s, while ", to_text(e.label).c_str()) +
                      where(m.here[0], lists[m.here[0]], event(m.here[0]).action) +
                      text(" is in the %s", to_text(event(m.here[0]).label).c_str()));
        m.here.push_back(rank);
        if (m.here.size() < m.members.size()) return;
        for (const int member : m.here) {
            ranks[member].ready = m.time;
            ranks[member].open = 0;
        }
        m.here.clear();
        m.time = 0;
    }

    // Begins the rank's next event, or ends the one it waits in. Whether anything happened.
    bool advance(int rank) {
        RankState& r = ranks[rank];
        if (r.next == events[rank].size()) return false;
        const Event& e = event(rank);
        if (!r.waits) {
            for (int i = e.action; i < std::max(e.end, e.action + 1); i++)
                if (result.times[rank][i].begin < 0) result.times[rank][i].begin = r.time;
            r.time += e.duration;
            result.busy += e.duration;
            r.ready = r.time;
            r.waits = true;
            if (e.group >= 0) {
                r.open = 1;
                meet(rank, e);
            } else {
                post(rank, e);
            }
        }
        if (r.open > 0) return false;
        r.time = r.ready;
        r.waits = false;
        for (int i = e.action; i < std::max(e.end, e.action + 1); i++)
            result.times[rank][i].end = r.time;
        r.next++;
        return true;
    }

    // Who the rank waits for, in the event where it stands.
    int waits_for(int rank) const {
        const Event& e = event(rank);
        if (e.group >= 0) {
            const Meeting& m = meetings[e.group];
            for (const int member : m.members)
                if (std::find(m.here.begin(), m.here.end(), member) == m.here.end()) return member;
        }
        for (const auto& c : channels) {
            for (size_t i = c.sent; i < c.sends.size(); i++)
                if (c.sends[i].rank == rank) return peer_of(rank, lists[rank][c.sends[i].action]);
            for (size_t i = c.received; i < c.recvs.size(); i++)
                if (c.recvs[i].rank == rank) return peer_of(rank, lists[rank][c.recvs[i].action]);
        }
        return rank;
    }
    void report_deadlock(int rank) {
        std::vector<char> seen(ranks.size(), 0);
        while (!seen[rank] && ranks[rank].next < events[rank].size()) {
            seen[rank] = 1;
            const int other = waits_for(rank);
            if (ranks[other].next == events[other].size()) break;
            rank = other;
        }
        const int first = rank;
        std::string chain;
        do {
            const int other = waits_for(rank);
            const bool ended = ranks[other].next == events[other].size();
            chain += text("%s rank %d, which ", chain.empty() ? "waits for" : " for", other);
            if (ended) {
                chain += "has ended";
                break;
            }
            chain += "waits in " + where(other, lists[other], event(other).action);
            rank = other;
        } while (rank != first);
        fault(first, event(first).action, "deadlock: " + chain);
    }

    void run() {
        ranks.resize(events.size());
        result.ranks = static_cast<int>(events.size());
        for (const ActionList& list : lists)
            result.times.emplace_back(list.size(), ActionTime{-1, -1});
        channels.resize(ranks.size() * (ranks.size() / world_pp_stride));
        for (bool moved = true; moved && result.ok();) {
            moved = false;
            for (size_t r = 0; r < ranks.size(); r++)
                while (advance(static_cast<int>(r)) && result.ok()) moved = true;
        }
        for (size_t r = 0; r < ranks.size(); r++) {
            result.makespan = std::max(result.makespan, ranks[r].time);
            if (result.ok() && ranks[r].next < events[r].size())
                report_deadlock(static_cast<int>(r));
        }
    }
};
// Adds the events of an action, or of the group call that begins with it; returns the action
// behind.
int add_events(const ActionList& list, int i, const ActionCosts& costs,
               std::vector<Event>& events) {
    int end = i;
    while (end < static_cast<int>(list.size()) && is_message(list[end])) end++;
    events.push_back({.action = i, .end = end, .duration = duration(list[i], costs)});
    return std::max(end, i + 1);
}

bool check_each_list(const ScheduleOptions& o, int world, const std::vector<ActionList>& lists,
                     ScheduleCheck& result) {
    const int count = static_cast<int>(lists.size());
    if (count != world) {
        result.rank = result.action = 0;
        result.why = text("lists of %d ranks (need %d)", count, world);
    }
    for (int rank = 0; rank < count && result.ok(); rank++)
        check_list(o, rank / (world / o.pp), rank, lists[rank], result);
    return result.ok();
}

// The collectives of a rank's actions, as the executor issues them.
struct CollectiveEvents {
    const Mesh& mesh;
    int rank;
    bool forward_only, gather_layer;
    std::vector<ChunkLayers> chunks;
    std::vector<Simulation::Meeting>& meetings;
    std::vector<int>& meeting_of;  // [group kind, first member]: index of its meeting, or -1
    std::vector<Event> events = {};

    void add(int action, Group group, const Label& label) {
        const std::vector<int> members = group_members(mesh, group, rank);
        if (members.size() == 1) return;
        int& index = meeting_of[static_cast<int>(group) * mesh.world() + members[0]];
        if (index < 0) {
            index = static_cast<int>(meetings.size());
            meetings.push_back({members});
        }
        events.push_back({.action = action, .end = action, .group = index, .label = label});
    }
    void add_unit(int action, Part part, int chunk, int layer, UnitKind unit) {
        add(action, unit == UnitKind::Experts ? Group::ExpertShard : Group::DenseShard,
            {.part = part, .chunk = chunk, .layer = layer, .unit = unit});
    }
    // Gather and Reduce actions: all units of the chunk, in order or in reverse.
    void add_chunk(int action, const Action& a) {
        const ChunkLayers& c = chunks[a.chunk];
        const bool gather = a.what == Do::Gather;
        const Part part = gather ? Part::Gather : Part::Reduce;
        if (gather ? c.prolog : c.epilog)
            add_unit(action, part, a.chunk, -1, gather ? UnitKind::Embedding : UnitKind::Head);
        for (int i = 0; i < c.count; i++) {
            const int layer = c.first + (gather ? i : c.count - 1 - i);
            add_unit(action, part, a.chunk, layer, gather ? UnitKind::Layer : UnitKind::Experts);
            add_unit(action, part, a.chunk, layer, gather ? UnitKind::Experts : UnitKind::Layer);
        }
        if (gather ? c.epilog : c.prolog)
            add_unit(action, part, a.chunk, -1, gather ? UnitKind::Head : UnitKind::Embedding);
    }
    void add_steps(int action, const Action& a) {
        for (const Step& s : steps_of(a, chunks, forward_only, gather_layer)) {
            const Label label{s.part, s.backward, s.chunk, s.mb, s.layer, s.unit};
            if (s.part == Part::Dispatch || s.part == Part::Combine) add(action, Group::Ep, label);
            if (s.part == Part::Attention) add(action, Group::Cp, label);
            if (s.part == Part::Gather || s.part == Part::Reduce)
                add_unit(action, s.part, s.chunk, s.layer, s.unit);
        }
    }
};

}  // namespace

ScheduleCheck check_schedule(const ScheduleOptions& o, const std::vector<ActionList>& lists,
                             const ActionCosts& costs) {
    ScheduleCheck result;
    if (!check_each_list(o, o.pp, lists, result)) return result;
    Simulation s{o, lists, 1, result};
    for (const ActionList& list : lists) {
        std::vector<Event>& events = s.events.emplace_back();
        for (int i = 0; i < static_cast<int>(list.size());) i = add_events(list, i, costs, events);
    }
    s.run();
    return result;
}

ScheduleCheck check_collectives(const ScheduleOptions& o, const Mesh& mesh, int layers,
                                bool gather_layer, const std::vector<ActionList>& lists) {
    ScheduleCheck result;
    if (!check_each_list(o, mesh.world(), lists, result)) return result;
    Simulation s{o, lists, mesh.world() / mesh.pp, result};
    std::vector<int> meeting_of(kGroups * mesh.world(), -1);
    for (int rank = 0; rank < mesh.world(); rank++) {
        CollectiveEvents c{mesh,
                           rank,
                           o.forward_only,
                           gather_layer,
                           chunk_layers(o.kind, o.pp, s.pp_rank(rank), layers),
                           s.meetings,
                           meeting_of};
        const ActionList& list = lists[rank];
        for (int i = 0; i < static_cast<int>(list.size());) {
            const int action = i;
            i = add_events(list, i, {}, c.events);
            if (list[action].what == Do::Gather || list[action].what == Do::Reduce)
                c.add_chunk(action, list[action]);
            else
                c.add_steps(action, list[action]);
        }
        s.events.push_back(std::move(c.events));
    }
    s.run();
    return result;
}

}  // namespace pith
