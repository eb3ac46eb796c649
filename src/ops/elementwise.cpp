// elementwise: one loop for all.
//   in     f32|f64, all inputs alike; mask u8
//   grad   the formula, summed over the dimensions in which the input was repeated
//   errors shapes that do not broadcast; dtypes or devices differ; mask not u8; clamp low > high
//   bitwise run-to-run: yes, for any number of threads
#include <algorithm>
#include <cmath>

#include "ops/cpu.h"

namespace pith {
namespace {

// Bit k of a, b or c: input k's gradient reads that operand. Operands that are no inputs are
// scalars.
struct Reads {
  unsigned a = 0, b = 0, c = 0;
  double scalar[3] = {};
};

// out (+)= f(first..., operands), an undefined operand being its scalar.
template <class T, class F, class... First>
void apply_cpu(const Tensor& out, bool add, const TensorList& x, const double* scalar, F f,
               const First&... first) {
  T number[3];
  View in[3];
  for (int k = 0; k < 3; k++) {
    number[k] = T(scalar[k]);
    in[k] = view_of(x[k], out.dim);
    if (!x[k].defined()) in[k].x.data = reinterpret_cast<char*>(&number[k]);
  }
  elementwise<T>(out.dim, view_of(out), add, f, view_of(first)..., in[0], in[1], in[2]);
}

// Input k's gradient, f(dy, a, b, c): whole, then summed where the input was repeated.
template <class T, class F>
void operand_grad(Backward<T> b, int k, F f) {
  const GradSlot d = b.slot(k);
  if (!d.grad.defined()) return;
  const bool repeated = d.grad.numel() != b.dy().numel();
  Tensor whole = repeated ? b.op().like(b.dy()) : d.grad;
  whole.dim = b.dy().dim;
  apply_cpu<T>(whole, d.add && !repeated, b.keep, b.node.f, f, b.dy());
  if (repeated) sum_to<T>(b.op(), whole, d);
}

// y = value(a, b, c), and the gradient(dy, a, b, c) of each input that may have one.
template <class Value, class... Grad>
Tensor apply(const Op& op, const TensorList& in, const Reads& reads, Value value, Grad...) {
  const Tensor &a = in[0], &b = in[in.count > 1], &c = in[in.count > 2 ? 2 : 0];
  op.check_alike({&a, &b});
  Tensor y = op.empty(op.broadcast({&a, &b, &c}), a.dtype);
  op.on_cpu(a, [&]<class T>(T*) {
    apply_cpu<T>(y, false, in, reads.scalar, [=](T u, T v, T w) -> T { return value(u, v, w); });
  });
  const auto kept = [&](unsigned inputs, const Tensor& x) {
    bool needed = false;
    for (int k = 0; k < in.count; k++) needed |= (inputs >> k & 1) && in[k].needs_grad();
    return needed ? x : Tensor{};
  };
  const double* p = reads.scalar;
  record(op, {in[0], in[1], in[2]}, {&y})
      .numbers({}, {p[0], p[1], p[2]})
      .bx({kept(reads.a, a), kept(reads.b, b), kept(reads.c, c)}, []<class T>(Backward<T> back) {
        int k = 0;
        (operand_grad(back, k++, Grad{}), ...);
      });
  return y;
}

template <class T>
struct Dual {
  T y, slope;
};
// y and the slope at x are f(x).
template <class F>
Tensor unary(const Op& op, const Tensor& x, F) {
  return apply(
      op, {x}, {.a = 1}, [](auto v, auto...) { return F{}(v).y; },
      [](auto g, auto v, auto...) { return g * F{}(v).slope; });
}

constexpr auto kPass = [](auto g, auto...) { return g; };

}  // namespace

Tensor add(Rank& rank, Tensor a, Tensor b, At at) {
  return apply(
      {rank, "add", at}, {a, b}, {}, [](auto u, auto v, auto) { return u + v; }, kPass, kPass);
}
Tensor sub(Rank& rank, Tensor a, Tensor b, At at) {
  return apply(
      {rank, "sub", at}, {a, b}, {}, [](auto u, auto v, auto) { return u - v; }, kPass,
      [](auto g, auto...) { return -g; });
}
Tensor mul(Rank& rank, Tensor a, Tensor b, At at) {
  return apply(
      {rank, "mul", at}, {a, b}, {.a = 2, .b = 1}, [](auto u, auto v, auto) { return u * v; },
      [](auto g, auto, auto v, auto) { return g * v; },
      [](auto g, auto u, auto, auto) { return g * u; });
}
Tensor div(Rank& rank, Tensor a, Tensor b, At at) {
  return apply(
      {rank, "div", at}, {a, b}, {.a = 2, .b = 3}, [](auto u, auto v, auto) { return u / v; },
      [](auto g, auto, auto v, auto) { return g / v; },
      [](auto g, auto u, auto v, auto) { return -g * u / (v * v); });
}
Tensor add(Rank& rank, Tensor a, double b, At at) {
  return apply(
      {rank, "add", at}, {a}, {.scalar = {0, b}}, [](auto x, auto p, auto) { return x + p; },
      kPass);
}
Tensor mul(Rank& rank, Tensor a, double b, At at) {
  return apply(
      {rank, "mul", at}, {a}, {.scalar = {0, b}}, [](auto x, auto p, auto) { return x * p; },
      [](auto g, auto, auto p, auto) { return g * p; });
}
Tensor exp(Rank& rank, Tensor x, At at) {
  return unary({rank, "exp", at}, x, [](auto v) { return Dual{std::exp(v), std::exp(v)}; });
}
Tensor log(Rank& rank, Tensor x, At at) {
  return unary({rank, "log", at}, x, [](auto v) { return Dual{std::log(v), 1 / v}; });
}
Tensor sqrt(Rank& rank, Tensor x, At at) {
  return unary({rank, "sqrt", at}, x, [](auto v) {
    return Dual{std::sqrt(v), 1 / (2 * std::sqrt(v))};
  });
}
Tensor tanh(Rank& rank, Tensor x, At at) {
  return unary({rank, "tanh", at}, x, [](auto v) {
    return Dual{std::tanh(v), 1 - std::tanh(v) * std::tanh(v)};
  });
}
Tensor sigmoid(Rank& rank, Tensor x, At at) {
  return unary({rank, "sigmoid", at}, x, [](auto v) {
    return Dual{logistic(v), logistic(v) * (1 - logistic(v))};
  });
}
Tensor softplus(Rank& rank, Tensor x, At at) {
  return unary({rank, "softplus", at}, x, [](auto v) {
    return Dual{(v < 0 ? 0 : v) + std::log1p(std::exp(-std::fabs(v))), logistic(v)};
  });
}
Tensor silu(Rank& rank, Tensor x, At at) { return mul(rank, x, sigmoid(rank, x, at), at); }
// Here and in clamp a NaN stays one.
Tensor relu(Rank& rank, Tensor x, At at) {
  return unary({rank, "relu", at}, x, [](auto v) {
    return Dual{v < 0 ? 0 : v, decltype(v)(v > 0)};
  });
}
Tensor clamp(Rank& rank, Tensor x, double low, double high, At at) {
  const Op op{rank, "clamp", at};
  op.check({{"low <= high", low <= high}}, {&x});
  return apply(
      op, {x}, {.a = 1, .scalar = {0, low, high}},
      [](auto v, auto p, auto q) { return std::min(std::max(v, p), q); },
      [](auto g, auto v, auto p, auto q) { return g * (v >= p && v <= q); });
}
Tensor where(Rank& rank, Tensor mask, Tensor a, Tensor b, At at) {
  const Op op{rank, "where", at};
  op.check({{"a mask of dtype u8", mask.defined() && mask.dtype == DType::U8},
            {"mask and a on one device", mask.device == a.device}},
           {&mask, &a, &b});
  return apply(
      op, {a, b, mask}, {.c = 3}, [](auto u, auto v, auto on) { return on != 0 ? u : v; },
      [](auto g, auto, auto, auto on) { return on != 0 ? g : 0; },
      [](auto g, auto, auto, auto on) { return on != 0 ? 0 : g; });
}

}  // namespace pith
