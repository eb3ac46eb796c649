// elementwise: y = f(a, b, c) for each element, shapes broadcast as NumPy does.
//   in     f32|f64, all inputs alike; mask u8        out    the broadcast shape
//   keeps  what its gradients read of a (or y in its place), b and c
//   grad   da, db: += their formula, summed over the dimensions in which the input was repeated
//   errors shapes that do not broadcast; dtypes or devices differ; mask not u8; clamp low > high
//   bitwise run-to-run: yes, for any number of threads
#include <algorithm>
#include <cmath>

#include "ops/general.h"
#include "ops/ops.h"

namespace pith {
namespace {

// Bit k of a, b or c: input k's gradient reads that operand, or y in the place of a. An operand
// that is no input is a scalar.
struct Reads {
  unsigned a = 0, b = 0, c = 0;
  bool y = false;
  double scalar[3] = {};
};
constexpr Reads kNothing{}, kInput{.a = 1}, kOutput{.a = 1, .y = true};

// out (+)= f(first, x...), an undefined x being its scalar.
template <class T, class F>
void apply_cpu(const Tensor& out, bool add, const Tensor& first, const TensorList& x,
               const double* scalar, F f) {
  T number[3];
  View in[4] = {view_of(first, out.dim)};
  for (int k = 0; k < 3; k++) {
    number[k] = static_cast<T>(scalar[k]);
    in[k + 1] = view_of(x[k], out.dim);
    if (!x[k].defined()) in[k + 1].x.data = reinterpret_cast<char*>(&number[k]);
  }
  elementwise<T>(out.dim, view_of(out, out.dim), add, in, f);
}

// Input k's gradient, f(dy, a, b, c): whole, then summed where the input was repeated.
template <class T, class F>
void operand_grad(Rank& rank, const Node& node, int k, F f) {
  const GradSlot d = grad_slot(rank, node.in[k], node.at);
  if (!d.grad.defined()) return;
  const Tensor& dy = node.grad[0];
  const bool repeated = d.grad.numel() != dy.numel();
  Tensor whole = repeated ? empty(rank, dy.dim, dy.dtype, node.at) : d.grad;
  whole.dim = dy.dim;
  apply_cpu<T>(whole, d.add && !repeated, dy, node.bx_keep, node.f, f);
  if (repeated) sum_to(rank, node.op, node.at, whole, d);
}

template <class... Grad>
void apply_bx(Rank& rank, Node& node) {
  float_kernel(rank, node, [&]<class T>(T*) {
    int k = 0;
    (operand_grad<T>(rank, node, k++, Grad{}), ...);
  });
}

// y = value(a, b, c), and the gradient(dy, a, b, c) of each input that may have one.
template <class Value, class... Grad>
Tensor apply(Rank& rank, const char* op, At at, const TensorList& in, const Reads& reads,
             Value value, Grad...) {
  const Tensor &a = in[0], &b = in[1], &c = in[2];
  check_alike(rank, op, at, {&a, in.count > 1 ? &b : &a});
  Dims dims = broadcast(rank, op, at, {&a, in.count > 1 ? &b : &a, in.count > 2 ? &c : &a});
  Tensor y = empty(rank, dims, a.dtype, at);
  float_kernel(rank, op, at, a, [&]<class T>(T*) {
    apply_cpu<T>(y, false, a, in, reads.scalar,
                 [=](T, T u, T v, T w) -> T { return value(u, v, w); });
  });
  Node* node = record_op(rank, op, at, {a, b, c}, y, apply_bx<Grad...>,
                         {{reads.y ? y : a, reads.a}, {b, reads.b}, {c, reads.c}});
  if (node) std::copy(reads.scalar, reads.scalar + 3, node->f);
  return y;
}

}  // namespace

Tensor add(Rank& rank, Tensor a, Tensor b, At at) {
  return apply(
      rank, "add", at, {a, b}, kNothing, [](auto u, auto v, auto) { return u + v; },
      [](auto g, auto...) { return g; }, [](auto g, auto...) { return g; });
}
Tensor sub(Rank& rank, Tensor a, Tensor b, At at) {
  return apply(
      rank, "sub", at, {a, b}, kNothing, [](auto u, auto v, auto) { return u - v; },
      [](auto g, auto...) { return g; }, [](auto g, auto...) { return -g; });
}
Tensor mul(Rank& rank, Tensor a, Tensor b, At at) {
  return apply(
      rank, "mul", at, {a, b}, {.a = 2, .b = 1}, [](auto u, auto v, auto) { return u * v; },
      [](auto g, auto, auto v, auto) { return g * v; },
      [](auto g, auto u, auto, auto) { return g * u; });
}
Tensor div(Rank& rank, Tensor a, Tensor b, At at) {
  return apply(
      rank, "div", at, {a, b}, {.a = 2, .b = 3}, [](auto u, auto v, auto) { return u / v; },
      [](auto g, auto, auto v, auto) { return g / v; },
      [](auto g, auto u, auto v, auto) { return -g * u / (v * v); });
}
Tensor add(Rank& rank, Tensor a, double b, At at) {
  return apply(
      rank, "add", at, {a}, {.scalar = {0, b}}, [](auto x, auto p, auto) { return x + p; },
      [](auto g, auto...) { return g; });
}
Tensor mul(Rank& rank, Tensor a, double b, At at) {
  return apply(
      rank, "mul", at, {a}, {.scalar = {0, b}}, [](auto x, auto p, auto) { return x * p; },
      [](auto g, auto, auto p, auto) { return g * p; });
}
Tensor exp(Rank& rank, Tensor x, At at) {
  return apply(
      rank, "exp", at, {x}, kOutput, [](auto v, auto...) { return std::exp(v); },
      [](auto g, auto y, auto...) { return g * y; });
}
Tensor log(Rank& rank, Tensor x, At at) {
  return apply(
      rank, "log", at, {x}, kInput, [](auto v, auto...) { return std::log(v); },
      [](auto g, auto v, auto...) { return g / v; });
}
Tensor sqrt(Rank& rank, Tensor x, At at) {
  return apply(
      rank, "sqrt", at, {x}, kOutput, [](auto v, auto...) { return std::sqrt(v); },
      [](auto g, auto y, auto...) { return g / (2 * y); });
}
Tensor tanh(Rank& rank, Tensor x, At at) {
  return apply(
      rank, "tanh", at, {x}, kOutput, [](auto v, auto...) { return std::tanh(v); },
      [](auto g, auto y, auto...) { return g * (1 - y * y); });
}
Tensor sigmoid(Rank& rank, Tensor x, At at) {
  return apply(
      rank, "sigmoid", at, {x}, kOutput, [](auto v, auto...) { return logistic(v); },
      [](auto g, auto y, auto...) { return g * y * (1 - y); });
}
Tensor silu(Rank& rank, Tensor x, At at) { return mul(rank, x, sigmoid(rank, x, at), at); }
Tensor softplus(Rank& rank, Tensor x, At at) {
  return apply(
      rank, "softplus", at, {x}, kInput,
      [](auto v, auto...) { return (v < 0 ? 0 : v) + std::log1p(std::exp(-std::fabs(v))); },
      [](auto g, auto v, auto...) { return g * logistic(v); });
}
// Here and in clamp a NaN stays one.
Tensor relu(Rank& rank, Tensor x, At at) {
  return apply(
      rank, "relu", at, {x}, kOutput, [](auto v, auto...) { return v < 0 ? 0 : v; },
      [](auto g, auto y, auto...) { return g * (y > 0); });
}
Tensor clamp(Rank& rank, Tensor x, double low, double high, At at) {
  check(rank, "clamp", at, {{"low <= high", low <= high}}, {&x});
  return apply(
      rank, "clamp", at, {x}, {.a = 1, .scalar = {0, low, high}},
      [](auto v, auto p, auto q) { return std::min(std::max(v, p), q); },
      [](auto g, auto v, auto p, auto q) { return g * (v >= p && v <= q); });
}

Tensor where(Rank& rank, Tensor mask, Tensor a, Tensor b, At at) {
  check(rank, "where", at,
        {{"a mask of dtype u8", mask.defined() && mask.dtype == DType::U8},
         {"mask and a on one device", mask.device == a.device}},
        {&mask, &a, &b});
  return apply(
      rank, "where", at, {a, b, mask}, {.c = 3},
      [](auto u, auto v, auto on) { return on != 0 ? u : v; },
      [](auto g, auto, auto, auto on) { return on != 0 ? g : 0; },
      [](auto g, auto, auto, auto on) { return on != 0 ? 0 : g; });
}

}  // namespace pith
