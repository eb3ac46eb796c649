// rank: everything an op depends on, passed first to each. One a GPU, or one a CPU thread.
#pragma once
#include "core/tensor.h"

namespace pith {

struct Allocator;
struct Tape;
struct Comm;

// Sizes and this rank's coordinates of the mesh axes, outer to inner: (pp, dp, cp, ep).
struct MeshCoord {
  int pp = 1, dp = 1, cp = 1, ep = 1;
  int pp_rank = 0, dp_rank = 0, cp_rank = 0, ep_rank = 0;
};

// What a rank is doing. Other threads and signal handlers read it at any moment: plain words.
struct Status {
  int rank = 0;
  int thread = 0;  // as gettid()
  int step = 0, layer = -1, stage = 0, micro_batch = -1, chunk = 0;
  const char* op = "";     // last op begun
  At at;                   // its caller
  char waiting[160] = "";  // the call in which it waits for others
  void begin(const char* next_op, At caller) {
    op = next_op;
    at = caller;
  }
};

struct Rank {
  int id = 0;  // global rank
  int world = 1;
  MeshCoord mesh;
  Device device = Device::CPU;
  DType compute = DType::F32;  // dtype of activations and gathered weights
  Allocator* allocator = nullptr;
  Tape* tape = nullptr;  // null: nothing is recorded
  Comm* comm = nullptr;  // null: alone
  Status* status = nullptr;
  bool debug = false;  // every op's outputs are checked for NaN and Inf
};

}  // namespace pith
