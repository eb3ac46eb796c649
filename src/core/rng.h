#pragma once
#include <numbers>

#include "core/check.h"

namespace pith {

u64 stream_key(u64 seed, string_view name);

// Philox4x32-10.  Salmon et al., SC 2011
struct RandomWords {
  u32 word[4];
  constexpr u32 operator[](int i) const { return word[i]; }
};
constexpr RandomWords philox(u64 key, u64 counter) {
  u32 k0 = u32(key), k1 = u32(key >> 32);
  RandomWords c = {{u32(counter), u32(counter >> 32), 0, 0}};
  for (int round = 0; round < 10; round++) {
    u64 a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    c = {{u32(b >> 32) ^ c[1] ^ k0, u32(b), u32(a >> 32) ^ c[3] ^ k1, u32(a)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// In [0, 1).
constexpr double unit(u32 hi, u32 lo) { return double((u64(hi) << 32 | lo) >> 11) * 0x1.0p-53; }
constexpr double uniform_at(u64 key, u64 index) {
  const RandomWords b = philox(key, index / 2);
  return index % 2 ? unit(b[2], b[3]) : unit(b[0], b[1]);
}
// Standard normal, by Box-Muller.
constexpr double normal_at(u64 key, u64 index) {
  const RandomWords b = philox(key, index / 2);
  double radius = std::sqrt(-2.0 * std::log(1.0 - unit(b[0], b[1])));
  double angle = 2.0 * std::numbers::pi * unit(b[2], b[3]);
  return radius * (index % 2 ? std::sin(angle) : std::cos(angle));
}

// The image of `i` under permutation `key` of [0, n).
u64 permute_index(u64 key, u64 i, u64 n);

}
