#include "core/rng.h"

#include <xxhash.h>

#include <array>
#include <numbers>

namespace pith {

using Words = std::array<u32, 4>;

static Words philox(u64 key, u64 counter) {
  u32 k0 = u32(key), k1 = u32(key >> 32);
  Words c = {u32(counter), u32(counter >> 32)};
  for (int round = 0; round < 10; round++) {
    const u64 a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    c = {u32(b >> 32) ^ c[1] ^ k0, u32(b), u32(a >> 32) ^ c[3] ^ k1, u32(a)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

u64 stream_key(u64 seed, string_view name) {
  return XXH3_64bits_withSeed(name.data(), name.size(), seed);
}

static double unit(u32 hi, u32 lo) { return double((u64(hi) << 32 | lo) >> 11) * 0x1.0p-53; }

double uniform_at(u64 key, u64 index) {
  const Words b = philox(key, index / 2);
  return index % 2 ? unit(b[2], b[3]) : unit(b[0], b[1]);
}

// Box-Muller.
double normal_at(u64 key, u64 index) {
  const Words b = philox(key, index / 2);
  const double radius = std::sqrt(-2.0 * std::log(1.0 - unit(b[0], b[1])));
  const double angle = 2.0 * std::numbers::pi * unit(b[2], b[3]);
  return radius * (index % 2 ? std::sin(angle) : std::cos(angle));
}

u64 permute_index(u64 key, u64 i, u64 n) {
  if (i >= n) failed("permute_index", text("index %lu (need < %lu)", i, n));
  // A Feistel network over at least n values; outside [0, n) one walks on along the cycle.
  int half_bits = 1;
  while ((1ull << 2 * half_bits) < n) half_bits++;
  const u64 mask = (1ull << half_bits) - 1;
  do {
    u64 left = i >> half_bits, right = i & mask;
    for (u64 round = 0; round < 6; round++) {
      const Words b = philox(key, right | round << 56);
      const u64 next = (left ^ b[0]) & mask;
      left = right;
      right = next;
    }
    i = left << half_bits | right;
  } while (i >= n);
  return i;
}

}
