#include "engine/schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "comm/communicator.h"
#include "comm/launch.h"

namespace pith {

namespace {

constexpr ScheduleKind kKinds[] = {ScheduleKind::DualPipeV, ScheduleKind::OneF1B};

std::string joined(const ActionList& list) {
  std::string all;
  for (const Action& a : list) all += (all.empty() ? "" : ", ") + to_text(a);
  return all;
}

std::string described(const ScheduleOptions& o) {
  return text("%s pp %d, %d micro-batches%s, batches of %d%s", name_of(o.kind), o.pp,
      o.micro_batches, o.forward_only ? ", forward only" : "", o.weight_grad_batch,
      o.gather_step ? ", gathers" : "");
}

// The action with the text's numbers that prints as the text.
Action action_of(const std::string& text) {
  int n[4] = {};
  sscanf(text.c_str(), "%*[^0-9]%d%*[^0-9]%d%*[^0-9]%d%*[^0-9]%d", &n[0], &n[1], &n[2], &n[3]);
  for (int what = 0; what <= int(Do::Reduce); what++) {
    Action a{.what = static_cast<Do>(what), .chunk = n[0], .mb = n[1]};
    if (a.has_backward()) a.defer = text.ends_with('+');
    if (a.what == Do::FB) a.chunk2 = n[2];
    if (a.what == Do::FB) a.mb2 = n[3];
    if (a.what == Do::W && n[2] > 0) a.count = n[2] - n[1] + 1;
    if (a.is_message()) a.peer = n[2];
    if (a.is_message() && text.find('B') != text.npos) a.payload = Payload::Gradient;
    if (to_text(a) == text) return a;
  }
  ADD_FAILURE() << "no action: " << text;
  return {};
}

bool is_message(const Action& a) { return a.what == Do::Send || a.what == Do::Recv; }

template <class Run>
void expect_error(const std::string& part, Run run) {
  try {
    run();
    ADD_FAILURE() << "accepted: " << part;
  } catch (const Error& e) {
    EXPECT_EQ(e.exit_code, kExitBadInput);
    EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
  }
}

// Most (chunk, micro-batch) pairs of a rank that wait for a W.
int peak_deferred(const ScheduleOptions& o) {
  int peak = 0;
  for (const ActionList& list : make_schedules(o)) {
    int deferred = 0;
    for (const Action& a : list) {
      deferred += a.defer;
      if (a.what == Do::W) deferred -= a.count;
      peak = std::max(peak, deferred);
    }
  }
  return peak;
}

// Every promise about a valid list: proven, memory, time (under equal costs of forward, input
// gradient and weight gradient).
void expect_good(const ScheduleOptions& o) {
  const ScheduleCheck c = check_schedule(o, make_schedules(o));
  ASSERT_TRUE(c.ok()) << described(o) << ": " << c.why;
  const bool dual = o.kind == ScheduleKind::DualPipeV;
  const int work = o.micro_batches * chunks_of(o.kind) * (o.forward_only ? 1 : 3);
  EXPECT_DOUBLE_EQ(c.busy, static_cast<double>(work) * o.pp) << described(o);
  if (o.forward_only) {
    EXPECT_EQ(c.makespan, work + chunks_of(o.kind) * (o.pp - 1)) << described(o);
    EXPECT_LE(c.peak_live, 2) << described(o);
    return;
  }
  EXPECT_EQ(c.peak_live, dual ? 2 * o.pp + 1 : std::min(o.pp, o.micro_batches)) << described(o);
  const int n = o.weight_grad_batch;
  if (n == 1) {
    EXPECT_EQ(c.makespan, work + (dual ? 2 : 3) * (o.pp - 1)) << described(o);
    EXPECT_EQ(peak_deferred(o), dual ? o.pp : 0) << described(o);
  } else {
    // Batches cost no more than one of them; in 1F1B, deferring fills part of the bubble.
    EXPECT_LE(c.makespan, work + 2 * (o.pp - 1) + (n - 1) + (dual ? 0 : o.pp)) << described(o);
    EXPECT_LE(peak_deferred(o), dual ? o.pp + 2 * n - 1 : n) << described(o);
  }
}

void sweep(int pp_step, int mb_step) {
  for (const ScheduleKind kind : kKinds)
    for (int pp = 1; pp <= 16; pp += pp_step)
      for (const bool forward_only : {false, true}) {
        ScheduleOptions o{.kind = kind, .pp = pp, .forward_only = forward_only};
        const int fewest = min_micro_batches(o);
        for (int mb = fewest; mb <= 64; mb += mb < fewest + 2 ? 1 : mb_step)
          for (int n = 1; n <= (forward_only ? 1 : 4); n++)
            for (const bool gather : {false, true}) {
              if (gather && n != 1) continue;
              o.micro_batches = mb;
              o.weight_grad_batch = n;
              o.gather_step = gather;
              expect_good(o);
              if (testing::Test::HasFatalFailure()) return;
            }
      }
}

}  // namespace

TEST(Schedule, NamesOfKinds) {
  const struct {
    const char* name;
    int pp, ep;
    ScheduleKind kind;
  } cases[] = {
      {"auto", 1, 1, ScheduleKind::OneF1B},
      {"auto", 2, 1, ScheduleKind::DualPipeV},
      {"auto", 1, 2, ScheduleKind::DualPipeV},
      {"1f1b", 4, 2, ScheduleKind::OneF1B},
      {"dualpipev", 1, 1, ScheduleKind::DualPipeV},
  };
  for (const auto& c : cases) EXPECT_EQ(schedule_kind(c.name, c.pp, c.ep), c.kind) << c.name;
}

TEST(Schedule, StagesLieWhereTheKindSays) {
  for (const ScheduleKind kind : kKinds)
    for (int pp = 1; pp <= 16; pp++)
      for (int stage = 0; stage < stages_of(kind, pp); stage++) {
        const int rank = rank_of_stage(kind, pp, stage);
        EXPECT_EQ(stage_of(kind, pp, rank, stage < pp ? 0 : 1), stage);
        EXPECT_EQ(rank, stage < pp ? stage : 2 * pp - 1 - stage);
      }
}

TEST(Schedule, LayersSpreadOverStages) {
  const struct {
    int layers;
    std::vector<int> count;
  } cases[] = {
      {27, {14, 13}},
      {27, {7, 7, 7, 6}},
      {27, {3, 4, 4, 4, 3, 3, 3, 3}},
      {36, {4, 5, 5, 5, 5, 4, 4, 4}},
      {36, {2, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2}},
      {40, {2, 3, 3, 3, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2}},
      {48, {6, 6, 6, 6, 6, 6, 6, 6}},
      {7, {7}},
      {2, {1, 1}},
  };
  for (const auto& c : cases)
    EXPECT_EQ(layer_partition(c.layers, static_cast<int>(c.count.size())), c.count);
  expect_error("layers: are fewer than the pipeline's stages (got 7 layers and 8 stages)",
      [] { layer_partition(7, 8); });
  const std::vector<ChunkLayers> turn = chunk_layers(ScheduleKind::DualPipeV, 2, 0, 27);
  EXPECT_EQ(turn[0].first, 0);
  EXPECT_EQ(turn[0].count, 7);
  EXPECT_TRUE(turn[0].prolog && !turn[0].epilog);
  EXPECT_EQ(turn[1].first, 21);
  EXPECT_EQ(turn[1].count, 6);
  EXPECT_TRUE(!turn[1].prolog && turn[1].epilog);
}

TEST(Schedule, KnownLists) {
  const struct {
    ScheduleOptions options;
    std::vector<const char*> lists;
  } cases[] = {
      {{.kind = ScheduleKind::DualPipeV, .pp = 1, .micro_batches = 4},
          {"F0.0, F1.0, F0.1, B1.0, F1.1|B0.0, F0.2|B1.1, F1.2|B0.1, F0.3|B1.2, F1.3|B0.2, B1.3, "
           "B0.3+, W0.3"}},
      {{.kind = ScheduleKind::DualPipeV, .pp = 2, .micro_batches = 4},
          {"F0.0, send F0.0 > 1, F0.1, send F0.1 > 1, F0.2, recv F1.0 < 1, F1.0, send F0.2 > 1, "
           "B1.0+, send B1.0 > 1, recv F1.1 < 1, W1.0, F1.1, F0.3|B1.1, send F0.3 > 1, "
           "send B1.1 > 1, recv F1.2 < 1, recv B0.0 < 1, F1.2|B0.0, B1.2, send B1.2 > 1, "
           "recv F1.3 < 1, recv B0.1 < 1, F1.3|B0.1, B1.3, send B1.3 > 1, recv B0.2 < 1, B0.2+, "
           "W0.2, recv B0.3 < 1, B0.3+, W0.3",
              "recv F0.0 < 0, F0.0, recv F0.1 < 0, F1.0, send F1.0 > 0, F0.1, recv F0.2 < 0, F1.1, "
              "F0.2, send F1.1 > 0, recv B1.0 < 0, B1.0, F1.2|B0.0, send F1.2 > 0, send B0.0 > 0, "
              "recv F0.3 < 0, recv B1.1 < 0, F0.3|B1.1, F1.3|B0.1, send F1.3 > 0, send B0.1 > 0, "
              "recv B1.2 < 0, B1.2, B0.2, send B0.2 > 0, recv B1.3 < 0, B1.3+, B0.3+, send B0.3 > "
              "0, "
              "W1.3, W0.3"}},
      {{.kind = ScheduleKind::OneF1B, .pp = 2, .micro_batches = 3, .gather_step = true},
          {"gather 0, F0.0, send F0.0 > 1, F0.1, send F0.1 > 1, recv B0.0 < 1, B0.0, F0.2, "
           "send F0.2 > 1, recv B0.1 < 1, B0.1, recv B0.2 < 1, B0.2, reduce 0",
              "gather 0, recv F0.0 < 0, F0.0, B0.0, send B0.0 > 0, recv F0.1 < 0, F0.1, B0.1, "
              "send B0.1 > 0, recv F0.2 < 0, F0.2, B0.2, send B0.2 > 0, reduce 0"}},
      {{.kind = ScheduleKind::OneF1B, .micro_batches = 5, .weight_grad_batch = 2},
          {"F0.0, B0.0+, F0.1, B0.1+, W0.0-1, F0.2, B0.2+, F0.3, B0.3+, W0.2-3, F0.4, B0.4+, "
           "W0.4"}},
      {{.kind = ScheduleKind::DualPipeV,
           .pp = 2,
           .micro_batches = 1,
           .forward_only = true,
           .gather_step = true},
          {"gather 0, F0.0, send F0.0 > 1, recv F1.0 < 1, gather 1, F1.0",
              "gather 0, gather 1, recv F0.0 < 0, F0.0, F1.0, send F1.0 > 0"}},
  };
  for (const auto& c : cases)
    for (int rank = 0; rank < c.options.pp; rank++)
      EXPECT_EQ(joined(make_schedule(c.options, rank)), c.lists[rank])
          << described(c.options) << ", rank " << rank;
}

TEST(Schedule, TooFewMicroBatchesAreRefused) {
  expect_error(
      "schedule: dualpipev at pp = 4 gets too few micro-batches (got 7, need at least 8). Try:",
      [] { make_schedule({.kind = ScheduleKind::DualPipeV, .pp = 4, .micro_batches = 7}, 0); });
  expect_error("1f1b at pp = 2 gets too few micro-batches (got 0, need at least 1)",
      [] { make_schedule({.kind = ScheduleKind::OneF1B, .pp = 2, .micro_batches = 0}, 0); });
}

// All sizes of pipelines, few numbers of micro-batches; the slow suite has them all.
TEST(Schedule, ListsAreProven) { sweep(1, 23); }
TEST(SlowSchedule, AllListsAreProven) { sweep(1, 1); }

// The proof stands for the communicator: it runs the messages of the lists, with their tags.
TEST(Schedule, MessagesPassTheCommunicator) {
  for (const ScheduleKind kind : kKinds)
    for (const int pp : {2, 3, 5})
      for (const bool forward_only : {false, true}) {
        const ScheduleOptions o{.kind = kind,
            .pp = pp,
            .micro_batches = 2 * pp + 1,
            .forward_only = forward_only,
            .weight_grad_batch = 2};
        const std::vector<ActionList> lists = make_schedules(o);
        run_ranks(make_mesh(pp, pp, 1, 1), Device::CPU, {.limit_s = 20}, [&](Rank& rank) {
          const ActionList& list = lists[rank.id];
          for (size_t i = 0; i < list.size();) {
            std::vector<Transfer> group;
            for (; i < list.size() && is_message(list[i]); i++)
              group.push_back({list[i].what == Do::Send ? Transfer::Send : Transfer::Recv,
                  list[i].peer, zeros(rank, {3}, DType::F32),
                  {static_cast<int>(list[i].payload), message_stage(o, rank.id, list[i]),
                      list[i].mb}});
            if (group.empty())
              i++;
            else
              send_recv(rank, Group::Pp, group.data(), static_cast<int>(group.size()), "messages");
          }
        });
      }
}

// ---- Lists that are wrong ----

namespace {

struct Mutation {
  std::string name;
  int rank;
  ActionList list;   // of that rank
  int action = -1;   // where it must be found; -1: anywhere on this rank, -2: anywhere
  std::string text;  // that the message must hold; one half of it, if it has a bar
};

// What messages call an action: "F0.3" for "send F0.3 > 1", "F0.3|B1.2" for either half.
std::string subject(const Action& a) {
  const std::string all = to_text(a);
  const size_t begin = is_message(a) ? 5 : 0;
  return all.substr(begin, all.find_first_of(" +-", begin + 1) - begin);
}

bool names(const std::string& why, const std::string& subject) {
  const size_t half = subject.find('|');
  return why.find(subject.substr(0, half)) != std::string::npos ||
         (half != std::string::npos && why.find(subject.substr(half + 1)) != std::string::npos);
}

// Changes to action `i` alone.
void mutate_one(
    std::vector<Mutation>& out, const ScheduleOptions& o, int rank, const ActionList& list, int i) {
  const Action& a = list[i];
  const auto changed = [&](const char* name, auto change, int action, const std::string& found) {
    ActionList copy = list;
    change(copy);
    out.push_back({text("%s %s", name, to_text(a).c_str()), rank, copy, action, found});
  };
  const auto at = [&](ActionList& l) -> Action& { return l[i]; };
  if (a.what != Do::Gather && a.what != Do::Reduce)
    changed(
        "drop", [&](ActionList& l) { l.erase(l.begin() + i); }, -1, subject(a));
  else
    changed(
        "drop", [&](ActionList& l) { l.erase(l.begin() + i); }, -1, to_text(a) + " has not run");
  changed(
      "duplicate", [&](ActionList& l) { l.insert(l.begin() + i, a); }, i + 1, "already");
  if (is_message(a)) {
    changed(
        "retarget", [&](ActionList& l) { at(l).peer = (a.peer + 1) % o.pp; }, i,
        "goes to the wrong rank");
    changed(
        "flip payload of",
        [&](ActionList& l) {
          at(l).payload = a.payload == Payload::Gradient ? Payload::Activation : Payload::Gradient;
        },
        i, "rank");
  }
  if (a.what == Do::B || a.what == Do::FB)
    changed(
        "flip deferral of", [&](ActionList& l) { at(l).defer = !a.defer; }, -1, "W");
  if (a.what != Do::Gather && a.what != Do::Reduce) {
    changed(
        "next micro-batch in", [&](ActionList& l) { at(l).mb = (a.mb + 1) % o.micro_batches; }, -1,
        "");
    changed(
        "no micro-batch in", [&](ActionList& l) { at(l).mb = o.micro_batches; }, i,
        "names no chunk and micro-batch");
    changed(
        "no chunk in", [&](ActionList& l) { at(l).chunk = 2; }, i, "names no chunk");
  }
}

// Exchanges of two actions of which the later needs the earlier, or whose order the peer expects.
void mutate_order(std::vector<Mutation>& out, int rank, const ActionList& list) {
  const int size = static_cast<int>(list.size());
  for (int i = 0; i < size; i++)
    for (int j = i + 1; j < size; j++) {
      const Action &a = list[i], &b = list[j];
      const bool same = a.chunk == b.chunk && a.mb == b.mb;
      const bool feeds = same && (a.what == Do::F || a.what == Do::B) && b.what == Do::Send &&
                         (a.what == Do::F) == (b.payload == Payload::Activation);
      const bool fed = same && a.what == Do::Recv && (b.what == Do::F || b.what == Do::FB) &&
                       a.payload == Payload::Activation;
      const bool order = is_message(a) && a.what == b.what && a.peer == b.peer;
      if (!feeds && !fed && !order) continue;
      Mutation m{text("exchange %s and %s", to_text(a).c_str(), to_text(b).c_str()), rank, list,
          order ? -2 : i, order ? text("rank %d, action", rank) : ""};
      std::swap(m.list[i], m.list[j]);
      out.push_back(m);
    }
}

}  // namespace

TEST(Schedule, MutatedListsAreRefusedByName) {
  int count = 0;
  for (const ScheduleOptions& o : {ScheduleOptions{ScheduleKind::DualPipeV, 2, 5, false, 1, true},
           ScheduleOptions{ScheduleKind::DualPipeV, 3, 6, false, 2, false},
           ScheduleOptions{ScheduleKind::OneF1B, 3, 4, false, 1, true},
           ScheduleOptions{ScheduleKind::OneF1B, 3, 5, false, 3, false},
           ScheduleOptions{ScheduleKind::DualPipeV, 3, 3, true, 1, true}}) {
    const std::vector<ActionList> lists = make_schedules(o);
    std::vector<Mutation> mutations;
    for (int rank = 0; rank < o.pp; rank++) {
      for (int i = 0; i < static_cast<int>(lists[rank].size()); i++)
        mutate_one(mutations, o, rank, lists[rank], i);
      mutate_order(mutations, rank, lists[rank]);
    }
    for (const Mutation& m : mutations) {
      std::vector<ActionList> wrong = lists;
      wrong[m.rank] = m.list;
      const ScheduleCheck c = check_schedule(o, wrong);
      const std::string about = described(o) + text(", rank %d: ", m.rank) + m.name;
      EXPECT_FALSE(c.ok()) << about;
      if (c.ok()) continue;
      count++;
      EXPECT_TRUE(m.action == -2 || c.rank == m.rank) << about << ": " << c.why;
      EXPECT_TRUE(m.action < 0 || c.action == m.action) << about << ": " << c.why;
      EXPECT_TRUE(names(c.why, m.text)) << about << ": " << c.why;
      const ActionList& list = wrong[c.rank];
      const std::string place = c.action == static_cast<int>(list.size())
                                    ? text("rank %d, at the end: ", c.rank)
                                    : text("rank %d, action %d (%s): ", c.rank, c.action,
                                          to_text(list[c.action]).c_str());
      EXPECT_EQ(c.why.substr(0, place.size()), place) << about;
    }
  }
  EXPECT_GT(count, 2000);
}

TEST(Schedule, FaultsBetweenRanks) {
  const auto parse = [](const char* list) {
    ActionList actions;
    std::string rest = list;
    while (!rest.empty()) {
      const size_t end = std::min(rest.find(", "), rest.size());
      actions.push_back(action_of(rest.substr(0, end)));
      rest.erase(0, end + 2);
    }
    return actions;
  };
  const struct {
    ScheduleOptions options;
    std::vector<const char*> lists;
    int rank, action;
    const char* why;
  } cases[] = {
      {{.kind = ScheduleKind::OneF1B, .pp = 2, .micro_batches = 2},
          {"F0.0, F0.1, send F0.0 > 1, send F0.1 > 1, recv B0.0 < 1, B0.0, recv B0.1 < 1, B0.1",
              "recv F0.1 < 0, F0.1, B0.1, send B0.1 > 0, recv F0.0 < 0, F0.0, B0.0, send B0.0 > 0"},
          1, 0,
          "rank 1, action 0 (recv F0.1 < 0): does not match rank 0, action 2 (send F0.0 > 1)"},
      {{.kind = ScheduleKind::OneF1B, .pp = 2, .micro_batches = 2},
          {"F0.0, send F0.0 > 1, F0.1, send F0.1 > 1, recv B0.0 < 1, B0.0, recv B0.1 < 1, B0.1",
              "recv F0.0 < 0, F0.0, B0.0, send B0.0 > 0, F0.1, recv F0.1 < 0, B0.1, send B0.1 > 0"},
          1, 4, "rank 1, action 4 (F0.1): recv F0.1 has not run"},
      // Rank 0 wants its gradient before it lets go of its second activation.
      {{.kind = ScheduleKind::OneF1B, .pp = 2, .micro_batches = 2},
          {"F0.0, send F0.0 > 1, F0.1, recv B0.0 < 1, B0.0, send F0.1 > 1, recv B0.1 < 1, B0.1",
              "recv F0.0 < 0, F0.0, B0.0, recv F0.1 < 0, F0.1, send B0.0 > 0, B0.1, send B0.1 > 0"},
          0, 3,
          "rank 0, action 3 (recv B0.0 < 1): deadlock: waits for rank 1, which waits in rank 1, "
          "action 3 (recv F0.1 < 0) for rank 0, which waits in rank 0, action 3"},
      {{.kind = ScheduleKind::OneF1B, .pp = 2, .micro_batches = 3},
          {"F0.0, send F0.0 > 1, F0.1, send F0.1 > 1, F0.2, send F0.2 > 1, recv B0.0 < 1, B0.0, "
           "recv B0.1 < 1, B0.1, recv B0.2 < 1, B0.2",
              "recv F0.0 < 0, F0.0, B0.0, send B0.0 > 0, recv F0.1 < 0, F0.1, B0.1, send B0.1 > 0, "
              "recv F0.2 < 0, F0.2, B0.2, send B0.2 > 0"},
          0, 4,
          "rank 0, action 4 (F0.2): activations of too many micro-batches are held (got 3, need at "
          "most 2)"},
      {{.kind = ScheduleKind::OneF1B, .pp = 2, .micro_batches = 1},
          {"F0.0, send F0.0 > 1, recv B0.0 < 1, B0.0",
              "recv F0.0 < 0, F0.0, B0.0+, W0.0, send B0.0 > 0"},
          1, 3, "rank 1, action 3 (W0.0): send B0.0 has not run"},
      {{.kind = ScheduleKind::OneF1B, .pp = 2, .micro_batches = 1}, {"F0.0, B0.0"}, 0, 0,
          "lists of 1 ranks (need 2)"},
      {{.kind = ScheduleKind::OneF1B, .micro_batches = 1, .forward_only = true}, {"F0.0, B0.0"}, 0,
          1, "(B0.0): a forward-only list has no backward"},
      {{.kind = ScheduleKind::OneF1B, .micro_batches = 1, .gather_step = true},
          {"gather 0, F0.0, reduce 0, B0.0"}, 0, 2, "(reduce 0): B0.0 has not run"},
  };
  for (const auto& c : cases) {
    std::vector<ActionList> lists;
    for (const char* list : c.lists) lists.push_back(parse(list));
    const ScheduleCheck got = check_schedule(c.options, lists);
    EXPECT_EQ(got.rank, c.rank) << got.why;
    EXPECT_EQ(got.action, c.action) << got.why;
    EXPECT_NE(got.why.find(c.why), std::string::npos) << got.why;
  }
}

// ---- Inside an action ----

namespace {

bool is_sharding(const Step& s) {
  return s.part == Part::Gather || s.part == Part::Release || s.part == Part::Reduce;
}

std::vector<Step> without_sharding(std::vector<Step> steps) {
  std::erase_if(steps, is_sharding);
  return steps;
}

// The parts of one direction, in the order in which they depend on each other.
std::vector<Step> expected_parts(bool backward, int chunk, int mb, const ChunkLayers& c) {
  std::vector<Step> steps;
  const auto add = [&](Part part, int layer, UnitKind unit = UnitKind::Layer) {
    steps.push_back({.part = part, .chunk = chunk, .mb = mb, .layer = layer, .unit = unit});
  };
  if (c.prolog) add(Part::Prolog, -1, UnitKind::Embedding);
  for (int layer = c.first; layer < c.first + c.count; layer++)
    for (const Part part :
        {Part::Attention, Part::Dispatch, Part::Experts, Part::Combine, Part::Residual})
      add(part, layer, part == Part::Experts ? UnitKind::Experts : UnitKind::Layer);
  if (c.epilog) add(Part::Epilog, -1, UnitKind::Head);
  if (backward) std::reverse(steps.begin(), steps.end());
  for (Step& s : steps) s.backward = backward;
  return steps;
}

size_t index_of(const std::vector<Step>& steps, const Step& s) {
  return std::find(steps.begin(), steps.end(), s) - steps.begin();
}

// Weight gradients of all units, each once, behind the parts that they come from.
void expect_weights(const std::vector<Step>& steps, int chunk, int mb, int count,
    const ChunkLayers& c, bool own_backward) {
  const auto expect = [&](UnitKind unit, Part last, int layer) {
    const Step w{Part::Weights, true, chunk, mb, layer, unit, count};
    EXPECT_EQ(std::count(steps.begin(), steps.end(), w), 1);
    if (!own_backward) return;
    EXPECT_GT(index_of(steps, w), index_of(steps, {last, true, chunk, mb, layer, unit}));
    // The experts' run while what was dispatched comes back.
    if (unit == UnitKind::Experts) {
      EXPECT_EQ(index_of(steps, w), index_of(steps, {Part::Dispatch, true, chunk, mb, layer}) + 1);
    }
  };
  if (c.prolog) expect(UnitKind::Embedding, Part::Prolog, -1);
  for (int layer = c.first; layer < c.first + c.count; layer++) {
    expect(UnitKind::Layer, Part::Attention, layer);
    expect(UnitKind::Experts, Part::Experts, layer);
  }
  if (c.epilog) expect(UnitKind::Head, Part::Epilog, -1);
}

struct UnitName {
  int chunk, layer;
  UnitKind unit;
  auto operator<=>(const UnitName&) const = default;
};

UnitName unit_used(const Step& s) {
  if (s.part == Part::Prolog) return {s.chunk, -1, UnitKind::Embedding};
  if (s.part == Part::Epilog) return {s.chunk, -1, UnitKind::Head};
  if (s.part == Part::Experts) return {s.chunk, s.layer, UnitKind::Experts};
  if (s.part == Part::Attention || s.part == Part::Residual)
    return {s.chunk, s.layer, UnitKind::Layer};
  return {s.chunk, s.layer, s.unit};
}

// Every use finds its unit whole, at most two are whole at once, gradients have their memory and
// are reduced before it is freed, and nothing is left.
void expect_sharding(const std::vector<Step>& steps) {
  std::set<UnitName> whole, with_grads, unreduced;
  for (const Step& s : steps) {
    if (s.part == Part::Dispatch || s.part == Part::Combine) continue;
    const UnitName unit = unit_used(s);
    if (s.part == Part::Gather) {
      EXPECT_TRUE(whole.insert(unit).second);
      EXPECT_LE(whole.size(), 2u);
      if (s.backward) with_grads.insert(unit);
      continue;
    }
    EXPECT_TRUE(whole.count(unit));
    // The head's gradient begins with the loss, in the forward.
    if (s.part == Part::Weights || (s.part == Part::Epilog && !s.backward)) {
      EXPECT_TRUE(with_grads.count(unit));
      unreduced.insert(unit);
    }
    if (s.part == Part::Reduce) {
      EXPECT_EQ(unreduced.erase(unit), 1u);
    }
    if (s.part == Part::Release) {
      EXPECT_FALSE(unreduced.count(unit));
      whole.erase(unit);
      with_grads.erase(unit);
    }
  }
  EXPECT_TRUE(whole.empty());
  EXPECT_TRUE(unreduced.empty());
}

std::vector<Step> of_direction(const std::vector<Step>& steps, bool backward) {
  std::vector<Step> some = without_sharding(steps);
  std::erase_if(
      some, [&](const Step& s) { return s.part == Part::Weights || s.backward != backward; });
  return some;
}

}  // namespace

TEST(Schedule, StepsOfActions) {
  const std::vector<std::vector<ChunkLayers>> layouts = {
      {{0, 2, true, false}, {6, 2, false, true}},
      {{0, 1, true, false}, {1, 1, false, true}},
      {{2, 3, false, false}, {5, 2, false, false}},
      {{2, 1, false, false}, {3, 4, false, false}},
  };
  for (const std::vector<ChunkLayers>& chunks : layouts)
    for (const char* action : {"F0.3", "F1.3", "B0.2", "B1.2", "B1.2+", "B0.2+", "W0.1", "W1.1-3",
             "F0.3|B1.2", "F1.3|B0.2", "F0.3|B1.2+", "F1.3|B0.2+"})
      for (const bool gather_layer : {false, true}) {
        SCOPED_TRACE(text("%s, %d and %d layers, gather_layer %d", action, chunks[0].count,
            chunks[1].count, gather_layer));
        const Action a = action_of(action);
        const std::vector<Step> steps = steps_of(a, chunks, false, gather_layer);
        EXPECT_EQ(without_sharding(steps), steps_of(a, chunks, false, false));
        if (gather_layer) expect_sharding(steps);
        const bool has_f = a.what == Do::F || a.what == Do::FB;
        const bool has_b = a.what == Do::B || a.what == Do::FB;
        const int b_chunk = a.what == Do::FB ? a.chunk2 : a.chunk;
        const int b_mb = a.what == Do::FB ? a.mb2 : a.mb;
        EXPECT_EQ(of_direction(steps, false),
            has_f ? expected_parts(false, a.chunk, a.mb, chunks[a.chunk]) : std::vector<Step>{});
        EXPECT_EQ(of_direction(steps, true),
            has_b ? expected_parts(true, b_chunk, b_mb, chunks[b_chunk]) : std::vector<Step>{});
        const auto weights = std::count_if(
            steps.begin(), steps.end(), [](const Step& s) { return s.part == Part::Weights; });
        if (a.what == Do::F || a.defer) {
          EXPECT_EQ(weights, 0);
          continue;
        }
        const ChunkLayers& c = chunks[b_chunk];
        EXPECT_EQ(weights, 2 * c.count + c.prolog + c.epilog);
        expect_weights(without_sharding(steps), b_chunk, b_mb, a.count, c, has_b);
      }
  for (const char* action : {"send F0.1 > 1", "recv F1.1 < 1"})
    EXPECT_TRUE(steps_of(action_of(action), layouts[0], false, true).empty());
  std::vector<Step> units = {{Part::Gather, true, 0, 0, -1, UnitKind::Embedding},
      {Part::Gather, true, 0, 0, 0, UnitKind::Layer},
      {Part::Gather, true, 0, 0, 0, UnitKind::Experts},
      {Part::Gather, true, 0, 0, 1, UnitKind::Layer},
      {Part::Gather, true, 0, 0, 1, UnitKind::Experts}};
  EXPECT_EQ(steps_of(action_of("gather 0"), layouts[0], false, false), units);
  std::reverse(units.begin(), units.end());
  for (Step& s : units) s.part = Part::Reduce;
  EXPECT_EQ(steps_of(action_of("reduce 0"), layouts[0], false, false), units);
}

// In an overlapped action every dispatch and combine of a paired layer has compute of the other
// micro-batch before the step that waits for it.
TEST(Schedule, OverlapHidesCommunication) {
  const std::vector<ChunkLayers> chunks = {{0, 4, true, false}, {12, 4, false, true}};
  for (const char* action : {"F0.3|B1.2", "F1.3|B0.2", "F1.3|B0.2+"}) {
    const std::vector<Step> steps = steps_of(action_of(action), chunks, false, false);
    int waits = 0, hidden = 0;
    for (size_t i = 0; i < steps.size(); i++) {
      if (steps[i].part != Part::Dispatch && steps[i].part != Part::Combine) continue;
      waits++;
      bool other = false;
      for (size_t j = i + 1; j < steps.size() && !(steps[j].backward == steps[i].backward &&
                                                     steps[j].part != Part::Weights);
           j++)
        other = other || (steps[j].backward != steps[i].backward &&
                             steps[j].part != Part::Dispatch && steps[j].part != Part::Combine);
      hidden += other;
    }
    EXPECT_EQ(waits, 16);
    EXPECT_EQ(hidden, 16) << action;
  }
}

// ---- Collectives of every parallelism ----

TEST(Schedule, CollectivesAreProven) {
  const Mesh meshes[] = {{1, 2, 1, 1}, {1, 1, 2, 1}, {1, 1, 1, 4}, {2, 2, 2, 2}, {2, 4, 1, 2, 2},
      {4, 1, 2, 2}, {4, 2, 1, 1}, {2, 3, 1, 2}};
  for (const Mesh& mesh : meshes)
    for (const ScheduleKind kind : kKinds)
      for (const bool forward_only : {false, true})
        for (const bool gather_layer : {false, true})
          for (int n = 1; n <= (forward_only ? 1 : 2); n++) {
            const ScheduleOptions o{.kind = kind,
                .pp = mesh.pp,
                .micro_batches = 2 * mesh.pp + 3,
                .forward_only = forward_only,
                .weight_grad_batch = n,
                .gather_step = !gather_layer};
            std::vector<ActionList> lists;
            for (int rank = 0; rank < mesh.world(); rank++)
              lists.push_back(make_schedule(o, coord_of(mesh, rank).pp_rank));
            const ScheduleCheck c = check_schedule(o, lists, mesh, 9, gather_layer);
            EXPECT_TRUE(c.ok()) << described(o) << ": " << c.why;
            EXPECT_EQ(c.begin.size(), size_t(mesh.world()));
          }
}

TEST(Schedule, CollectivesOutOfOrderAreRefused) {
  const struct {
    ScheduleKind kind;
    Mesh mesh;
    bool gather_layer;
    int swap[2];  // actions of the last rank's list
    const char* why;
  } cases[] = {
      {ScheduleKind::OneF1B, {1, 1, 1, 2}, false, {1, 2},
          "rank 1, action 1 (F0.1): does not match rank 0, action 1 (F0.0): dispatch of chunk 0, "
          "layer 0, micro-batch 1 against dispatch of chunk 0, layer 0, micro-batch 0"},
      {ScheduleKind::OneF1B, {1, 1, 2, 1}, true, {0, 1},
          "rank 1, action 0 (F0.1): does not match rank 0, action 0 (F0.0): attention of chunk 0, "
          "layer 0, micro-batch 1 against"},
      {ScheduleKind::DualPipeV, {1, 2, 1, 1}, false, {0, 1},
          "rank 1, action 0 (gather 1): does not match rank 0, action 0 (gather 0): gather of "
          "chunk "
          "1, "
          "layer 2, layer against gather of chunk 0, layer -1, embedding"},
  };
  for (const auto& c : cases) {
    const ScheduleOptions o{
        .kind = c.kind, .micro_batches = 2, .forward_only = true, .gather_step = !c.gather_layer};
    std::vector<ActionList> lists(2, make_schedule(o, 0));
    if (c.kind == ScheduleKind::DualPipeV)  // both gathers stand first
      for (ActionList& list : lists) std::swap(list[1], list[2]);
    std::swap(lists[1][c.swap[0]], lists[1][c.swap[1]]);
    EXPECT_TRUE(check_schedule(o, {lists[1]}).ok()) << joined(lists[1]);
    const ScheduleCheck got = check_schedule(o, lists, c.mesh, 4, c.gather_layer);
    EXPECT_NE(got.why.find(c.why), std::string::npos) << got.why;
  }
  // A member whose list differs deadlocks or is found out before it does.
  ScheduleOptions o{.kind = ScheduleKind::DualPipeV, .pp = 2, .micro_batches = 6};
  const Mesh mesh{2, 1, 1, 2};
  std::vector<ActionList> lists;
  for (int rank = 0; rank < 4; rank++) lists.push_back(make_schedule(o, rank / 2));
  ScheduleOptions other = o;
  other.weight_grad_batch = 3;
  lists[3] = make_schedule(other, 1);
  EXPECT_TRUE(check_schedule(o, lists, mesh, 8, false).ok());
  EXPECT_FALSE(check_schedule(o, lists, mesh, 8, true).ok());
}

}  // namespace pith
