// cpu_rows: loops over the elements of a row that the compiler turns into vector instructions, with
// one order of summation whatever the vector width. defines: exp_negative, logistic, lane_fold,
// lane_sum, dot, max_of, exp_sum, Slot
#pragma once
#include <bit>
#include <cmath>
#include <limits>

#include "core/tape.h"

namespace pith {

// e^x for x <= 0, within 2 ulp; 0 below -87.3, where the result would no longer be normal.
inline float exp_negative(float x) {
  const float low = -87.3f, rounder = 12582912.0f;  // 1.5 * 2^23
  const float z = x < low ? low : x;
  const float n = (z * 1.44269504f + rounder) - rounder;
  const float r = (z - n * 0.693359375f) + n * 2.12194440e-4f;  // z - n ln 2
  float p = 1.0f / 5040;                                        // the series of e^r
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const float power = std::bit_cast<float>((int32_t(n) + 127) << 23);
  return x < low ? 0.0f : p * power;
}
inline double exp_negative(double x) { return std::exp(x); }

// 1 / (1 + e^-x)
template <class T>
T logistic(T x) {
  const T e = exp_negative(x < 0 ? x : -x);
  return (x < 0 ? e : 1) / (1 + e);
}

constexpr int kLanes = 16;

// start joined with f(i) for i in [0, n): in sixteen interleaved lanes, then these.
template <class T, class F, class Join>
T lane_fold(int64_t n, T start, F&& f, Join&& join) {
  T lane[kLanes];
  for (T& x : lane) x = start;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; j++) lane[j] = join(lane[j], f(i + j));
  for (int j = 0; i < n; i++, j++) lane[j] = join(lane[j], f(i));
  for (int half = kLanes / 2; half; half /= 2)
    for (int j = 0; j < half; j++) lane[j] = join(lane[j], lane[j + half]);
  return lane[0];
}

template <class T, class F>
T lane_sum(int64_t n, F&& f) {
  return lane_fold(n, T(0), f, [](T a, T b) { return a + b; });
}

template <class T>
T dot(const T* a, const T* b, int64_t n) {
  return lane_sum<T>(n, [&](int64_t i) { return a[i] * b[i]; });
}

// The largest of x, -inf when n = 0; NaNs are passed over.
template <class T>
T max_of(const T* x, int64_t n) {
  return lane_fold(
      n, -std::numeric_limits<T>::infinity(), [x](int64_t i) { return x[i]; },
      [](T a, T b) { return b > a ? b : a; });
}

// x = e^(x - shift), shift >= every x up to rounding; the sum.
template <class T>
T exp_sum(T* x, int64_t n, T shift) {
  return lane_sum<T>(n, [&](int64_t i) { return x[i] = exp_negative(x[i] - shift); });
}

// What to write to and whether to add, of a gradient that may not be wanted: then data is null.
template <class T>
struct Slot {
  T* data = nullptr;
  bool add = false;
  void put(int64_t i, T value) const { data[i] = add ? data[i] + value : value; }
};

}  // namespace pith
