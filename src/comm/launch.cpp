#include "comm/launch.h"

#include <unistd.h>

#include <algorithm>
#include <thread>

#include "comm/world.h"
#include "core/allocator.h"
#include "core/process.h"

// Present when the program is linked with OpenBLAS, whose threads are global to the process, and
// with OpenMP, whose number of threads is each thread's own.
extern "C" [[gnu::weak]] void openblas_set_num_threads(int);
extern "C" [[gnu::weak]] void omp_set_num_threads(int);
extern "C" [[gnu::weak]] int omp_get_max_threads();

namespace pith {

// Copies a board that its rank may be writing: fields can be of different moments, each is whole.
[[gnu::no_sanitize("thread")]] static Status read_board(const Status& board) {
  Status s;
  s.step = __atomic_load_n(&board.step, __ATOMIC_RELAXED);
  s.layer = __atomic_load_n(&board.layer, __ATOMIC_RELAXED);
  s.stage = __atomic_load_n(&board.stage, __ATOMIC_RELAXED);
  s.micro_batch = __atomic_load_n(&board.micro_batch, __ATOMIC_RELAXED);
  s.op = __atomic_load_n(&board.op, __ATOMIC_RELAXED);
  s.file = __atomic_load_n(&board.file, __ATOMIC_RELAXED);
  s.line = __atomic_load_n(&board.line, __ATOMIC_RELAXED);
  return s;
}

// "rank 3 waits in all_gather "weights" (dp*cp group) called at fsdp.cpp:40; step 2, ...".
static string state_of(const World& world, int rank) {
  const RankState& state = world.ranks[rank];
  if (state.finished) return text("rank %d has ended", rank);
  const Status s = read_board(*state.board);
  string doing = text("rank %d runs, no op yet", rank);
  if (state.waits)
    doing =
        text("rank %d waits in %s \"%s\" (%s group) called at %s:%d", rank, state.call.op,
             state.call.what, name_of(state.call.group), state.call.at.file, state.call.at.line);
  else if (s.op[0])
    doing = text("rank %d runs, last op %s called at %s:%d", rank, s.op, s.file, s.line);
  doing += text("; step %d", s.step);
  if (s.layer >= 0) doing += text(", layer %d, stage %d", s.layer, s.stage);
  if (s.micro_batch >= 0) doing += text(", micro-batch %d", s.micro_batch);
  return doing;
}

// Records that `rank` failed, unless another did before, with what every rank was doing, and wakes
// all who wait. The caller holds world.mutex.
static void fail_world(World& world, int rank, int exit_code, const string& what) {
  if (world.failed_rank >= 0) return;
  world.failed_rank = rank;
  world.exit_code = exit_code;
  world.message = text("rank %d: ", rank) + what;
  for (size_t r = 0; r < world.ranks.size(); r++) world.message += "\n  " + state_of(world, int(r));
  for (auto& group : world.groups) group->changed.notify_all();
  world.over.notify_all();
}

// Every distinct group of the mesh once, shared by its members.
static void connect(World& world, vector<Comm>& comms) {
  for (int kind = 0; kind < kGroups; kind++)
    for (int rank = 0; rank < world.mesh.world(); rank++) {
      if (comms[rank].group[kind]) continue;
      GroupState& g = *world.groups.emplace_back(std::make_unique<GroupState>());
      g.members = group_members(world.mesh, static_cast<Group>(kind), rank);
      g.here.assign(g.members.size(), 0);
      for (auto& slots : g.slots) slots.resize(g.members.size());
      for (size_t i = 0; i < g.members.size(); i++) {
        comms[g.members[i]].group[kind] = &g;
        comms[g.members[i]].place[kind] = int(i);
      }
    }
}

static void run_rank(World& world, Rank& rank, void (*call)(void*, Rank&), void* fn) {
  set_thread_status(rank.status);
  if (rank.world > 1 && omp_set_num_threads)
    omp_set_num_threads(std::max(1, omp_get_max_threads() / rank.world));
  int code = kExitFailed;
  string error;
  bool threw = true;
  try {
    call(fn, rank);
    threw = false;
  } catch (const Error& e) {
    code = e.exit_code;
    error = e.what();
  } catch (const std::exception& e) {
    error = e.what();
  } catch (...) {
    error = "an exception of unknown type";
  }
  const std::lock_guard lock(world.mutex);
  if (threw) {
    fail_world(world, rank.id, code, error);
  } else {
    world.ranks[rank.id].finished = true;
    for (auto& group : world.groups) group->changed.notify_all();
  }
  world.finished++;
  world.over.notify_all();
}

void run_rank_threads(const Mesh& mesh, Device device, const LaunchOptions& options,
                      void (*call)(void*, Rank&), void* fn) {
  const int n = mesh.world();
  if (n > kMaxRanks)
    bad_input("ranks", text("too many in one process (got %d, need at most %d)", n, kMaxRanks),
              "fewer ranks");
  if (n > 1 && openblas_set_num_threads) openblas_set_num_threads(1);
  vector<Allocator> allocators(n);  // outlive the messages that nobody received
  World world;
  world.mesh = mesh;
  world.ranks.resize(n);
  vector<Comm> comms(n);
  connect(world, comms);
  vector<Rank> ranks(n);
  for (int id = 0; id < n; id++) {
    comms[id].world = &world;
    comms[id].limit_s = options.startup_limit_s;
    comms[id].limit_after_startup_s = options.limit_s;
    allocators[id].device = device;
    Status& board = status_board(id);
    board = Status{.rank = id};
    world.ranks[id].board = &board;
    ranks[id] = {.id = id,
                 .world = n,
                 .mesh = coord_of(mesh, id),
                 .device = device,
                 .compute = options.compute,
                 .allocator = &allocators[id],
                 .comm = &comms[id],
                 .status = &board,
                 .debug = options.debug};
  }
  vector<std::thread> threads;
  for (int id = 0; id < n; id++)
    threads.emplace_back([&, id] { run_rank(world, ranks[id], call, fn); });
  if (options.exit_on_failure) {
    std::unique_lock lock(world.mutex);
    world.over.wait(lock, [&] { return world.failed_rank >= 0 || world.finished == n; });
    if (world.failed_rank >= 0) {
      // Not through stdio, whose locks a rank that hangs may hold.
      const string line = "error: " + world.message + "\n";
      if (write(2, line.data(), line.size()) < 0) _exit(kExitFailed);
      _exit(world.exit_code);
    }
  }
  for (std::thread& thread : threads) thread.join();
  if (world.failed_rank >= 0) throw Error(world.exit_code, world.message);
}

void end_startup(Rank& rank) {
  if (rank.comm) rank.comm->limit_s = rank.comm->limit_after_startup_s;
}

}  // namespace pith
