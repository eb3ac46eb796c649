#include "core/rng.h"

#include <xxhash.h>

namespace pith {

u64 stream_key(u64 seed, string_view name) {
  return XXH3_64bits_withSeed(name.data(), name.size(), seed);
}

u64 permute_index(u64 key, u64 i, u64 n) {
  if (i >= n) failed("permute_index", text("index %lu (need < %lu)", i, n));
  // A Feistel network over at least n values, walking on outside [0, n).
  int half_bits = 1;
  while ((1ull << 2 * half_bits) < n) half_bits++;
  u64 mask = (1ull << half_bits) - 1;
  do {
    u64 left = i >> half_bits, right = i & mask;
    for (u64 round = 0; round < 6; round++) {
      const RandomWords b = philox(key, right | round << 56);
      u64 next = (left ^ b[0]) & mask;
      left = right;
      right = next;
    }
    i = left << half_bits | right;
  } while (i >= n);
  return i;
}

}
