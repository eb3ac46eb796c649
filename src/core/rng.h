// rng: counter-based random numbers (Philox4x32-10; Salmon et al., SC 2011), of (seed, name,
// index).
#pragma once
#include "core/check.h"

namespace pith {

uint64_t stream_key(uint64_t seed, string_view name);

// Uniform in [0, 1), and standard normal.
double uniform_at(uint64_t key, uint64_t index);
double normal_at(uint64_t key, uint64_t index);

// The image of `i` under permutation `key` of [0, n), in O(1).
uint64_t permute_index(uint64_t key, uint64_t i, uint64_t n);

}  // namespace pith
