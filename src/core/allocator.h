#pragma once
#include "core/tensor.h"

namespace pith {

// Of one rank. Blocks are 64-byte aligned; another thread may release them.
struct Allocator {
  int64_t live_bytes = 0;
  int64_t peak_bytes = 0;  // since reset_peak

  Storage* allocate(int64_t bytes, At at);
  void reset_peak();
};

}  // namespace pith
