// launch: runs one function on every rank of a mesh, a thread each, and ends them together.
#pragma once
#include "comm/communicator.h"

namespace pith {

struct LaunchOptions {
  double startup_limit_s = 600;  // longest wait for other ranks, until end_startup
  double limit_s = 120;          // and after it
  // On failure print one message and leave at once, without destructors, which must not run beside
  // ranks that hang. Otherwise run_ranks throws it, when every rank has returned.
  bool exit_on_failure = false;
  DType compute = DType::F32;
  bool debug = false;
};

void end_startup(Rank& rank);

void run_rank_threads(const Mesh& mesh, Device device, const LaunchOptions& options,
                      void (*call)(void*, Rank&), void* fn);

// Calls fn(Rank&) on mesh.world() threads; tensors made in it must not outlive the call. The first
// exception wakes every rank from its wait; the error tells what each was doing.
template <class Fn>
void run_ranks(const Mesh& mesh, Device device, const LaunchOptions& options, Fn&& fn) {
  run_rank_threads(
      mesh, device, options,
      [](void* f, Rank& rank) { (*static_cast<std::remove_reference_t<Fn>*>(f))(rank); }, &fn);
}

}  // namespace pith
