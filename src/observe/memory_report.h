// memory_report: what each rank will allocate, by kind, told before anything is allocated.
#pragma once
#include "core/check.h"

namespace pith {

// Bytes of one rank.
struct RankMemory {
  int64_t weights = 0;       // F32 master shard
  int64_t compute_copy = 0;  // gathered weights, where they are not the master itself
  int64_t gradients = 0;     // full accumulators and reduced shard
  int64_t optimizer = 0;
  int64_t activations = 0;  // estimate: of all micro-batches in flight
  int64_t workspace = 0;    // estimate: temporaries and buffers
  int64_t total() const {
    return weights + compute_copy + gradients + optimizer + activations + workspace;
  }
};

string memory_table(const vector<RankMemory>& ranks);
// [{"rank": 0, "weights": 1, ..., "total": 9}, ...]
string memory_json(const vector<RankMemory>& ranks);

}  // namespace pith
