#include "ops/general.h"

#include <algorithm>

namespace pith {

Node* record_op(Rank& rank, const char* op, At at, std::initializer_list<Tensor> in, Tensor& y,
                void (*bx)(Rank&, Node&), std::initializer_list<Kept> kept) {
  Node* node = record(rank, op, at, in, {&y});
  if (!node) return nullptr;
  node->bx = bx;
  for (const Kept& k : kept) {
    bool needed = false;
    for (int i = 0; i < node->in.count; i++)
      needed |= (k.inputs >> i & 1) && node->in[i].needs_grad();
    node->bx_keep.push(needed ? k.value : Tensor{});
  }
  return node;
}

void check_alike(const Rank& rank, const char* op, At at, std::initializer_list<const Tensor*> ts) {
  const Tensor& first = **ts.begin();
  for (const Tensor* t : ts)
    check(rank, op, at,
          {{"defined tensors", t->defined()},
           {"equal dtypes", t->dtype == first.dtype},
           {"tensors on one device", t->device == first.device}},
          ts);
}

int dim_of(const Rank& rank, const char* op, At at, const Tensor& x, int dim) {
  check(rank, op, at, {{"a defined tensor", x.defined()}}, {&x});
  const int from_begin = dim < 0 ? dim + x.dim.rank : dim;
  const bool fits = from_begin >= 0 && from_begin < x.dim.rank;
  check(rank, op, at, {{text("dimension %d of x", dim).c_str(), fits}}, {&x});
  return from_begin;
}

Dims broadcast(const Rank& rank, const char* op, At at, std::initializer_list<const Tensor*> ts) {
  Dims all;
  for (const Tensor* t : ts) all.rank = std::max(all.rank, t->dim.rank);
  std::fill(all.size, all.size + all.rank, 1);
  for (const Tensor* t : ts) {
    for (int i = 0; i < t->dim.rank; i++) {
      int64_t& size = all[all.rank - t->dim.rank + i];
      if (size == 1) size = t->dim[i];
      const bool fits = t->dim[i] == 1 || t->dim[i] == size;
      check(rank, op, at, {{"sizes equal or 1, aligned at the last dimension", fits}}, ts);
    }
  }
  return all;
}

View view_of(const Tensor& x, const Dims& space) {
  View view{x};
  int64_t step = 1;
  for (int i = x.dim.rank - 1; i >= 0; i--) {
    view.step[space.rank - x.dim.rank + i] = x.dim[i] == 1 ? 0 : step;
    step *= x.dim[i];
  }
  return view;
}

Walk::Walk(const Dims& space, std::initializer_list<View> list) : views(int(list.size())) {
  std::copy(list.begin(), list.end(), view);
  for (int d = 0; d < space.rank; d++) {
    if (space[d] == 1) continue;
    const int last = size.rank - 1;
    bool joined = last >= 0;
    for (int k = 0; joined && k < views; k++)
      joined = view[k].step[last] == view[k].step[d] * space[d];
    if (!joined) size[size.rank++] = 1;
    size[size.rank - 1] *= space[d];
    for (int k = 0; k < views; k++) view[k].step[size.rank - 1] = view[k].step[d];
  }
  if (size.rank == 0) size = {1};
  for (int d = 0; d + 1 < size.rank; d++) rows *= size[d];
}

void Walk::locate(int64_t row, int64_t begin, int64_t* offsets) const {
  for (int k = 0; k < views; k++) offsets[k] = view[k].offset + begin * inner_step(k);
  for (int d = size.rank - 2; d >= 0; row /= size[d--])
    for (int k = 0; k < views; k++) offsets[k] += row % size[d] * view[k].step[d];
}

void copy_elements(const Rank& rank, const char* op, At at, const Dims& space, const View& from,
                   const View& to, bool add) {
  float_kernel(rank, op, at, from.x,
               [&]<class T>(T*) { elementwise<T>(space, to, add, {from}, [](T x) { return x; }); });
}

Extent extent_of(const Dims& dims, int dim) {
  Extent e;
  for (int i = 0; i < dims.rank; i++) (i < dim ? e.outer : i == dim ? e.n : e.inner) *= dims[i];
  return e;
}

// y [outer, inner] = the sum of x [outer, n, inner] over n.
template <class T>
static void sum_cpu(const Extent& e, const T* x, T* y) {
  if (e.inner == 1)
    return parallel_rows(e.outer, e.n, [&](int64_t o) {
      y[o] = lane_sum<double>(e.n, [row = x + o * e.n](int64_t i) { return row[i]; });
    });
  const int64_t blocks = (e.inner + kSpan - 1) / kSpan;
  parallel_rows(e.outer * blocks, e.n * std::min(e.inner, kSpan), [&](int64_t task) {
    const int64_t o = task / blocks, first = task % blocks * kSpan;
    const int64_t width = std::min(kSpan, e.inner - first);
    double sum[kSpan] = {};
    for (int64_t i = o * e.n; i < (o + 1) * e.n; i++)
      for (int64_t c = 0; c < width; c++) sum[c] += x[i * e.inner + first + c];
    std::copy(sum, sum + width, y + o * e.inner + first);
  });
}

void sum_to(Rank& rank, const char* op, At at, Tensor x, const GradSlot& to) {
  const int missing = x.dim.rank - to.grad.dim.rank;
  for (int d = 0; d < x.dim.rank; d++) {
    if (x.dim[d] == 1 || (d >= missing && to.grad.dim[d - missing] != 1)) continue;
    const Extent e = extent_of(x.dim, d);
    Dims dims = x.dim;
    dims[d] = 1;
    Tensor y = empty(rank, dims, x.dtype, at);
    float_kernel(rank, op, at, x, [&]<class T>(T*) { sum_cpu(e, x.as<T>(), y.as<T>()); });
    x = y;
  }
  copy_elements(rank, op, at, x.dim, view_of(x, x.dim), view_of(to.grad, x.dim), to.add);
}

}  // namespace pith
