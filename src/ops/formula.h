// formula: what an elementwise op computes of one element, on both devices.
#pragma once
#include <bit>

#include "core/check.h"

namespace pith {

// e^x for x <= 0, within 2 ulp; 0 where that is not normal.
constexpr float exp_negative(float x) {
  float low = -87.3f, rounder = 12582912.0f;  // 1.5 * 2^23
  float z = x < low ? low : x;
  float n = (z * 1.44269504f + rounder) - rounder;
  float r = (z - n * 0.693359375f) + n * 2.12194440e-4f;  // z - n ln 2
  float p = 1.0f / 5040;                                  // the series of e^r
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  float power = std::bit_cast<float>((int(n) + 127) << 23);
  return x < low ? 0.0f : p * power;
}
constexpr double exp_negative(double x) { return std::exp(x); }

template <class T>
constexpr T logistic(T x) {
  T e = exp_negative(x < 0 ? x : T(-x));
  return (x < 0 ? e : T(1)) / (1 + e);
}

// Of descending numbers, where NaN is above all.
template <class T>
constexpr bool above(T a, T b) {
  return a > b || (a != a && b == b);
}

enum class Formula : u8 {
  Copy,
  Pass,
  Negate,
  Add,
  Sub,
  Mul,
  MulGradA,
  MulGradB,
  Div,
  DivGradA,
  DivGradB,
  Exp,
  ExpGrad,
  Log,
  LogGrad,
  Sqrt,
  SqrtGrad,
  Tanh,
  TanhGrad,
  Sigmoid,
  SigmoidGrad,
  Softplus,
  SoftplusGrad,
  Relu,
  ReluGrad,
  Clamp,
  ClampGrad,
  Where,
  WhereGradA,
  WhereGradB
};

// Of operands a, b and c and, where it is a gradient, the output's gradient g.
template <class T>
constexpr T evaluate(Formula f, T g, T a, T b, T c) {
  using enum Formula;
  switch (f) {
    case Copy: return a;
    case Pass: return g;
    case Negate: return -g;
    case Add: return a + b;
    case Sub: return a - b;
    case Mul: return a * b;
    case MulGradA: return g * b;
    case MulGradB: return g * a;
    case Div: return a / b;
    case DivGradA: return g / b;
    case DivGradB: return -g * a / (b * b);
    case Exp: return std::exp(a);
    case ExpGrad: return g * std::exp(a);
    case Log: return std::log(a);
    case LogGrad: return g / a;
    case Sqrt: return std::sqrt(a);
    case SqrtGrad: return g / (2 * std::sqrt(a));
    case Tanh: return std::tanh(a);
    case TanhGrad: return g * (1 - std::tanh(a) * std::tanh(a));
    case Sigmoid: return logistic(a);
    case SigmoidGrad: return g * (logistic(a) * (1 - logistic(a)));
    case Softplus: return (a < 0 ? 0 : a) + std::log1p(std::exp(-std::fabs(a)));
    case SoftplusGrad: return g * logistic(a);
    case Relu: return a < 0 ? 0 : a;  // here and in Clamp a NaN stays one
    case ReluGrad: return a > 0 ? g : 0;
    case Clamp: a = a < b ? b : a; return c < a ? c : a;
    case ClampGrad: return a >= b && a <= c ? g : 0;
    case Where: return c != 0 ? a : b;
    case WhereGradA: return c != 0 ? g : 0;
    case WhereGradB: return c != 0 ? 0 : g;
  }
  return 0;
}

}
