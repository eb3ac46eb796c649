// cpu: loops and products of the CPU forms. Outputs alone are divided among threads, in fixed
// pieces, and sums have one order: results never depend on the number of threads.
#pragma once
#include <limits>

#include "ops/cuda.h"
#include "ops/op.h"

namespace pith {

// Operations, or multiply-adds of a product, that pay for a second thread.
constexpr i64 kParallelWork = 1 << 16, kParallelProduct = 1 << 20;

// f(i) for rows i, on all threads when it pays. f writes to its own row only and does not throw.
template <class F>
void parallel_rows(i64 rows, i64 work_per_row, F&& f) {
#pragma omp parallel for schedule(static) if (rows > 1 && rows * work_per_row > kParallelWork)
  for (i64 i = 0; i < rows; i++) f(i);
}

// f(first, n) for blocks of columns, each taking `rows` rows.
constexpr i64 kBlockColumns = 64;
template <class F>
void column_blocks(i64 rows, i64 cols, F&& f) {
  parallel_rows((cols + kBlockColumns - 1) / kBlockColumns, rows * kBlockColumns, [&](i64 b) {
    i64 first = b * kBlockColumns, left = cols - first;
    f(first, left < kBlockColumns ? left : kBlockColumns);
  });
}

// to[c] = or += the sum of f(r, c) over rows r in their order, if wanted.
template <class Sum, class T, class F>
void add_columns(i64 rows, i64 cols, Slot<T> to, F&& f) {
  if (!to.data) return;
  column_blocks(rows, cols, [&](i64 first, i64 n) {
    Sum sum[kBlockColumns] = {};
    for (i64 r = 0; r < rows; r++)
      for (i64 c = 0; c < n; c++) sum[c] += f(r, first + c);
    for (i64 c = 0; c < n; c++) to.put(first + c, T(sum[c]));
  });
}

template <class T>
T* row_of(const Tensor& t, i64 r) {
  return t.as<T>() + r * t.cols();
}

// start joined with f(i) for i in [0, n): in sixteen lanes that become vector instructions.
template <class T, class F, class Join>
T lane_fold(i64 n, T start, F&& f, Join&& join) {
  constexpr int kLanes = 16;
  T lane[kLanes];
  for (T& x : lane) x = start;
  i64 i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; j++) lane[j] = join(lane[j], f(i + j));
  for (int j = 0; i < n; i++, j++) lane[j] = join(lane[j], f(i));
  for (int half = kLanes / 2; half; half /= 2)
    for (int j = 0; j < half; j++) lane[j] = join(lane[j], lane[j + half]);
  return lane[0];
}
template <class T, class F>
T lane_sum(i64 n, F&& f) {
  return lane_fold(n, T(0), f, [](T a, T b) { return a + b; });
}
template <class T>
T dot(const T* a, const T* b, i64 n) {
  return lane_sum<T>(n, [&](i64 i) { return a[i] * b[i]; });
}
// NaNs are passed over.
template <class T>
T max_of(const T* x, i64 n) {
  return lane_fold(
      n, -std::numeric_limits<T>::infinity(), [x](i64 i) { return x[i]; },
      [](T a, T b) { return b > a ? b : a; });
}
// x = e^(x - shift), shift >= every x; the sum.
template <class T>
T exp_sum(T* x, i64 n, T shift) {
  return lane_sum<T>(n, [&](i64 i) { return x[i] = exp_negative(x[i] - shift); });
}

// The ids of the k largest of x [n], descending; ties keep their order.
template <class T>
void largest(const T* x, i64 n, i64 k, int* ids) {
  i64 held = 0;
  for (i64 i = 0; i < n; i++) {
    if (held == k && !above(x[i], x[ids[k - 1]])) continue;
    i64 place = held < k ? held++ : k - 1;
    for (; place > 0 && above(x[i], x[ids[place - 1]]); place--) ids[place] = ids[place - 1];
    ids[place] = int(i);
  }
}

// The norm y = x s w of a row.
template <class T>
T rms_scale(const T* x, i64 n, T eps) {
  return 1 / std::sqrt(dot(x, x, n) / n + eps);
}
// dx = s (u - x s^2 mean(u x)), u = dy w. dx may be dy.
template <class T>
void rms_norm_grad(i64 n, const T* dy, const T* w, const T* x, T s, T* dx) {
  T along = lane_sum<T>(n, [&](i64 j) { return dy[j] * w[j] * x[j]; });
  T c = along * s * s * s / n;
#pragma GCC ivdep
  for (i64 j = 0; j < n; j++) dx[j] = dy[j] * w[j] * s - x[j] * c;
}

// Of a step of AdamW.
template <class T>
struct AdamWFactors {
  T b1, c1, b2, c2, scale, eps, keep, rate, root;
  explicit AdamWFactors(const AdamW& o)
      : b1(T(o.beta1)),
        c1(T(1 - o.beta1)),
        b2(T(o.beta2)),
        c2(T(1 - o.beta2)),
        scale(T(o.grad_scale)),
        eps(T(o.eps)),
        keep(T(1 - o.lr * o.weight_decay)),
        rate(T(o.lr / (1 - std::pow(o.beta1, double(o.step))))),
        root(T(1 / std::sqrt(1 - std::pow(o.beta2, double(o.step))))) {}
  constexpr void step(T g, T& w, T& m, T& v) const {
    T grad = g * scale;
    m = m * b1 + grad * c1;
    v = v * b2 + grad * grad * c2;
    w = w * keep - rate * (m / (std::sqrt(v) * root + eps));
  }
};

enum Layout : u8 { kNormal, kTransposed };
// A row-major factor, `ld` elements from a stored row to the next.
template <class T>
struct Matrix {
  const T* data;
  i64 ld;
  Layout layout = kNormal;
};

// c [m, n] = alpha * a [m, k] b [k, n] + beta * c; a Transposed factor is stored [k, m] or [n, k].
// beta = 0 never reads c; any size may be 0.
template <class T>
void gemm(i64 m, i64 n, i64 k, Matrix<T> a, Matrix<T> b, T beta, T* c, i64 ldc, T alpha = 1);

// c = or += a b, tensors seen as [rows, cols], if wanted. Of y = x w^T: product(x, w, y, kNormal,
// kTransposed), product(dy, w, dx) and product(dy, x, dw, kTransposed).
template <class T>
void product(const Op& op, const Tensor& a, const Tensor& b, const GradSlot& c,
    Layout a_layout = kNormal, Layout b_layout = kNormal) {
  if (!c.grad.data) return;
  bool at = a_layout == kTransposed;
  i64 m = at ? a.cols() : a.rows(), k = at ? a.rows() : a.cols();
  i64 n = b_layout == kTransposed ? b.rows() : b.cols();
  if (a.on_gpu()) return cuda_gemm(op.rank, m, n, k, a, at, b, b_layout == kTransposed, c);
  if constexpr (!std::is_same_v<T, BF16>)
    gemm<T>(m, n, k, {a.as<T>(), a.cols(), a_layout}, {b.as<T>(), b.cols(), b_layout}, c.add,
        c.grad.as<T>(), n);
}

// Row r of y, of n elements, = or += the sum of rows index[i] of x, i in [begin[r], begin[r+1]) or,
// where begin is undefined, r.
template <class T>
void gather_rows(const Op& op, const Tensor& x, i64 n, const Tensor& index, const Tensor& begin,
    const GradSlot& out) {
  i64 rows = begin.defined() ? begin.dim[0] - 1 : index.numel();
  const Slot<T> y{out.grad.as<T>(), out.add};
  if (!y.data) return;
  if (x.on_gpu()) return OnCuda<T>::gather_rows(op.rank, x, n, index, begin, out);
  parallel_rows(rows, n * (1 + index.numel() / max<i64>(1, rows)), [&](i64 r) {
    i64 first = begin.defined() ? begin.i32()[r] : r;
    i64 end = begin.defined() ? begin.i32()[r + 1] : r + 1;
    T* to = y.data + r * n;
    for (i64 j = 0; j < n && !y.add; j++) to[j] = 0;
    for (i64 i = first; i < end; i++) {
      const T* from = x.as<T>() + index.i32()[i] * n;
      for (i64 j = 0; j < n; j++) to[j] += from[j];
    }
  });
}

// ---- Tensors walked over one index space, for the general vocabulary.

// A tensor seen from one dimension: [outer, n, inner].
struct Extent {
  i64 outer = 1, n = 1, inner = 1;
};
inline Extent extent_of(const Dims& dims, int dim) {
  Extent e;
  for (int i = 0; i < dims.rank; i++) (i < dim ? e.outer : i == dim ? e.n : e.inner) *= dims[i];
  return e;
}

// Where elements of x begin and how far apart they are along each dimension of an index space;
// without a tensor, the scalar at each.
struct View {
  Tensor x;
  i64 begin = 0;
  i64 step[kMaxDims] = {};
  double scalar = 0;
  // Where element i of the space lies.
  i64 offset(const Dims& space, i64 i) const {
    i64 at = begin;
    for (int d = space.rank - 1; d >= 0; i /= space[d--]) at += i % space[d] * step[d];
    return at;
  }
};
// x broadcast to `space`, aligned at the last dimension.
inline View view_of(const Tensor& x, const Dims& space) {
  View view{x};
  i64 step = 1;
  for (int i = x.dim.rank - 1; i >= 0; step *= x.dim[i--])
    view.step[space.rank - x.dim.rank + i] = x.dim[i] == 1 ? 0 : step;
  return view;
}
inline View view_of(const Tensor& x) { return view_of(x, x.dim); }

// An inner row of a view.
template <class T>
struct Column {
  const T* data;
  i64 step;
  Column(const View& v, const Dims& space, i64 i, const T* scalar)
      : data(v.x.data ? v.x.as<T>() + v.offset(space, i) : scalar), step(v.step[space.rank - 1]) {}
  T operator[](i64 i) const { return data[i * step]; }
};

template <class T, Formula f>
void elementwise_on_cpu(const Dims& space, const View (&v)[5], bool add) {
  const View& out = v[4];
  i64 n = space[space.rank - 1], rows = n ? space.numel() / n : 0;
  const T scalar[4] = {T(v[0].scalar), T(v[1].scalar), T(v[2].scalar), T(v[3].scalar)};
  parallel_rows(rows, n, [&](i64 row) {
    i64 at = row * n, step = out.step[space.rank - 1];
    const Slot<T> to{out.x.as<T>() + out.offset(space, at), add};
    auto x = [&](int k) { return Column<T>(v[k], space, at, scalar + k); };
    auto run = [&](const auto... in) {
      for (i64 i = 0; i < n; i++) to.put(i * step, evaluate<T>(f, in[i]...));
    };
    if constexpr (f >= Formula::Where)
      run(x(0), x(1), x(2), Column<u8>(v[3], space, at, nullptr));
    else
      run(x(0), x(1), x(2), x(3));
  });
}
// v[4] = or += f of g, a, b, c = v[0..3] at each index of `space`; c is bytes where f is Where.
template <class T, Formula f>
void elementwise(const Op& op, const Dims& space, const View (&v)[5], bool add) {
  const View& out = v[4];
  if (out.x.on_gpu()) return OnCuda<T>::elementwise(op.rank, space, v, add, f);
  if constexpr (!std::is_same_v<T, BF16>) elementwise_on_cpu<T, f>(space, v, add);
}
template <class T>
void copy_elements(const Op& op, const Dims& space, const View& from, const View& to, bool add) {
  elementwise<T, Formula::Copy>(op, space, {{}, from, {}, {}, to}, add);
}

// to = or += the sum of x over the dimensions that are missing or 1 in to, in F64.
template <class T>
void sum_to(const Op& op, Tensor x, const GradSlot& to) {
  int missing = x.dim.rank - to.grad.dim.rank;
  for (int d = 0; d < x.dim.rank; d++) {
    if (x.dim[d] == 1 || (d >= missing && to.grad.dim[d - missing] != 1)) continue;
    const Extent e = extent_of(x.dim, d);
    Tensor y = op.empty(with_size(x.dim, d, 1), wide(x.dtype));
    if (x.on_gpu())
      cuda_sum(op.rank, e, x, y);
    else
      parallel_rows(e.outer, e.n * e.inner, [&](i64 o) {
        const T* from = x.as<T>() + o * e.n * e.inner;
        add_columns<double>(e.n, e.inner, Slot<T>{y.as<T>() + o * e.inner},
            [&](i64 i, i64 c) { return from[i * e.inner + c]; });
      });
    x = y;
  }
  copy_elements<T>(op, x.dim, view_of(x), view_of(to.grad, x.dim), to.add);
}

}
