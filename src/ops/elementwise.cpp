#include "ops/cpu.h"

namespace pith {
namespace {

// Bit k of a, b or c: input k's gradient reads that operand. Operands that are no inputs are
// scalars.
struct Reads {
  unsigned a = 0, b = 0, c = 0;
  double scalar[3] = {};
};

// out (+)= f of g, if there is one, and of the operands, an undefined one being its scalar.
template <class T, Formula f>
void apply(const Op& op, const Tensor& out, bool add, const Tensor& g, const TensorList& x,
    const double* scalar) {
  View v[5] = {view_of(g, out.dim)};
  for (int k = 0; k < 3; k++) {
    v[k + 1] = view_of(x[k], out.dim);
    v[k + 1].scalar = scalar[k];
  }
  v[4] = view_of(out);
  elementwise<T, f>(op, out.dim, v, add);
}

// Input k's gradient: whole, then summed where the input was repeated.
template <class T, Formula f>
void operand_grad(Backward<T> b, int k) {
  GradSlot d = b.slot(k);
  if (!d.grad.defined()) return;
  bool repeated = d.grad.numel() != b.dy().numel();
  Tensor whole = repeated ? b.op().empty(b.dy().dim, wide(b.dy().dtype)) : d.grad;
  whole.dim = b.dy().dim;
  apply<T, f>(b.op(), whole, d.add && !repeated, b.dy(), b.keep, b.node.f);
  if (repeated) sum_to<T>(b.op(), whole, d);
}

// y = value, and the gradient of each input that may have one.
template <Formula value, Formula... grad>
Tensor apply(const Op& op, const TensorList& in, const Reads& reads) {
  const Tensor &a = in[0], &b = in[in.count > 1], &c = in[in.count > 2 ? 2 : 0];
  op.check_alike({&a, &b});
  Tensor y = op.empty(op.broadcast({&a, &b, &c}), a.dtype);
  op.typed(a, [&]<class T>(T*) { apply<T, value>(op, y, false, {}, in, reads.scalar); });
  auto kept = [&](unsigned inputs, const Tensor& x) {
    bool needed = false;
    for (int k = 0; k < in.count; k++) needed |= (inputs >> k & 1) && in[k].needs_grad();
    return needed ? x : Tensor{};
  };
  const double* p = reads.scalar;
  record(op, {in[0], in[1], in[2]}, {&y})
      .numbers({}, {p[0], p[1], p[2]})
      .bx({kept(reads.a, a), kept(reads.b, b), kept(reads.c, c)}, []<class T>(Backward<T> back) {
        int k = 0;
        (operand_grad<T, grad>(back, k++), ...);
      });
  return y;
}

}

using enum Formula;

Tensor add(Rank& rank, Tensor a, Tensor b, At at) {
  return apply<Add, Pass, Pass>({rank, "add", at}, {a, b}, {});
}
Tensor sub(Rank& rank, Tensor a, Tensor b, At at) {
  return apply<Sub, Pass, Negate>({rank, "sub", at}, {a, b}, {});
}
Tensor mul(Rank& rank, Tensor a, Tensor b, At at) {
  return apply<Mul, MulGradA, MulGradB>({rank, "mul", at}, {a, b}, {.a = 2, .b = 1});
}
Tensor div(Rank& rank, Tensor a, Tensor b, At at) {
  return apply<Div, DivGradA, DivGradB>({rank, "div", at}, {a, b}, {.a = 2, .b = 3});
}
Tensor add(Rank& rank, Tensor a, double b, At at) {
  return apply<Add, Pass>({rank, "add", at}, {a}, {.scalar = {0, b}});
}
Tensor mul(Rank& rank, Tensor a, double b, At at) {
  return apply<Mul, MulGradA>({rank, "mul", at}, {a}, {.scalar = {0, b}});
}
Tensor exp(Rank& rank, Tensor x, At at) {
  return apply<Exp, ExpGrad>({rank, "exp", at}, {x}, {.a = 1});
}
Tensor log(Rank& rank, Tensor x, At at) {
  return apply<Log, LogGrad>({rank, "log", at}, {x}, {.a = 1});
}
Tensor sqrt(Rank& rank, Tensor x, At at) {
  return apply<Sqrt, SqrtGrad>({rank, "sqrt", at}, {x}, {.a = 1});
}
Tensor tanh(Rank& rank, Tensor x, At at) {
  return apply<Tanh, TanhGrad>({rank, "tanh", at}, {x}, {.a = 1});
}
Tensor sigmoid(Rank& rank, Tensor x, At at) {
  return apply<Sigmoid, SigmoidGrad>({rank, "sigmoid", at}, {x}, {.a = 1});
}
Tensor softplus(Rank& rank, Tensor x, At at) {
  return apply<Softplus, SoftplusGrad>({rank, "softplus", at}, {x}, {.a = 1});
}
Tensor relu(Rank& rank, Tensor x, At at) {
  return apply<Relu, ReluGrad>({rank, "relu", at}, {x}, {.a = 1});
}
Tensor silu(Rank& rank, Tensor x, At at) { return mul(rank, x, sigmoid(rank, x, at), at); }
Tensor clamp(Rank& rank, Tensor x, double low, double high, At at) {
  Op op{rank, "clamp", at};
  op.check({{"low <= high", low <= high}}, {&x});
  return apply<Clamp, ClampGrad>(op, {x}, {.a = 1, .scalar = {0, low, high}});
}
Tensor where(Rank& rank, Tensor mask, Tensor a, Tensor b, At at) {
  Op op{rank, "where", at};
  op.check({{"a mask of dtype u8", mask.defined() && mask.dtype == DType::U8},
               {"mask and a on one device", mask.device == a.device}},
      {&mask, &a, &b});
  return apply<Where, WhereGradA, WhereGradB>(op, {a, b, mask}, {.c = 3});
}

}
