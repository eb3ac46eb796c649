// general: what the ops of the general vocabulary share: recording, tensors walked over one index
// space, the one elementwise loop and the one reduction.
// defines: Kept, record_op, check_alike, dim_of, broadcast, View, view_of, Walk,
// elementwise, copy_elements, Extent, extent_of, sum_to
#pragma once
#include <utility>

#include "ops/layer_parts.h"

namespace pith {

// ---- Recording and checks

// A value that gradients need, and the inputs whose gradients need it (bit k: input k).
struct Kept {
  Tensor value;
  unsigned inputs = 1;
};
// record() for an op of one output, whose bx computes the gradients of weights too. What no wanted
// gradient needs is not kept; the rest stays at its index in bx_keep. Returns the node, or null.
Node* record_op(Rank& rank, const char* op, At at, std::initializer_list<Tensor> in, Tensor& y,
                void (*bx)(Rank&, Node&), std::initializer_list<Kept> kept = {});

// Throws unless all are defined, of one dtype and on one device.
void check_alike(const Rank& rank, const char* op, At at, std::initializer_list<const Tensor*> ts);
// dim, counted from the end when negative; throws unless x has it.
int dim_of(const Rank& rank, const char* op, At at, const Tensor& x, int dim);
// The shape to which the shapes broadcast, aligned at their last dimension; throws if they do not.
Dims broadcast(const Rank& rank, const char* op, At at, std::initializer_list<const Tensor*> ts);

// ---- The elementwise loop

// Elements of x in an index space: where they begin, and how far apart they are along each
// dimension (0: repeated).
struct View {
  Tensor x;
  int64_t offset = 0;
  int64_t step[kMaxDims] = {};
};
// x broadcast to `space`.
View view_of(const Tensor& x, const Dims& space);

// Several views that go through an index space together. Dimensions of size 1 are dropped, and
// neighbours that every view walks as one are joined, so that the last one, the inner loop, is
// long.
struct Walk {
  static constexpr int kViews = 5;
  Walk(const Dims& space, std::initializer_list<View> list);
  // Each view's offset of element `begin` of inner row `row`.
  void locate(int64_t row, int64_t begin, int64_t* offsets) const;
  int64_t inner() const { return size[size.rank - 1]; }
  int64_t inner_step(int k) const { return view[k].step[size.rank - 1]; }
  Dims size;
  View view[kViews];
  int views;
  int64_t rows = 1;
};

constexpr int64_t kSpan = 128;  // elements that one step of the elementwise loop takes

// A span of a view as consecutive T: in place, or copied where it is repeated, strided or U8.
template <class T>
struct Span {
  Span(const Tensor& x, int64_t offset, int64_t step, int64_t n) : data(x.as<T>() + offset) {
    if (x.dtype == DType::U8)
      gather(x.as<uint8_t>() + offset, step, n);
    else if (step != 1)
      gather(data, step, n);
  }
  template <class A>
  void gather(const A* from, int64_t step, int64_t n) {
    for (int64_t i = 0; i < n; i++) copy[i] = static_cast<T>(from[i * step]);
    data = copy;
  }
  const T* data;
  T copy[kSpan];
};

// out = f(in...) over the index space, added where `add`; a span of every row, then the next of
// every row, so that the cache lines of a strided view are used whole.
template <class T, size_t N, class F>
void elementwise(const Dims& space, const View& out, bool add, const View (&in)[N], F f) {
  [&]<size_t... K>(std::index_sequence<K...>) {
    const Walk walk(space, {out, in[K]...});
    const int64_t n = walk.inner();
    parallel_rows((n + kSpan - 1) / kSpan * walk.rows, n < kSpan ? n : kSpan, [&](int64_t task) {
      const int64_t begin = task / walk.rows * kSpan, rest = n - begin;
      const int64_t count = rest < kSpan ? rest : kSpan;
      int64_t at[Walk::kViews];
      walk.locate(task % walk.rows, begin, at);
      T result[kSpan];
      [&](const auto*... x) {
        for (int64_t i = 0; i < count; i++) result[i] = f(x[i]...);
      }(Span<T>(in[K].x, at[K + 1], walk.inner_step(K + 1), count).data...);
      const Slot<T> to{out.x.as<T>() + at[0], add};
      for (int64_t i = 0; i < count; i++) to.put(i * walk.inner_step(0), result[i]);
    });
  }
  (std::make_index_sequence<N>{});
}
// to = from, two views of one index space, added where `add`.
void copy_elements(const Rank& rank, const char* op, At at, const Dims& space, const View& from,
                   const View& to, bool add);

// ---- The reduction

// A tensor seen from one dimension: [outer, n, inner].
struct Extent {
  int64_t outer = 1, n = 1, inner = 1;
};
Extent extent_of(const Dims& dims, int dim);
// to = or += the sum of x over the dimensions that are 1 in to, in F64 and a fixed order.
void sum_to(Rank& rank, const char* op, At at, Tensor x, const GradSlot& to);

}  // namespace pith
