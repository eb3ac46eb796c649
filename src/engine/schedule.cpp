#include "engine/schedule.h"

#include <algorithm>

namespace pith {

const char* name_of(ScheduleKind kind) {
  return kind == ScheduleKind::DualPipeV ? "dualpipev" : "1f1b";
}

ScheduleKind schedule_kind(const string& name, int pp, int ep) {
  if (name == "auto") return pp == 1 && ep == 1 ? ScheduleKind::OneF1B : ScheduleKind::DualPipeV;
  for (const ScheduleKind kind : {ScheduleKind::DualPipeV, ScheduleKind::OneF1B})
    if (name == name_of(kind)) return kind;
  bad_input("schedule", text("is unknown (got \"%s\", need auto, dualpipev or 1f1b)", name.c_str()),
            "schedule = \"auto\"");
}

int stage_of(ScheduleKind kind, int pp, int rank, int chunk) {
  return chunk == 0 ? rank : stages_of(kind, pp) - 1 - rank;
}

int rank_of_stage(ScheduleKind kind, int pp, int stage) {
  return stage < pp ? stage : stages_of(kind, pp) - 1 - stage;
}

vector<int> layer_partition(int layers, int stages) {
  if (layers < stages)
    bad_input(
        "layers",
        text("are fewer than the pipeline's stages (got %d layers and %d stages)", layers, stages),
        "a smaller parallel.pp, or parallel.schedule = \"1f1b\"");
  vector<int> count(stages, layers / stages);
  const int interior = max(stages - 2, 0);
  for (int i = 0; i < layers % stages; i++) count[i < interior ? i + 1 : 0]++;
  return count;
}

vector<ChunkLayers> chunk_layers(ScheduleKind kind, int pp, int rank, int layers) {
  const int stages = stages_of(kind, pp);
  const vector<int> count = layer_partition(layers, stages);
  vector<ChunkLayers> chunks;
  for (int chunk = 0; chunk < chunks_of(kind); chunk++) {
    const int stage = stage_of(kind, pp, rank, chunk);
    int first = 0;
    for (int s = 0; s < stage; s++) first += count[s];
    chunks.push_back({first, count[stage], stage == 0, stage == stages - 1});
  }
  return chunks;
}

int message_stage(const ScheduleOptions& o, int rank, const Action& transfer) {
  const int step = transfer.payload == Payload::Activation ? -1 : 1;
  return stage_of(o.kind, o.pp, rank, transfer.chunk) + (transfer.what == Do::Recv ? step : 0);
}

int rank_beside(const ScheduleOptions& o, int rank, int chunk, int step) {
  const int stage = stage_of(o.kind, o.pp, rank, chunk) + step;
  const bool exists = stage >= 0 && stage < stages_of(o.kind, o.pp);
  return exists ? rank_of_stage(o.kind, o.pp, stage) : -1;
}

int min_micro_batches(const ScheduleOptions& o) {
  return o.kind == ScheduleKind::DualPipeV && !o.forward_only ? 2 * o.pp : 1;
}

int duration(const Action& a) {
  const int weights = a.what == Do::W ? a.count : a.has_backward() && !a.defer;
  return a.has_forward() + a.has_backward() + weights;
}

namespace {

// Builds one rank's list. Messages are queued, and leave as one group right before the next compute
// action.
struct Builder {
  const ScheduleOptions& o;
  int rank;
  ActionList list = {};
  ActionList queue = {}, due = {};  // messages of the next group, W to run behind it
  ActionList deferred = {};         // W of one micro-batch each, oldest first
  int forwards[2] = {}, received[2] = {}, backwards[2] = {};
  bool zero_bubble = false;  // weight gradients wait for the schedule's own W

  void message(Do what, Payload payload, int chunk, int mb) {
    const bool onward = (what == Do::Send) == (payload == Payload::Activation);
    const int peer = rank_beside(o, rank, chunk, onward ? 1 : -1);
    if (peer < 0 || peer == rank) return;
    queue.push_back({.what = what, .chunk = chunk, .mb = mb, .payload = payload, .peer = peer});
  }
  void recv_f(int chunk) { message(Do::Recv, Payload::Activation, chunk, received[chunk]++); }
  void recv_b(int chunk) { message(Do::Recv, Payload::Gradient, chunk, backwards[chunk]); }
  void send_f(int chunk) { message(Do::Send, Payload::Activation, chunk, forwards[chunk] - 1); }
  void send_b(int chunk) { message(Do::Send, Payload::Gradient, chunk, backwards[chunk] - 1); }

  void commit() {
    list.insert(list.end(), queue.begin(), queue.end());
    list.insert(list.end(), due.begin(), due.end());
    queue.clear();
    due.clear();
  }
  void add(const Action& a) {
    commit();
    list.push_back(a);
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
  // Batches fall due on all ranks at once, so that none waits for another's: DualPipeV is at
  // (stage, mb) in `slot` of the steady state, even ones of one chunk and odd ones of the other.
  void end_backward(int chunk) {
    const int mb = backwards[chunk]++, n = o.weight_grad_batch;
    if (!defers()) return;
    deferred.push_back({.what = Do::W, .chunk = chunk, .mb = mb});
    const int slot = (2 * mb + 2 * o.pp - 1 - stage_of(o.kind, o.pp, rank, chunk)) % (2 * n);
    const bool falls_due = o.kind == ScheduleKind::OneF1B
                               ? mb % n == n - 1
                               : slot == 2 * n - 1 || slot == (n - 1) / 2 * 2;
    if (falls_due && !zero_bubble) due.push_back(take_deferred(chunk, n));
  }

  void compute_f(int chunk) {  // without the messages around it
    add({.what = Do::F, .chunk = chunk, .mb = forwards[chunk]++});
  }
  void f(int chunk) {
    recv_f(chunk);
    compute_f(chunk);
    send_f(chunk);
  }
  void b(int chunk) {
    recv_b(chunk);
    add({.what = Do::B, .chunk = chunk, .mb = backwards[chunk], .defer = defers()});
    end_backward(chunk);
    send_b(chunk);
  }
  void fb(int f_chunk, bool receive = true) {
    const int b_chunk = 1 - f_chunk;
    if (receive) recv_f(f_chunk);
    recv_b(b_chunk);
    add({.what = Do::FB,
         .chunk = f_chunk,
         .mb = forwards[f_chunk]++,
         .chunk2 = b_chunk,
         .mb2 = backwards[b_chunk],
         .defer = defers()});
    end_backward(b_chunk);
    send_f(f_chunk);
    send_b(b_chunk);
  }
  void w(int most = 1) {
    commit();
    if (!deferred.empty()) list.push_back(take_deferred(deferred.front().chunk, most));
  }
};

// The eight steps of DualPipeV.
void build_dualpipev(Builder& s) {
  const int r = s.rank, below = s.o.pp - r - 1;
  for (int i = 0; i < 2 * below; i++) s.f(0);  // 1: fill, down leg
  s.recv_f(0);
  for (int i = 0; i <= r; i++) {  // 2: fill, both legs
    s.compute_f(0);
    s.recv_f(0);
    s.recv_f(1);
    s.compute_f(1);
    if (below > 0 || i < r) s.send_f(1);
    s.send_f(0);
  }
  for (int i = 0; i < below; i++) {  // 3: weight gradients fill the bubble
    s.zero_bubble = true;
    s.b(1);
    s.zero_bubble = false;
    s.recv_f(1);
    s.w();
    s.compute_f(1);
    s.send_f(1);
  }
  for (int i = 0; i < s.o.micro_batches - s.o.pp - below; i++) {  // 4: the steady state
    if (i == 0 && below == 0) {  // unfused, so that the turn starts its first backward sooner
      s.compute_f(0);
      s.send_f(1);
      s.b(1);
    } else {
      s.fb(0, i > 0);
    }
    s.fb(1);
  }
  for (int i = 0; i < below; i++) {  // 5: up leg only
    s.b(1);
    s.fb(1);
  }
  for (int i = 0; i <= r; i++) {  // 6: drain; deferral begins half-way
    if (2 * i == r + 1) s.zero_bubble = true;
    s.b(1);
    if (2 * i == r) s.zero_bubble = true;
    s.b(0);
  }
  for (int i = 0; i < below; i++) {  // 7: drain, down leg
    s.w();
    s.b(0);
  }
}

void build_1f1b(Builder& s) {
  const int n = s.o.micro_batches, ahead = min(s.o.pp - s.rank - 1, n);
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

// A micro-batch enters every `chunks` slots and moves on a stage a slot: no two meet on a rank.
void build_forward(Builder& s) {
  const auto& o = s.o;
  const int chunks = chunks_of(o.kind), n = o.micro_batches;
  for (int slot = 0; slot < chunks * (n - 1) + stages_of(o.kind, o.pp); slot++)
    for (int chunk = 0; chunk < chunks; chunk++) {
      const int age = slot - stage_of(o.kind, o.pp, s.rank, chunk);
      if (age >= 0 && age % chunks == 0 && age / chunks < n) s.f(chunk);
    }
}

// Gathers stand first, where ranks wait anyhow; rank 0 does not, and begins before it gathers its
// second chunk. A Reduce stands behind the messages that follow its chunk's last weight gradients.
void add_gathers(const ScheduleOptions& o, int rank, ActionList& list) {
  for (int chunk = 0; chunk < chunks_of(o.kind) && !o.forward_only; chunk++) {
    const auto gives_gradients = [&](const Action& a) {
      const bool any = a.what == Do::W || (a.has_backward() && !a.defer);
      return any && a.backward_chunk() == chunk;
    };
    size_t at = list.size();
    while (!gives_gradients(list[at - 1])) at--;
    while (at < list.size() && list[at].is_message()) at++;
    list.insert(list.begin() + at, {.what = Do::Reduce, .chunk = chunk});
  }
  if (chunks_of(o.kind) == 2) {
    size_t at = rank == 0;
    while (rank == 0 && list[at].is_message()) at++;
    list.insert(list.begin() + at, {.what = Do::Gather, .chunk = 1});
  }
  list.insert(list.begin(), {.what = Do::Gather, .chunk = 0});
}

}

ActionList make_schedule(const ScheduleOptions& o, int rank) {
  const int least = min_micro_batches(o);
  if (o.micro_batches < least)
    bad_input("schedule",
              text("%s at pp = %d gets too few micro-batches (got %d, need at least %d)",
                   name_of(o.kind), o.pp, o.micro_batches, least),
              "more micro-batches in a step, a smaller pp, or schedule = \"1f1b\"");
  Builder s{o, rank};
  if (o.forward_only)
    build_forward(s);
  else if (o.kind == ScheduleKind::DualPipeV)
    build_dualpipev(s);
  else
    build_1f1b(s);
  do {
    s.w(o.weight_grad_batch);
  } while (!s.deferred.empty());
  if (o.gather_step) add_gathers(o, rank, s.list);
  return std::move(s.list);
}

vector<ActionList> make_schedules(const ScheduleOptions& o) {
  vector<ActionList> lists;
  for (int rank = 0; rank < o.pp; rank++) lists.push_back(make_schedule(o, rank));
  return lists;
}

string to_text(const Action& a) {
  const string f = text("F%d.%d", a.chunk, a.mb);
  const string b = text("B%d.%d", a.backward_chunk(), a.backward_mb()) + (a.defer ? "+" : "");
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

// Of all actions with the line's numbers, the one that prints as the line.
Action parse_action(const string& line, const string& place) {
  int n[4] = {};
  sscanf(line.c_str(), "%*[^0-9]%6d%*[^0-9]%6d%*[^0-9]%6d%*[^0-9]%6d", &n[0], &n[1], &n[2], &n[3]);
  for (int what = 0; what <= int(Do::Reduce); what++) {
    Action a{.what = static_cast<Do>(what), .chunk = n[0], .mb = n[1]};
    if (a.has_backward()) a.defer = line.ends_with('+');
    if (a.what == Do::FB) a.chunk2 = n[2];
    if (a.what == Do::FB) a.mb2 = n[3];
    if (a.what == Do::W && n[2] > 0) a.count = n[2] - n[1] + 1;
    if (a.is_message()) a.peer = n[2];
    if (a.is_message() && line.find('B') != string::npos) a.payload = Payload::Gradient;
    if (to_text(a) == line && a.chunk < 2 && a.chunk2 < 2 && a.count > 0) return a;
  }
  bad_input(place,
            text("is not an action (got \"%s\", need one such as F0.3, B1.2+, W1.2-4, "
                 "F0.5|B1.3, send F0.3 > 1 or recv B1.2 < 1)",
                 line.c_str()),
            "the form that pith plan --schedule --lists prints");
}

}
