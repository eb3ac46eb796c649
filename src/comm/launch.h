// launch: runs one function on every rank of a mesh, a thread each, and ends them together.
// defines: LaunchOptions, run_ranks, end_startup
#pragma once
#include "comm/communicator.h"

namespace pith {

struct LaunchOptions {
  double startup_limit_s = 600;  // longest wait for other ranks, until end_startup
  double limit_s = 120;          // and after it
  // The program's policy: on failure print one message and leave the process at once, without
  // destructors, which must not run beside ranks that hang. Otherwise run_ranks joins all ranks
  // and throws the message as Error; that needs every rank to return or to wait for another.
  bool exit_on_failure = false;
  DType compute = DType::F32;
  bool debug = false;
};

// From here on this rank waits for others at most LaunchOptions::limit_s: its first step is over.
void end_startup(Rank& rank);

void run_rank_threads(const Mesh& mesh, Device device, const LaunchOptions& options,
                      void (*call)(void*, Rank&), void* fn);

// Calls fn(Rank&) on mesh.world() threads, with an allocator, a status board and a Comm each;
// tensors made in it must not outlive the call. Returns when all have returned. The first exception
// wins: every other rank is woken from its wait, and the error names the rank that failed, where it
// was, and what each other rank was doing.
template <class Fn>
void run_ranks(const Mesh& mesh, Device device, const LaunchOptions& options, Fn&& fn) {
  run_rank_threads(
      mesh, device, options,
      [](void* f, Rank& rank) { (*static_cast<std::remove_reference_t<Fn>*>(f))(rank); }, &fn);
}

}  // namespace pith
