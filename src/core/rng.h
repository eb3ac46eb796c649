// rng: counter-based random numbers (Philox4x32-10; Salmon et al., SC 2011): what is drawn depends
// on (seed, name, index), never on the layout or on who draws.
#pragma once
#include <cstdint>

#include "core/check.h"

namespace pith {

// Key of a named stream under a seed.
uint64_t stream_key(uint64_t seed, string_view name);

// Element `index` of stream `key`: uniform in [0, 1), and standard normal.
double uniform_at(uint64_t key, uint64_t index);
double normal_at(uint64_t key, uint64_t index);

// The image of `i` under permutation `key` of [0, n), in O(1) time and memory.
uint64_t permute_index(uint64_t key, uint64_t i, uint64_t n);

}  // namespace pith
