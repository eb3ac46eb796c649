#include "core/rng.h"

#include <xxhash.h>

#include <cmath>
#include <numbers>

namespace pith {

struct PhiloxBlock {
  uint32_t word[4];
};

static PhiloxBlock philox(uint64_t key, uint64_t counter) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  uint32_t c[4] = {uint32_t(counter), uint32_t(counter >> 32), 0, 0};
  for (int round = 0; round < 10; round++) {
    const uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    const uint32_t next[4] = {uint32_t(b >> 32) ^ c[1] ^ k0, uint32_t(b),
                              uint32_t(a >> 32) ^ c[3] ^ k1, uint32_t(a)};
    for (int i = 0; i < 4; i++) c[i] = next[i];
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c[0], c[1], c[2], c[3]}};
}

uint64_t stream_key(uint64_t seed, string_view name) {
  return XXH3_64bits_withSeed(name.data(), name.size(), seed);
}

static double unit(uint32_t hi, uint32_t lo) {
  return double((uint64_t(hi) << 32 | lo) >> 11) * 0x1.0p-53;
}

double uniform_at(uint64_t key, uint64_t index) {
  const PhiloxBlock b = philox(key, index / 2);
  return index % 2 ? unit(b.word[2], b.word[3]) : unit(b.word[0], b.word[1]);
}

// Box-Muller; 2i and 2i + 1 are of one block.
double normal_at(uint64_t key, uint64_t index) {
  const PhiloxBlock b = philox(key, index / 2);
  const double radius = std::sqrt(-2.0 * std::log(1.0 - unit(b.word[0], b.word[1])));
  const double angle = 2.0 * std::numbers::pi * unit(b.word[2], b.word[3]);
  return radius * (index % 2 ? std::sin(angle) : std::cos(angle));
}

uint64_t permute_index(uint64_t key, uint64_t i, uint64_t n) {
  if (i >= n) failed("permute_index", text("index %lu (need < %lu)", i, n));
  // A Feistel network over at least n values; outside [0, n) one walks on along the cycle.
  int half_bits = 1;
  while ((1ull << 2 * half_bits) < n) half_bits++;
  const uint64_t mask = (1ull << half_bits) - 1;
  do {
    uint64_t left = i >> half_bits, right = i & mask;
    for (uint64_t round = 0; round < 6; round++) {
      const PhiloxBlock b = philox(key, right | round << 56);
      const uint64_t next = (left ^ b.word[0]) & mask;
      left = right;
      right = next;
    }
    i = left << half_bits | right;
  } while (i >= n);
  return i;
}

}  // namespace pith
