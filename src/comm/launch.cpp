#include "comm/launch.h"

#include <unistd.h>

#include <algorithm>
#include <thread>

#include "comm/world.h"
#include "core/allocator.h"
#include "core/process.h"

// Present when linked: OpenBLAS's number of threads is the process's, OpenMP's each thread's own.
extern "C" [[gnu::weak]] void openblas_set_num_threads(int);
extern "C" [[gnu::weak]] void omp_set_num_threads(int);
extern "C" [[gnu::weak]] int omp_get_max_threads();

namespace pith {

// Every group of the mesh once, shared by its members.
static void connect(World& world, vector<Comm>& comms) {
  for (int kind = 0; kind < kGroups; kind++)
    for (int rank = 0; rank < world.mesh.world(); rank++) {
      if (comms[rank].group[kind]) continue;
      GroupState& g = world.groups.emplace_back();
      g.members = group_members(world.mesh, Group(kind), rank);
      const size_t n = g.members.size();
      g.channels.resize(n * n);
      for (size_t i = 0; i < n; i++) {
        comms[g.members[i]].group[kind] = &g;
        comms[g.members[i]].place[kind] = int(i);
      }
    }
}

static void run_rank(World& world, Rank& rank, void (*call)(void*, Rank&), void* fn) {
  rank.status->thread = gettid();
  if (rank.world > 1 && omp_set_num_threads)
    omp_set_num_threads(std::max(1, omp_get_max_threads() / rank.world));
  int code = kExitDone;
  string error;
  try {
    call(fn, rank);
  } catch (const Error& e) {
    code = e.exit_code;
    error = e.what();
  } catch (const std::exception& e) {
    code = kExitFailed;
    error = e.what();
  }
  const std::lock_guard lock(world.mutex);
  if (code == kExitDone) {
    world.ranks[rank.id].finished = true;
  } else if (world.failed_rank < 0) {
    world.failed_rank = rank.id;
    world.exit_code = code;
    world.message = text("rank %d: ", rank.id) + error;
    for (int id = 0; id < rank.world; id++) {
      const Status& s = status_board(id);
      const char* doing = world.ranks[id].finished ? " has ended" : s.waiting[0] ? " waits" : " runs";
      char line[1024];
      world.message += string(line, status_line(line, sizeof line, s, doing));
    }
  }
  world.returned++;
  for (RankState& state : world.ranks) state.changed.notify_all();
  world.over.notify_all();
}

void run_rank_threads(const Mesh& mesh, Device device, const LaunchOptions& options,
                      void (*call)(void*, Rank&), void* fn) {
  const int n = mesh.world();
  if (n > kMaxRanks)
    bad_input("ranks", text("too many in one process (got %d, need at most %d)", n, kMaxRanks),
              "fewer ranks");
  if (n > 1 && openblas_set_num_threads) openblas_set_num_threads(1);
  World world{.mesh = mesh, .ranks = vector<RankState>(n)};
  vector<Allocator> allocators(n);
  vector<Comm> comms(n);
  connect(world, comms);
  vector<Rank> ranks(n);
  for (int id = 0; id < n; id++) {
    comms[id].world = &world;
    comms[id].limit_s = options.startup_limit_s;
    comms[id].limit_after_startup_s = options.limit_s;
    Status& board = status_board(id);
    board = Status{.rank = id};
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
    world.over.wait(lock, [&] { return world.failed_rank >= 0 || world.returned == n; });
    if (world.failed_rank >= 0) {
      // A rank that hangs may hold the locks of stdio.
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
