#include <algorithm>

#include "ops/cpu.h"

namespace pith {
namespace {

int filled_dim(const Op& op, const Tensor& x, int dim) {
  int d = op.dim_of(x, dim);
  op.check({{"elements in the dimension", x.dim[d] > 0}}, {&x});
  return d;
}

// f, which works on the last dimension, on dimension d.
template <class F>
Tensor over_last(const Op& op, const Tensor& x, int d, F f) {
  if (d == x.dim.rank - 1) return f(x);
  Dims order;
  for (; order.rank < x.dim.rank; order.rank++) order[order.rank] = order.rank;
  std::swap(order[d], order[order.rank - 1]);
  return permute(op.rank, f(permute(op.rank, x, order, op.at)), order, op.at);
}

// Over the last dimension, from its end if `reverse`.
template <class T>
void cumulate(const Op& op, const Tensor& x, const GradSlot& out, bool reverse) {
  i64 n = x.cols();
  const Slot<T> to{out.grad.as<T>(), out.add};
  if (x.on_gpu()) return OnCuda<T>::cumsum(op.rank, x, out, reverse);
  parallel_rows(x.rows(), n, [&](i64 r) {
    T sum = 0;
    for (i64 i = 0; i < n; i++) {
      i64 at = r * n + (reverse ? n - 1 - i : i);
      to.put(at, sum += x.as<T>()[at]);
    }
  });
}

}

Tensor sum(Rank& rank, Tensor x, int dim, At at) {
  Op op{rank, "sum", at};
  Tensor y = op.empty(with_size(x.dim, op.dim_of(x, dim), 1), x.dtype);
  op.typed(x, [&]<class T>(T*) { sum_to<T>(op, x, {y}); });
  record(op, {x}, {&y}).bx({}, []<class T>(Backward<T> b) {
    GradSlot dx = b.slot(0);
    copy_elements<T>(b.op(), dx.grad.dim, view_of(b.dy(), dx.grad.dim), view_of(dx.grad), dx.add);
  });
  return y;
}

Tensor mean(Rank& rank, Tensor x, int dim, At at) {
  int d = filled_dim({rank, "mean", at}, x, dim);
  return mul(rank, sum(rank, x, d, at), 1 / double(x.dim[d]), at);
}

Tensor max(Rank& rank, Tensor x, int dim, At at) {
  Op op{rank, "max", at};
  return over_last(
      op, x, filled_dim(op, x, dim), [&](Tensor t) { return top_k(rank, t, 1, at).values; });
}

TopK top_k(Rank& rank, Tensor x, int k, At at) {
  Op op{rank, "top_k", at};
  op.check_alike({&x});
  string need = text("1 <= k <= size of the last dimension for k = %d", k);
  op.check({{need.c_str(), k >= 1 && k <= x.cols()}}, {&x});
  Dims dims = with_size(x.dim, x.dim.rank - 1, k);
  TopK y{op.empty(dims, x.dtype), op.empty(dims, DType::I32)};
  op.typed(x, [&]<class T>(T*) {
    if (x.on_gpu()) return OnCuda<T>::top_k(rank, x, k, y.values, y.ids);
    parallel_rows(x.rows(), x.cols() * 2, [&](i64 r) {
      int* ids = row_of<int>(y.ids, r);
      largest(row_of<T>(x, r), x.cols(), k, ids);
      for (int j = 0; j < k; j++) row_of<T>(y.values, r)[j] = row_of<T>(x, r)[ids[j]];
    });
  });
  record(op, {x}, {&y.values}).bx({y.ids}, []<class T>(Backward<T> b) {
    Tensor dx = b.zeroed(0);
    const Tensor& ids = b.keep[0];
    if (dx.on_gpu()) return OnCuda<T>::top_k_grad(b.rank, b.dy(), ids, dx);
    for (i64 i = 0; i < ids.numel(); i++)
      row_of<T>(dx, i / ids.cols())[ids.i32()[i]] += b.dy().template as<T>()[i];
  });
  return y;
}

Tensor cumsum(Rank& rank, Tensor x, int dim, At at) {
  Op op{rank, "cumsum", at};
  return over_last(op, x, op.dim_of(x, dim), [&](Tensor t) {
    Tensor y = op.like(t);
    op.typed(t, [&]<class T>(T*) { cumulate<T>(op, t, {y}, false); });
    record(op, {t}, {&y}).bx({}, []<class T>(Backward<T> b) {
      cumulate<T>(b.op(), b.dy(), b.slot(0), true);
    });
    return y;
  });
}

Tensor softmax(Rank& rank, Tensor x, int dim, At at) {
  Op op{rank, "softmax", at};
  return over_last(op, x, op.dim_of(x, dim), [&](Tensor t) {
    Tensor y = op.like(t);
    op.typed(t, [&, n = t.cols()]<class T>(T*) {
      if (t.on_gpu()) return OnCuda<T>::softmax(op.rank, t, y);
      parallel_rows(t.rows(), n * 4, [&](i64 r) {
        T* to = std::copy_n(row_of<T>(t, r), n, row_of<T>(y, r)) - n;
        T sum = exp_sum(to, n, max_of(to, n));
        for (i64 i = 0; i < n; i++) to[i] /= sum;
      });
    });
    record(op, {t}, {&y}).bx({y}, []<class T>(Backward<T> b) {
      i64 n = b.dy().cols();
      GradSlot slot = b.slot(0);
      if (b.dy().on_gpu()) return OnCuda<T>::softmax_grad(b.rank, b.dy(), b.keep[0], slot);
      const Slot<T> dx{slot.grad.as<T>(), slot.add};
      parallel_rows(b.dy().rows(), n * 2, [&](i64 r) {
        const T *g = row_of<T>(b.dy(), r), *p = row_of<T>(b.keep[0], r), mean = dot(g, p, n);
        for (i64 i = 0; i < n; i++) dx.put(r * n + i, p[i] * (g[i] - mean));
      });
    });
    return y;
  });
}

}
