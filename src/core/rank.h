// rank: everything an op depends on, passed first to each.
#pragma once
#include "core/tensor.h"

namespace pith {

struct Tape;
struct Comm;
struct Cuda;

// Blocks are 64-byte aligned; another thread may release them.
struct Allocator {
  Cuda* cuda = nullptr;  // of device memory
  i64 live_bytes = 0, peak_bytes = 0;
  MemoryUse use = MemoryUse::Workspace;                      // of what is allocated next
  i64 live_of[kMemoryUses] = {}, peak_of[kMemoryUses] = {};  // peak_of: at the peak of all
  Storage* allocate(i64 bytes, At at);
  void reset_peak() { peak_bytes = __atomic_load_n(&live_bytes, __ATOMIC_RELAXED); }
};
// "weights 9.28 GiB, gradients ..."
string describe_memory(const i64* bytes_of);

struct MeshCoord {
  int pp = 1, dp = 1, cp = 1, ep = 1;
  int pp_rank = 0, dp_rank = 0, cp_rank = 0, ep_rank = 0;
};

// What a rank is doing; other threads and signal handlers read it at any moment.
struct Status {
  int rank = 0;
  int thread = 0;
  int step = 0, layer = -1, stage = 0, micro_batch = -1, chunk = 0;
  const char* op = "";
  At at;
  char waiting[160] = "";
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
  DType compute = DType::F32;  // of activations and gathered weights
  Allocator* allocator = nullptr;
  Tape* tape = nullptr;
  Comm* comm = nullptr;  // null: alone
  Status* status = nullptr;
  bool debug = false;  // PITH_DEBUG=1
};

// What is allocated meanwhile is for `use`.
struct AllocatesFor {
  Allocator& allocator;
  MemoryUse before;
  AllocatesFor(const Rank& rank, MemoryUse use)
      : allocator(*rank.allocator), before(std::exchange(allocator.use, use)) {}
  ~AllocatesFor() { allocator.use = before; }
};

}
