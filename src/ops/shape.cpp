// shape: the same elements in another order, another shape, or another tensor.
//   in     f32|f64; reshape any dtype; ids i32 [n]
//   out    as ops.h says; a copy, but for reshape, which shares its input's storage and gradient
//   keeps  ids             grad  += the elements' gradients, moved back; repeat: summed over copies
//   errors sizes, ranges, ids or dimensions that do not fit; dtypes or devices differ
//   bitwise run-to-run: yes, for any number of threads
#include <algorithm>

#include "ops/general.h"
#include "ops/ops.h"

namespace pith {
namespace {

// x from index `begin` of a dimension on.
View part_of(const Tensor& x, int dim, int64_t begin) {
  View part = view_of(x, x.dim);
  part.offset = begin * part.step[dim];
  return part;
}

// i: the view's steps and offset.
void taken_bx(Rank& rank, Node& node) {
  const Tensor& dy = node.grad[0];
  View part{zeroed(rank, node, 0), node.i[kMaxDims]};
  std::copy(node.i, node.i + kMaxDims, part.step);
  copy_elements(rank, node.op, node.at, dy.dim, view_of(dy, dy.dim), part, true);
}

// The elements that a view, of each at most once, has in the index space `dims`.
Tensor taken(Rank& rank, const char* op, At at, const View& part, const Dims& dims) {
  Tensor y = empty(rank, dims, part.x.dtype, at);
  copy_elements(rank, op, at, dims, part, view_of(y, dims), false);
  if (Node* node = record_op(rank, op, at, {part.x}, y, taken_bx)) {
    std::copy(part.step, part.step + kMaxDims, node->i);
    node->i[kMaxDims] = part.offset;
  }
  return y;
}

// i: the dimension.
void concat_bx(Rank& rank, Node& node) {
  const int dim = int(node.i[0]);
  int64_t begin = 0;
  for (int k = 0; k < node.in.count && node.in[k].defined(); k++) {
    const Dims& dims = node.in[k].dim;
    const GradSlot dx = grad_slot(rank, node.in[k], node.at);
    if (dx.grad.defined())
      copy_elements(rank, node.op, node.at, dims, part_of(node.grad[0], dim, begin),
                    view_of(dx.grad, dims), dx.add);
    begin += dims[dim];
  }
}

void check_rows(const Rank& rank, const char* op, At at, const Tensor& x, const Tensor& ids,
                int64_t rows) {
  check(rank, op, at,
        {{"a defined tensor", x.defined()},
         {"ids of dtype i32 and one dimension", ids.dtype == DType::I32 && ids.dim.rank == 1},
         {"tensors on one device", x.device == ids.device}},
        {&x, &ids});
  need_cpu(op, at, ids);
  check_ids(rank, op, at, "ids", ids, rows);
}

// Row i of `to` (+)= row ids[i] of x or, if not `take`, row ids[i] of `to` (+)= row i of x, in the
// order of i; columns are divided among the threads.
template <class T>
void move_rows_cpu(const Tensor& x, const Tensor& ids, Slot<T> to, bool take) {
  const int64_t n = extent_of(x.dim, 0).inner;
  column_blocks(ids.numel(), n, [&](int64_t first, int64_t count) {
    for (int64_t i = 0; i < ids.numel(); i++) {
      const int64_t id = ids.i32()[i];
      const T* from = x.as<T>() + (take ? id : i) * n + first;
      const int64_t at = (take ? i : id) * n + first;
      for (int64_t j = 0; j < count; j++) to.put(at + j, from[j]);
    }
  });
}

template <bool take>
void move_rows_bx(Rank& rank, Node& node) {
  const Tensor dx = zeroed(rank, node, 0);
  float_kernel(rank, node, [&]<class T>(T*) {
    move_rows_cpu<T>(node.grad[0], node.bx_keep[0], {dx.as<T>(), true}, take);
  });
}

}  // namespace

Tensor permute(Rank& rank, Tensor x, Dims order, At at) {
  check_alike(rank, "permute", at, {&x});
  check(rank, "permute", at, {{"one entry of order a dimension", order.rank == x.dim.rank}}, {&x});
  const View whole = view_of(x, x.dim);
  View part{x};
  Dims dims = order;
  unsigned seen = 0;
  for (int i = 0; i < order.rank; i++) {
    const bool fits = order[i] >= 0 && order[i] < order.rank && !(seen >> order[i] & 1);
    check(rank, "permute", at, {{"each dimension once in order", fits}}, {&x});
    seen |= 1u << order[i];
    dims[i] = x.dim.size[order[i]];
    part.step[i] = whole.step[order[i]];
  }
  return taken(rank, "permute", at, part, dims);
}

Tensor reshape(Rank& rank, Tensor x, Dims dims, At at) {
  int64_t* end = dims.size + dims.rank;
  const bool sizes = dims.rank > 0 && *std::min_element(dims.size, end) >= -1;
  check(rank, "reshape", at,
        {{"a defined tensor", x.defined()},
         {"sizes >= 0, at most one of them -1", sizes && std::count(dims.size, end, -1) <= 1}},
        {&x});
  return x.view(dims, at);
}

Tensor slice(Rank& rank, Tensor x, int dim, int64_t begin, int64_t end, At at) {
  const int d = dim_of(rank, "slice", at, x, dim);
  const string need =
      text("0 <= begin <= end <= size for [%ld,%ld) of dimension %d", long(begin), long(end), d);
  check(rank, "slice", at, {{need.c_str(), begin >= 0 && begin <= end && end <= x.dim[d]}}, {&x});
  Dims dims = x.dim;
  dims[d] = end - begin;
  return taken(rank, "slice", at, part_of(x, d, begin), dims);
}

TensorList split(Rank& rank, Tensor x, int dim, Dims sizes, At at) {
  const int d = dim_of(rank, "split", at, x, dim);
  int64_t total = 0;
  for (int i = 0; i < sizes.rank; i++) total += sizes[i];
  check(rank, "split", at,
        {{"sizes that sum to the dimension's", sizes.rank > 0 && total == x.dim[d]}}, {&x});
  TensorList ys;
  int64_t begin = 0;
  for (int i = 0; i < sizes.rank; begin += sizes[i++])
    ys.push(slice(rank, x, d, begin, begin + sizes[i], at));
  return ys;
}

Tensor concat(Rank& rank, TensorList xs, int dim, At at) {
  check(rank, "concat", at, {{"at least one tensor", xs.count > 0}}, {&xs[0]});
  const int d = dim_of(rank, "concat", at, xs[0], dim);
  Dims dims = xs[0].dim;
  dims[d] = 0;
  for (int k = 0; k < xs.count; k++) {
    check_alike(rank, "concat", at, {&xs[0], &xs[k]});
    Dims others = xs[k].dim;
    others[d] = xs[0].dim[d];
    check(rank, "concat", at, {{"equal sizes but for the one dimension", others == xs[0].dim}},
          {&xs[0], &xs[k]});
    dims[d] += xs[k].dim[d];
  }
  Tensor y = empty(rank, dims, xs[0].dtype, at);
  for (int64_t k = 0, begin = 0; k < xs.count; begin += xs[k++].dim[d])
    copy_elements(rank, "concat", at, xs[k].dim, view_of(xs[k], xs[k].dim), part_of(y, d, begin),
                  false);
  Node* node = record_op(rank, "concat", at,
                         {xs[0], xs[1], xs[2], xs[3], xs[4], xs[5], xs[6], xs[7]}, y, concat_bx);
  if (node) node->i[0] = d;
  return y;
}

Tensor repeat(Rank& rank, Tensor x, int dim, int64_t times, At at) {
  const int d = dim_of(rank, "repeat", at, x, dim);
  check(rank, "repeat", at, {{"times >= 0", times >= 0}}, {&x});
  Dims dims = x.dim;
  dims[d] *= times;
  // Broadcast, of a choice that is never the zero.
  const Extent e = extent_of(x.dim, d);
  const Tensor never = zeros(rank, {1, times, 1}, DType::U8, at);
  const Tensor zero = zeros(rank, {1}, x.dtype, at);
  return where(rank, never, zero, x.view({e.outer, 1, e.n * e.inner}), at).view(dims, at);
}

Tensor index_select(Rank& rank, Tensor x, Tensor ids, At at) {
  check_rows(rank, "index_select", at, x, ids, x.dim[0]);
  Dims dims = x.dim;
  dims[0] = ids.numel();
  Tensor y = empty(rank, dims, x.dtype, at);
  float_kernel(rank, "index_select", at, x,
               [&]<class T>(T*) { move_rows_cpu<T>(x, ids, {y.as<T>()}, true); });
  record_op(rank, "index_select", at, {x}, y, move_rows_bx<false>, {{ids}});
  return y;
}

Tensor scatter_add(Rank& rank, Tensor src, Tensor ids, int64_t rows, At at) {
  check_rows(rank, "scatter_add", at, src, ids, rows);
  check(rank, "scatter_add", at,
        {{"rows >= 0", rows >= 0}, {"an id a row of src", ids.numel() == src.dim[0]}},
        {&src, &ids});
  Dims dims = src.dim;
  dims[0] = rows;
  Tensor y = zeros(rank, dims, src.dtype, at);
  float_kernel(rank, "scatter_add", at, src, [&]<class T>(T*) {
    move_rows_cpu<T>(src, ids, {y.as<T>(), true}, false);
  });
  record_op(rank, "scatter_add", at, {src}, y, move_rows_bx<true>, {{ids}});
  return y;
}

}  // namespace pith
