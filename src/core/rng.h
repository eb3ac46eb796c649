// rng: random numbers of (seed, name, index): Philox4x32-10 (Salmon et al., SC 2011).
#pragma once
#include "core/check.h"

namespace pith {

u64 stream_key(u64 seed, string_view name);

// Uniform in [0, 1), and standard normal.
double uniform_at(u64 key, u64 index);
double normal_at(u64 key, u64 index);

// The image of `i` under permutation `key` of [0, n).
u64 permute_index(u64 key, u64 i, u64 n);

}
