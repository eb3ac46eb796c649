// One rank of a training step fails: the process ends, soon, with one message that says where
// everyone was. Each case runs in a process of its own, under the program's policy.
#include <unistd.h>

#include <csignal>

#include "comm/launch.h"
#include "core/log.h"
#include "core/process.h"
#include "engine/batches.h"
#include "engine/child.h"
#include "engine/small_run.h"
#include "layouts/layouts.h"

namespace pith {
namespace {

constexpr int kFaulty = 2;
constexpr double kLimit = 2;  // seconds

// Returns when all other ranks wait for another and stay so, as they must in the end: what they
// need is not sent. Before that some wait for a moment only.
[[gnu::no_sanitize("thread")]] void until_others_wait(const Rank& rank) {
  for (int still_ms = 0; still_ms < 100; still_ms++) {
    usleep(1000);
    for (int id = 0; id < rank.world; id++)
      if (id != rank.id && !__atomic_load_n(status_board(id).waiting, __ATOMIC_RELAXED))
        still_ms = -1;
  }
}

// Ranks of a pp2-dp1-cp1-ep2 mesh run a step; rank kFaulty runs a part of it, then fails.
void run_step(const std::string& how) {
  const SmallModel model{.layers = 4, .global_batch = 16, .documents = 60};
  const RunPlan plan = plan_layout(small_run(model), {.pp = 2, .ep = 2});
  const Dataset data = open_data(plan);
  const LaunchOptions launch{.startup_limit_s = 60, .limit_s = kLimit, .exit_on_failure = true};
  install_signal_handlers();
  run_ranks(plan.mesh, Device::CPU, launch, [&](Rank& rank) {
    Instance instance = make_instance(rank, plan.model, plan.pipeline);
    initialize(rank, *instance.parameters, 1);
    LoadedBatches loaded = make_batches(rank, data, plan.batch, 0, Split::Train);
    StepIo io;
    io.batches = std::move(loaded.batches);
    ActionList actions = make_schedule(plan.schedule, rank.mesh.pp_rank);
    rank.status->step = 1;
    barrier(rank, Group::World, "start");
    end_startup(rank);
    if (rank.id == kFaulty) actions.resize(actions.size() / 2);
    run_actions(rank, instance, io, plan.schedule, actions);
    if (rank.id == kFaulty) {
      until_others_wait(rank);
      if (how == "throw") failed("optimizer", "planted");
      if (how == "crash") raise(SIGSEGV);
      while (how == "hang") pause();
    }
    barrier(rank, Group::World, "end of the step");
  });
}

size_t count(const std::string& text, const std::string& part) {
  size_t n = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) n++;
  return n;
}

struct Failure {
  const char* how;
  const char* begins;  // the message
  const char* place;   // what follows the faulty rank's number
};

class RankFails : public testing::TestWithParam<Failure> {};

TEST_P(RankFails, EndsTheProcessWithOneMessage) {
  if (!child_role().empty()) return run_step(child_role());
  const Failure& f = GetParam();
  const Child child = run_child(f.how);
  EXPECT_EQ(child.exit_code, kExitFailed) << child.output;
  EXPECT_LT(child.seconds, 10 + kLimit);
  EXPECT_EQ(count(child.output, "error: "), 1u) << child.output;
  EXPECT_NE(child.output.find(f.begins), std::string::npos) << child.output;
  // Its board: what it did last, of which layer and micro-batch, called from where.
  const size_t at = child.output.find(text("\n  rank %d%s", kFaulty, f.place));
  ASSERT_NE(at, std::string::npos) << child.output;
  const std::string line = child.output.substr(at + 1, child.output.find('\n', at + 1) - at - 1);
  for (const char* part : {"step 1", "layer ", "stage ", "micro-batch ", "last op ", ".h:"})
    EXPECT_NE(line.find(part), std::string::npos) << line << "\nneed: " << part;
  // Its pipeline neighbour waits for its message, and sooner or later all others do for each
  // other.
  for (int rank = 0; rank < 4; rank++)
    EXPECT_EQ(count(child.output, text("\n  rank %d", rank)), 1u) << child.output;
  EXPECT_GE(count(child.output, "pipeline transfer"), 1u) << child.output;
  EXPECT_GE(count(child.output, " waits in ") + count(child.output, ", waiting in "), 3u)
      << child.output;
}

INSTANTIATE_TEST_SUITE_P(Failure, RankFails,
    testing::Values(Failure{"throw", "error: rank 2: optimizer: planted", " runs"},
        Failure{"crash", "error: crash: signal 11 (Segmentation fault)", " (crashed here)"},
        Failure{"hang", " waited 2", " runs"}),
    [](const auto& test) { return test.param.how; });

}  // namespace
}  // namespace pith
