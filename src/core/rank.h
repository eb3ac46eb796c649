// rank: everything an op depends on, passed first to each. One a GPU, or one a CPU thread.
#pragma once
#include "core/tensor.h"

namespace pith {

struct Allocator;
struct Tape;
struct Comm;  // comm/communicator.h

// Sizes and this rank's coordinates of the mesh axes, outer to inner: (pp, dp, cp, ep).
struct MeshCoord {
  int pp = 1, dp = 1, cp = 1, ep = 1;
  int pp_rank = 0, dp_rank = 0, cp_rank = 0, ep_rank = 0;
};

// What a rank is doing, for error messages, the watchdog and the crash handler, which read it from
// other threads and from signal handlers: plain words, written by the rank alone.
struct Status {
  int rank = 0;
  int step = 0, layer = -1, stage = 0, micro_batch = -1, chunk = 0;
  const char* op = "";    // last op begun
  const char* file = "";  // its caller
  int line = 0;
  const char* waiting = "";  // collective it waits in; empty when running
};

struct Rank {
  int id = 0;  // global rank
  int world = 1;
  MeshCoord mesh;
  Device device = Device::CPU;
  DType compute = DType::F32;  // dtype of activations and gathered weights
  Allocator* allocator = nullptr;
  Tape* tape = nullptr;      // null: nothing is recorded
  Comm* comm = nullptr;      // null in a world of one that needs no communication
  Status* status = nullptr;  // never null once the rank runs (core/process.h)
  bool debug = false;        // PITH_DEBUG=1: every op's outputs are checked for NaN and Inf
};

}  // namespace pith
