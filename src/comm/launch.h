#pragma once
#include "comm/communicator.h"

namespace pith {

struct LaunchOptions {
  double startup_limit_s = 600;  // of a wait, until end_startup
  double limit_s = 120;
  // Ranks may hang: print a failure and leave at once; else throw it when all have returned.
  bool exit_on_failure = false;
  DType compute = DType::F32;
  bool debug = false;
};

void end_startup(Rank& rank);

void run_rank_threads(const Mesh& mesh, Device device, const LaunchOptions& options,
    void (*call)(void*, Rank&), void* fn);

// fn(Rank&) on a thread a rank. The first exception wakes all who wait.
template <class Fn>
void run_ranks(const Mesh& mesh, Device device, const LaunchOptions& options, Fn&& fn) {
  run_rank_threads(
      mesh, device, options,
      [](void* f, Rank& rank) { (*static_cast<std::remove_reference_t<Fn>*>(f))(rank); }, &fn);
}

}
