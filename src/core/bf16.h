// bf16: bfloat16, the upper half of a float.
#pragma once
#include <bit>

#include "core/check.h"
#ifdef __CUDACC__
#include <cuda_bf16.h>
#endif

namespace pith {

struct BF16 {
  u16 bits;
  BF16() = default;
  // To nearest, ties to even.
  constexpr BF16(float x) : bits(0) {
#ifdef __CUDA_ARCH__
    bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
    u32 b = std::bit_cast<u32>(x);
    bits = x == x ? u16((b + 0x7fff + (b >> 16 & 1)) >> 16) : u16(0x7fc0);
#endif
  }
  constexpr BF16& operator+=(float x) { return *this = BF16(float(*this) + x); }
  constexpr BF16& operator*=(float x) { return *this = BF16(float(*this) * x); }
  constexpr BF16& operator/=(float x) { return *this = BF16(float(*this) / x); }
  constexpr operator float() const { return std::bit_cast<float>(u32(bits) << 16); }
};

}
