// elementwise: y = f(x), f(a, b) or mask ? a : b for each element, shapes broadcast as NumPy does.
//   in     f32|f64, all inputs alike; mask u8        out    the broadcast shape
//   keeps  x or y where the slope needs it; of a product or quotient the other factor; the mask
//   grad   += g * slope, summed over the dimensions in which the input was repeated
//   errors shapes that do not broadcast; dtypes or devices differ; mask not u8; clamp low > high
//   bitwise run-to-run: yes, for any number of threads
#include <cmath>

#include "ops/general.h"
#include "ops/ops.h"

namespace pith {
namespace {

// ---- Functions of one number: value(x, p, q) and slope(kept, p, q)
// ------------------------------- `kept` is x or y; p and q are the op's scalars.

enum class Keeps : uint8_t { Nothing, Input, Output };

struct Exp {
    static constexpr Keeps keeps = Keeps::Output;
    static auto value(auto x, auto, auto) { return std::exp(x); }
    static auto slope(auto y, auto, auto) { return y; }
};
struct Log {
    static constexpr Keeps keeps = Keeps::Input;
    static auto value(auto x, auto, auto) { return std::log(x); }
    static auto slope(auto x, auto, auto) { return 1 / x; }
};
struct Sqrt {
    static constexpr Keeps keeps = Keeps::Output;
    static auto value(auto x, auto, auto) { return std::sqrt(x); }
    static auto slope(auto y, auto, auto) { return 1 / (2 * y); }
};
struct Tanh {
    static constexpr Keeps keeps = Keeps::Output;
    static auto value(auto x, auto, auto) { return std::tanh(x); }
    static auto slope(auto y, auto, auto) { return 1 - y * y; }
};
struct Sigmoid {
    static constexpr Keeps keeps = Keeps::Output;
    static auto value(auto x, auto, auto) { return logistic(x); }
    static auto slope(auto y, auto, auto) { return y * (1 - y); }
};
struct Silu {
    static constexpr Keeps keeps = Keeps::Input;
    static auto value(auto x, auto, auto) { return x * logistic(x); }
    static auto slope(auto x, auto, auto) { return logistic(x) * (1 + x * logistic(-x)); }
};
struct Softplus {
    static constexpr Keeps keeps = Keeps::Input;
    static auto value(auto x, auto, auto) {
        return (x < 0 ? 0 : x) + std::log1p(std::exp(-std::fabs(x)));
    }
    static auto slope(auto x, auto, auto) { return logistic(x); }
};
struct Relu {  // comparisons so arranged that NaN stays NaN
    static constexpr Keeps keeps = Keeps::Output;
    static auto value(auto x, auto, auto) { return x < 0 ? 0 : x; }
    static auto slope(auto y, auto, auto) { return y > 0; }
};
struct Clamp {
    static constexpr Keeps keeps = Keeps::Input;
    static auto value(auto x, auto low, auto high) { return x < low ? low : x > high ? high : x; }
    static auto slope(auto x, auto low, auto high) { return x >= low && x <= high; }
};
struct AddScalar {
    static constexpr Keeps keeps = Keeps::Nothing;
    static auto value(auto x, auto b, auto) { return x + b; }
    static auto slope(auto, auto, auto) { return 1; }
};
struct MulScalar {
    static constexpr Keeps keeps = Keeps::Nothing;
    static auto value(auto x, auto b, auto) { return x * b; }
    static auto slope(auto, auto b, auto) { return b; }
};

template <class F>
void unary_cpu(const Rank& rank, const char* op, At at, Tensor x, Tensor y, double p, double q) {
    float_kernel(rank, op, at, x, [&]<class T>(T*) {
        const T a = static_cast<T>(p), b = static_cast<T>(q);
        elementwise(
            flat_walk(x.numel()), Slot<T>{y.as<T>()}, [=](T v) { return F::value(v, a, b); },
            x.as<T>());
    });
}

// kept undefined: the slope does not depend on it.
template <class F>
void unary_grad_cpu(const Rank& rank, const Node& node, Tensor dy, Tensor kept, GradSlot dx) {
    float_kernel(rank, node.op, node.at, dy, [&]<class T>(T*) {
        const T a = static_cast<T>(node.f[0]), b = static_cast<T>(node.f[1]);
        const Tensor& k = kept.defined() ? kept : dy;
        elementwise(
            flat_walk(dy.numel()), slot_of<T>(dx), [=](T g, T v) { return g * F::slope(v, a, b); },
            dy.as<T>(), k.as<T>());
    });
}

template <class F>
void unary_grad(const Pass& pass) {
    const GradSlot dx = pass.slot(0);
    if (!dx.grad.defined()) return;
    unary_grad_cpu<F>(pass.rank, pass.node, pass.dy(), pass.kept[0], dx);
}

template <class F>
Tensor unary(Rank& rank, const char* op, At at, const Tensor& x, double p = 0, double q = 0) {
    check_alike(rank, op, at, {&x});
    Tensor y = empty(rank, x.dim, x.dtype, at);
    unary_cpu<F>(rank, op, at, x, y, p, q);
    Tensor kept;
    if (F::keeps != Keeps::Nothing) kept = F::keeps == Keeps::Input ? x : y;
    if (Node* node = record_grad<unary_grad<F>>(rank, op, at, {x}, y, {{kept}})) {
        node->f[0] = p;
        node->f[1] = q;
    }
    return y;
}

// ---- Functions of two: value(a, b) and the gradients da and db, g that of y
// ---------------------- needs: the factors that a gradient reads; bit 0: a, bit 1: b.

struct Add {
    static constexpr unsigned a_needs = 0, b_needs = 0;
    static auto value(auto a, auto b) { return a + b; }
    static auto da(auto g, auto, auto) { return g; }
    static auto db(auto g, auto, auto) { return g; }
};
struct Sub {
    static constexpr unsigned a_needs = 0, b_needs = 0;
    static auto value(auto a, auto b) { return a - b; }
    static auto da(auto g, auto, auto) { return g; }
    static auto db(auto g, auto, auto) { return -g; }
};
struct Mul {
    static constexpr unsigned a_needs = 2, b_needs = 1;
    static auto value(auto a, auto b) { return a * b; }
    static auto da(auto g, auto, auto b) { return g * b; }
    static auto db(auto g, auto a, auto) { return g * a; }
};
struct Div {
    static constexpr unsigned a_needs = 2, b_needs = 3;
    static auto value(auto a, auto b) { return a / b; }
    static auto da(auto g, auto, auto b) { return g / b; }
    static auto db(auto g, auto a, auto b) { return -g * a / (b * b); }
};

template <class F>
void binary_cpu(const Rank& rank, const char* op, At at, Tensor a, Tensor b, Tensor y) {
    float_kernel(rank, op, at, a, [&]<class T>(T*) {
        const Walk walk(y.dim,
                        {steps_of(y.dim, y.dim), steps_of(a.dim, y.dim), steps_of(b.dim, y.dim)});
        elementwise(
            walk, Slot<T>{y.as<T>()}, [](T u, T v) { return F::value(u, v); }, a.as<T>(),
            b.as<T>());
    });
}

// Input k's gradient, f(dy, a, b): whole, then summed where the input was repeated. a and b may
// have any shape that broadcasts to dy's.
template <class T, class F, class A, class B>
void grad_of_operand(const Pass& pass, int k, const Tensor& a, const Tensor& b, F f, const A* as,
                     const B* bs) {
    const GradSlot d = pass.slot(k);
    if (!d.grad.defined()) return;
    const Tensor& dy = pass.dy();
    const bool repeated = d.grad.numel() != dy.numel();
    const Tensor whole = repeated ? empty(pass.rank, dy.dim, dy.dtype, dy.made) : d.grad;
    const Steps flat = steps_of(dy.dim, dy.dim);
    elementwise(Walk(dy.dim, {flat, flat, steps_of(a.dim, dy.dim), steps_of(b.dim, dy.dim)}),
                Slot<T>{whole.as<T>(), d.add && !repeated}, f, dy.as<T>(), as, bs);
    if (repeated) sum_repeated(pass.rank, whole, d.grad.dim, slot_of<T>(d));
}

template <class F>
void binary_grad_cpu(const Pass& pass, Tensor a, Tensor b) {
    float_kernel(pass.rank, pass.node.op, pass.node.at, pass.dy(), [&]<class T>(T*) {
        const auto da = [](T g, T u, T v) { return F::da(g, u, v); };
        const auto db = [](T g, T u, T v) { return F::db(g, u, v); };
        grad_of_operand<T>(pass, 0, a, b, da, a.as<T>(), b.as<T>());
        grad_of_operand<T>(pass, 1, a, b, db, a.as<T>(), b.as<T>());
    });
}

template <class F>
void binary_grad(const Pass& pass) {
    // A factor that no gradient needs was not kept: dy stands in for it, unread.
    const Tensor& dy = pass.dy();
    binary_grad_cpu<F>(pass, pass.kept[0].defined() ? pass.kept[0] : dy,
                       pass.kept[1].defined() ? pass.kept[1] : dy);
}

template <class F>
Tensor binary(Rank& rank, const char* op, At at, const Tensor& a, const Tensor& b) {
    check_alike(rank, op, at, {&a, &b});
    Tensor y = empty(rank, broadcast(rank, op, at, {&a, &b}), a.dtype, at);
    binary_cpu<F>(rank, op, at, a, b, y);
    // Bit k: the gradient of input k needs this factor.
    const unsigned of_a = (F::a_needs & 1) | (F::b_needs & 1) << 1;
    const unsigned of_b = F::a_needs >> 1 | (F::b_needs & 2);
    record_grad<binary_grad<F>>(rank, op, at, {a, b}, y, {{a, of_a}, {b, of_b}});
    return y;
}

// ---- where
// ---------------------------------------------------------------------------------------

void where_cpu(const Rank& rank, At at, Tensor mask, Tensor a, Tensor b, Tensor y) {
    float_kernel(rank, "where", at, a, [&]<class T>(T*) {
        const Walk walk(y.dim, {steps_of(y.dim, y.dim), steps_of(mask.dim, y.dim),
                                steps_of(a.dim, y.dim), steps_of(b.dim, y.dim)});
        elementwise(
            walk, Slot<T>{y.as<T>()}, [](uint8_t m, T u, T v) { return m ? u : v; },
            mask.as<uint8_t>(), a.as<T>(), b.as<T>());
    });
}

void where_grad_cpu(const Pass& pass, Tensor mask) {
    float_kernel(pass.rank, "where", pass.node.at, pass.dy(), [&]<class T>(T*) {
        const uint8_t* m = mask.as<uint8_t>();
        const auto da = [](T g, uint8_t on, uint8_t) { return on ? g : T(0); };
        const auto db = [](T g, uint8_t on, uint8_t) { return on ? T(0) : g; };
        grad_of_operand<T>(pass, 0, mask, mask, da, m, m);
        grad_of_operand<T>(pass, 1, mask, mask, db, m, m);
    });
}

void where_grad(const Pass& pass) { where_grad_cpu(pass, pass.kept[0]); }

}  // namespace

// ---- The ops
// -------------------------------------------------------------------------------------

Tensor add(Rank& rank, Tensor a, Tensor b, At at) { return binary<Add>(rank, "add", at, a, b); }
Tensor sub(Rank& rank, Tensor a, Tensor b, At at) { return binary<Sub>(rank, "sub", at, a, b); }
Tensor mul(Rank& rank, Tensor a, Tensor b, At at) { return binary<Mul>(rank, "mul", at, a, b); }
Tensor div(Rank& rank, Tensor a, Tensor b, At at) { return binary<Div>(rank, "div", at, a, b); }
Tensor add(Rank& rank, Tensor a, double b, At at) {
    return unary<AddScalar>(rank, "add", at, a, b);
}
Tensor mul(Rank& rank, Tensor a, double b, At at) {
    return unary<MulScalar>(rank, "mul", at, a, b);
}
Tensor exp(Rank& rank, Tensor x, At at) { return unary<Exp>(rank, "exp", at, x); }
Tensor log(Rank& rank, Tensor x, At at) { return unary<Log>(rank, "log", at, x); }
Tensor sqrt(Rank& rank, Tensor x, At at) { return unary<Sqrt>(rank, "sqrt", at, x); }
Tensor tanh(Rank& rank, Tensor x, At at) { return unary<Tanh>(rank, "tanh", at, x); }
Tensor sigmoid(Rank& rank, Tensor x, At at) { return unary<Sigmoid>(rank, "sigmoid", at, x); }
Tensor silu(Rank& rank, Tensor x, At at) { return unary<Silu>(rank, "silu", at, x); }
Tensor softplus(Rank& rank, Tensor x, At at) { return unary<Softplus>(rank, "softplus", at, x); }
Tensor relu(Rank& rank, Tensor x, At at) { return unary<Relu>(rank, "relu", at, x); }

Tensor clamp(Rank& rank, Tensor x, double low, double high, At at) {
    check(rank, "clamp", at, {{"low <= high", low <= high}}, {&x});
    return unary<Clamp>(rank, "clamp", at, x, low, high);
}

Tensor where(Rank& rank, Tensor mask, Tensor a, Tensor b, At at) {
    check_alike(rank, "where", at, {&a, &b});
    check(rank, "where", at,
          {{"a mask of dtype u8", mask.defined() && mask.dtype == DType::U8},
           {"mask and a on one device", mask.device == a.device}},
          {&mask, &a, &b});
    Tensor y = empty(rank, broadcast(rank, "where", at, {&mask, &a, &b}), a.dtype, at);
    where_cpu(rank, at, mask, a, b, y);
    record_grad<where_grad>(rank, "where", at, {a, b}, y, {{mask, 3}});
    return y;
}

}  // namespace pith
