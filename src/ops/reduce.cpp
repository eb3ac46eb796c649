// reduce: sum, mean, max, the k largest, running sum and softmax over one dimension.
//   in     x f32|f64, dim (negative: from the end; top_k: the last)
//   keeps  max, top_k: ids i32; softmax: y
//   grad   sum: += dy; max, top_k: += dy at the ids; cumsum: += the running sum from the end;
//          softmax: += y * (dy - <dy, y>)
//   errors no such dimension; mean or max over an empty one; k outside [1, size]
//   bitwise run-to-run: yes, for any number of threads
#include <algorithm>

#include "ops/general.h"
#include "ops/ops.h"

namespace pith {
namespace {

int filled_dim(const Rank& rank, const char* op, At at, const Tensor& x, int dim) {
  const int d = dim_of(rank, op, at, x, dim);
  check(rank, op, at, {{"elements in the dimension", x.dim[d] > 0}}, {&x});
  return d;
}

// f, which works on the last dimension, on dimension d: the two are exchanged, and back.
template <class F>
Tensor over_last(Rank& rank, const Tensor& x, int d, At at, F f) {
  if (d == x.dim.rank - 1) return f(x);
  Dims order;
  for (; order.rank < x.dim.rank; order.rank++) order[order.rank] = order.rank;
  std::swap(order[d], order[order.rank - 1]);
  return permute(rank, f(permute(rank, x, order, at)), order, at);
}

void sum_bx(Rank& rank, Node& node) {
  const GradSlot dx = grad_slot(rank, node.in[0], node.at);
  const Dims& dims = dx.grad.dim;
  copy_elements(rank, node.op, node.at, dims, view_of(node.grad[0], dims), view_of(dx.grad, dims),
                dx.add);
}

// Over the last dimension, from its end if `reverse`.
template <class T>
void cumsum_cpu(const Tensor& x, Slot<T> to, bool reverse) {
  const int64_t n = x.cols();
  parallel_rows(x.rows(), n, [&](int64_t r) {
    T sum = 0;
    for (int64_t i = 0; i < n; i++) {
      const int64_t at = r * n + (reverse ? n - 1 - i : i);
      to.put(at, sum += x.as<T>()[at]);
    }
  });
}

void cumsum_bx(Rank& rank, Node& node) {
  float_kernel(rank, node,
               [&]<class T>(T*) { cumsum_cpu(node.grad[0], writable<T>(rank, node, 0), true); });
}

template <class T>
void softmax_cpu(const Tensor& x, const Tensor& y) {
  const int64_t n = x.cols();
  parallel_rows(x.rows(), n * 4, [&](int64_t r) {
    const T* row = x.as<T>() + r * n;
    T* to = y.as<T>() + r * n;
    std::copy(row, row + n, to);
    const T sum = exp_sum(to, n, max_of(row, n));
    for (int64_t i = 0; i < n; i++) to[i] /= sum;
  });
}

template <class T>
void softmax_bx_cpu(const Tensor& dy, const Tensor& y, Slot<T> dx) {
  const int64_t n = y.cols();
  parallel_rows(y.rows(), n * 2, [&](int64_t r) {
    const T *g = dy.as<T>() + r * n, *p = y.as<T>() + r * n;
    const T mean = dot(g, p, n);
    for (int64_t i = 0; i < n; i++) dx.put(r * n + i, p[i] * (g[i] - mean));
  });
}

void softmax_bx(Rank& rank, Node& node) {
  float_kernel(rank, node, [&]<class T>(T*) {
    softmax_bx_cpu(node.grad[0], node.bx_keep[0], writable<T>(rank, node, 0));
  });
}

// NaN is above all numbers; each is inserted behind those that are not smaller, so that ties keep
// their order.
template <class T>
void top_k_cpu(const Tensor& x, const TopK& y) {
  const auto above = [](T a, T b) { return a > b || (a != a && b == b); };
  const int64_t n = x.cols(), k = y.ids.cols();
  parallel_rows(x.rows(), n * 2, [&](int64_t r) {
    const T* row = x.as<T>() + r * n;
    T* values = y.values.as<T>() + r * k;
    int32_t* ids = y.ids.i32() + r * k;
    for (int64_t i = 0; i < n; i++) {
      int64_t at = std::min(i, k);
      for (; at > 0 && above(row[i], values[at - 1]); at--) {
        if (at == k) continue;
        values[at] = values[at - 1];
        ids[at] = ids[at - 1];
      }
      if (at == k) continue;
      values[at] = row[i];
      ids[at] = int32_t(i);
    }
  });
}

template <class T>
void top_k_bx_cpu(const Tensor& dy, const Tensor& ids, const Tensor& dx) {
  const int64_t n = dx.cols(), k = ids.cols();
  for (int64_t i = 0; i < ids.numel(); i++) dx.as<T>()[i / k * n + ids.i32()[i]] += dy.as<T>()[i];
}

void top_k_bx(Rank& rank, Node& node) {
  const Tensor dx = zeroed(rank, node, 0);
  float_kernel(rank, node,
               [&]<class T>(T*) { top_k_bx_cpu<T>(node.grad[0], node.bx_keep[0], dx); });
}

}  // namespace

Tensor sum(Rank& rank, Tensor x, int dim, At at) {
  const int d = dim_of(rank, "sum", at, x, dim);
  Dims dims = x.dim;
  dims[d] = 1;
  Tensor y = empty(rank, dims, x.dtype, at);
  sum_to(rank, "sum", at, x, {y});
  record_op(rank, "sum", at, {x}, y, sum_bx);
  return y;
}

Tensor mean(Rank& rank, Tensor x, int dim, At at) {
  const int d = filled_dim(rank, "mean", at, x, dim);
  return mul(rank, sum(rank, x, d, at), 1 / double(x.dim[d]), at);
}

Tensor max(Rank& rank, Tensor x, int dim, At at) {
  const int d = filled_dim(rank, "max", at, x, dim);
  return over_last(rank, x, d, at, [&](Tensor t) { return top_k(rank, t, 1, at).values; });
}

TopK top_k(Rank& rank, Tensor x, int k, At at) {
  check_alike(rank, "top_k", at, {&x});
  const string need = text("1 <= k <= size of the last dimension for k = %d", k);
  check(rank, "top_k", at, {{need.c_str(), k >= 1 && k <= x.cols()}}, {&x});
  Dims dims = x.dim;
  dims[dims.rank - 1] = k;
  TopK y{empty(rank, dims, x.dtype, at), empty(rank, dims, DType::I32, at)};
  float_kernel(rank, "top_k", at, x, [&]<class T>(T*) { top_k_cpu<T>(x, y); });
  record_op(rank, "top_k", at, {x}, y.values, top_k_bx, {{y.ids}});
  return y;
}

Tensor cumsum(Rank& rank, Tensor x, int dim, At at) {
  return over_last(rank, x, dim_of(rank, "cumsum", at, x, dim), at, [&](Tensor t) {
    Tensor y = empty(rank, t.dim, t.dtype, at);
    float_kernel(rank, "cumsum", at, t, [&]<class T>(T*) { cumsum_cpu<T>(t, {y.as<T>()}, false); });
    record_op(rank, "cumsum", at, {t}, y, cumsum_bx);
    return y;
  });
}

Tensor softmax(Rank& rank, Tensor x, int dim, At at) {
  return over_last(rank, x, dim_of(rank, "softmax", at, x, dim), at, [&](Tensor t) {
    Tensor y = empty(rank, t.dim, t.dtype, at);
    float_kernel(rank, "softmax", at, t, [&]<class T>(T*) { softmax_cpu<T>(t, y); });
    record_op(rank, "softmax", at, {t}, y, softmax_bx, {{y}});
    return y;
  });
}

}  // namespace pith
