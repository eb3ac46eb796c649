// rng: counter-based random numbers (Philox4x32-10; Salmon et al., SC 2011), so that what is drawn
// depends on (seed, name, index) and never on the layout or on who draws.
#pragma once
#include <cstdint>

#include "core/check.h"

namespace pith {

struct PhiloxBlock {
  uint32_t word[4];
};
// The 128 random bits at `counter` of stream `key`.
PhiloxBlock philox(uint64_t key, uint64_t counter);

// Key of a named stream under a seed: XXH3 of the name, seeded.
uint64_t stream_key(uint64_t seed, string_view name);

// Element `index` of stream `key`: uniform in [0, 1), and standard normal (Box-Muller on two of the
// block's words, elements 2i and 2i+1 from one block).
double uniform_at(uint64_t key, uint64_t index);
double normal_at(uint64_t key, uint64_t index);

// The image of `i` under permutation `key` of [0, n): a cycle-walking Feistel network, so that any
// element of a shuffle of any length is had in O(1) time and memory. Requires 0 <= i < n.
uint64_t permute_index(uint64_t key, uint64_t i, uint64_t n);

}  // namespace pith
