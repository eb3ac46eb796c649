// memory_report: what each rank will allocate, by kind, told before anything is allocated.
// defines: RankMemory, memory_table, memory_json
#pragma once
#include <cstdint>

#include "core/check.h"

namespace pith {

// Bytes of one rank.
struct RankMemory {
  int64_t weights = 0;       // F32 master shard
  int64_t compute_copy = 0;  // gathered weights in the compute dtype, where not the master itself
  int64_t gradients = 0;     // full accumulators and reduced shard
  int64_t optimizer = 0;     // moments
  int64_t activations = 0;   // estimate: kept for the backward by all micro-batches in flight
  int64_t workspace = 0;     // estimate: temporaries, dispatch and collective buffers
  int64_t total() const {
    return weights + compute_copy + gradients + optimizer + activations + workspace;
  }
  bool operator==(const RankMemory&) const = default;
};

// A table with a line for each run of equal ranks ("0-7"); where `available` bytes a rank are
// given (0: unknown), with the share of them.
string memory_table(const vector<RankMemory>& ranks, int64_t available);
// [{"rank": 0, "weights": 1, ..., "total": 9}, ...]
string memory_json(const vector<RankMemory>& ranks);

}  // namespace pith
