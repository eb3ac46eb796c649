// allocator: where a rank's tensors live, and how many bytes are out.
#pragma once
#include <cstdint>

#include "core/tensor.h"

namespace pith {

// Blocks are 64-byte aligned and may be released by another thread than the one that took them.
struct Allocator {
  int64_t live_bytes = 0;
  int64_t peak_bytes = 0;  // since reset_peak

  Storage* allocate(int64_t bytes, At at);
  void reset_peak();
};

}  // namespace pith
