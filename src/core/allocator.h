// allocator: where a rank's tensors live, and how many bytes of each kind are out.
#pragma once
#include <cstdint>

#include "core/tensor.h"

namespace pith {

constexpr int kMemoryKinds = 5;
const char* name_of(MemoryKind kind);

// One a rank. On the CPU a block is 64-byte aligned malloc memory; blocks may be released by
// another thread than the one that took them.
struct Allocator {
  Device device = Device::CPU;
  MemoryKind kind = MemoryKind::Activations;  // what the next allocations are counted as
  int64_t live_bytes[kMemoryKinds] = {};
  int64_t peak_bytes = 0;  // of the sum over kinds, since reset_peak

  Storage* allocate(int64_t bytes, At at);
  int64_t live_total() const;
  void reset_peak();
};

}  // namespace pith
