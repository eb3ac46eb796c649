// views: tensors walked over one index space, for the general vocabulary.
#pragma once
#include "ops/cpu.h"

namespace pith {

// A tensor seen from one dimension: [outer, n, inner].
struct Extent {
  int64_t outer = 1, n = 1, inner = 1;
};
inline Extent extent_of(const Dims& dims, int dim) {
  Extent e;
  for (int i = 0; i < dims.rank; i++) (i < dim ? e.outer : i == dim ? e.n : e.inner) *= dims[i];
  return e;
}

// Where elements of x begin and how far apart they are along each dimension of an index space.
struct View {
  Tensor x;
  int64_t begin = 0;
  int64_t step[kMaxDims] = {};
  // Where element i of the space lies.
  int64_t offset(const Dims& space, int64_t i) const {
    int64_t at = begin;
    for (int d = space.rank - 1; d >= 0; i /= space[d--]) at += i % space[d] * step[d];
    return at;
  }
};
// x broadcast to `space`, aligned at the last dimension.
inline View view_of(const Tensor& x, const Dims& space) {
  View view{x};
  int64_t step = 1;
  for (int i = x.dim.rank - 1; i >= 0; step *= x.dim[i--])
    view.step[space.rank - x.dim.rank + i] = x.dim[i] == 1 ? 0 : step;
  return view;
}
inline View view_of(const Tensor& x) { return view_of(x, x.dim); }

// An inner row of a view, as T.
template <class T>
struct Column {
  const T* data;
  const uint8_t* bytes;
  int64_t step;
  Column(const View& v, const Dims& space, int64_t i) : step(v.step[space.rank - 1]) {
    const int64_t at = v.offset(space, i);
    data = v.x.as<T>() + at;
    bytes = v.x.dtype == DType::U8 ? v.x.as<uint8_t>() + at : nullptr;
  }
  T operator[](int64_t i) const { return bytes ? T(bytes[i * step]) : data[i * step]; }
};

// out = or += f(in...) at each index of `space`.
template <class T, class F, class... In>
void elementwise(const Dims& space, const View& out, bool add, F f, const In&... in) {
  const int64_t n = space[space.rank - 1], rows = n ? space.numel() / n : 0;
  parallel_rows(rows, n, [&](int64_t row) {
    const Slot<T> to{out.x.as<T>() + out.offset(space, row * n), add};
    const int64_t step = out.step[space.rank - 1];
    [&](const auto... x) {
      for (int64_t i = 0; i < n; i++) to.put(i * step, f(x[i]...));
    }(Column<T>(in, space, row * n)...);
  });
}
template <class T>
void copy_elements(const Dims& space, const View& from, const View& to, bool add) {
  elementwise<T>(
      space, to, add, [](T x) { return x; }, from);
}

// to = or += the sum of x over the dimensions that are missing or 1 in to, in F64.
template <class T>
void sum_to(const Op& op, Tensor x, const GradSlot& to) {
  const int missing = x.dim.rank - to.grad.dim.rank;
  for (int d = 0; d < x.dim.rank; d++) {
    if (x.dim[d] == 1 || (d >= missing && to.grad.dim[d - missing] != 1)) continue;
    const Extent e = extent_of(x.dim, d);
    const Tensor y = op.empty(with_size(x.dim, d, 1), x.dtype);
    parallel_rows(e.outer, e.n * e.inner, [&](int64_t o) {
      const T* from = x.as<T>() + o * e.n * e.inner;
      add_columns<double>(e.n, e.inner, Slot<T>{y.as<T>() + o * e.inner},
                          [&](int64_t i, int64_t c) { return from[i * e.inner + c]; });
    });
    x = y;
  }
  copy_elements<T>(x.dim, view_of(x), view_of(to.grad, x.dim), to.add);
}

}  // namespace pith
