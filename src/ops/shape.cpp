// shape: the same elements in another order, shape or tensor.
//   grad   the elements' gradients, moved back
#include <algorithm>

#include "ops/ops.h"
#include "ops/views.h"

namespace pith {
namespace {

// x from index `begin` of a dimension on.
View part_of(const Tensor& x, int dim, int64_t begin) {
  View part = view_of(x);
  part.begin = begin * part.step[dim];
  return part;
}

// The elements that a view, of each at most once, has in the index space `dims`.
Tensor taken(const Op& op, const View& part, const Dims& dims) {
  Tensor y = op.empty(dims, part.x.dtype);
  op.on_cpu(part.x, [&]<class T>(T*) { copy_elements<T>(dims, part, view_of(y), false); });
  const int64_t* s = part.step;
  record(op, {part.x}, {&y})
      .numbers({s[0], s[1], s[2], s[3], s[4], part.begin})
      .bx({}, []<class T>(Backward<T> b) {
        View to{b.zeroed(0), b.node.i[kMaxDims]};
        std::copy_n(b.node.i, kMaxDims, to.step);
        copy_elements<T>(b.dy().dim, view_of(b.dy()), to, true);
      });
  return y;
}

}  // namespace

Tensor permute(Rank& rank, Tensor x, Dims order, At at) {
  const Op op{rank, "permute", at};
  op.check_alike({&x});
  op.check({{"one entry of order a dimension", order.rank == x.dim.rank}}, {&x});
  const View whole = view_of(x);
  View part{x};
  Dims dims = order;
  unsigned seen = 0;
  for (int i = 0; i < order.rank; i++) {
    const bool fits = order[i] >= 0 && order[i] < order.rank && !(seen >> order[i] & 1);
    op.check({{"each dimension once in order", fits}}, {&x});
    seen |= 1u << order[i];
    dims[i] = x.dim[int(order[i])];
    part.step[i] = whole.step[order[i]];
  }
  return taken(op, part, dims);
}

Tensor reshape(Rank& rank, Tensor x, Dims dims, At at) {
  int64_t* end = dims.size + dims.rank;
  const bool sizes = dims.rank > 0 && *std::min_element(dims.size, end) >= -1;
  Op{rank, "reshape", at}.check(
      {{"a defined tensor", x.defined()},
       {"sizes >= 0, at most one of them -1", sizes && std::count(dims.size, end, -1) <= 1}},
      {&x});
  return x.view(dims, at);
}

Tensor slice(Rank& rank, Tensor x, int dim, int64_t begin, int64_t end, At at) {
  const Op op{rank, "slice", at};
  const int d = op.dim_of(x, dim);
  const string need =
      text("0 <= begin <= end <= size for [%ld,%ld) of dimension %d", begin, end, d);
  op.check({{need.c_str(), begin >= 0 && begin <= end && end <= x.dim[d]}}, {&x});
  return taken(op, part_of(x, d, begin), with_size(x.dim, d, end - begin));
}

TensorList split(Rank& rank, Tensor x, int dim, Dims sizes, At at) {
  const Op op{rank, "split", at};
  const int d = op.dim_of(x, dim);
  int64_t total = 0;
  for (int i = 0; i < sizes.rank; i++) total += sizes[i];
  op.check({{"sizes that sum to the dimension's", sizes.rank > 0 && total == x.dim[d]}}, {&x});
  TensorList ys;
  int64_t begin = 0;
  for (int i = 0; i < sizes.rank; begin += sizes[i++])
    ys.push(slice(rank, x, d, begin, begin + sizes[i], at));
  return ys;
}

Tensor concat(Rank& rank, TensorList xs, int dim, At at) {
  const Op op{rank, "concat", at};
  op.check({{"at least one tensor", xs.count > 0}}, {&xs[0]});
  const int d = op.dim_of(xs[0], dim);
  Dims dims = with_size(xs[0].dim, d, 0);
  for (int k = 0; k < xs.count; k++) {
    op.check_alike({&xs[0], &xs[k]});
    const bool fits = with_size(xs[k].dim, d, xs[0].dim[d]) == xs[0].dim;
    op.check({{"equal sizes but for the one dimension", fits}}, {&xs[0], &xs[k]});
    dims[d] += xs[k].dim[d];
  }
  Tensor y = op.empty(dims, xs[0].dtype);
  op.on_cpu(y, [&]<class T>(T*) {
    int64_t begin = 0;
    for (int k = 0; k < xs.count; begin += xs[k++].dim[d])
      copy_elements<T>(xs[k].dim, view_of(xs[k]), part_of(y, d, begin), false);
  });
  record(op, {xs[0], xs[1], xs[2], xs[3], xs[4], xs[5], xs[6], xs[7]}, {&y})
      .numbers({d})
      .bx({}, []<class T>(Backward<T> b) {
        const int along = int(b.node.i[0]);
        int64_t begin = 0;
        for (int k = 0; k < b.node.in.count && b.node.in[k].defined();
             begin += b.node.in[k++].dim[along]) {
          const GradSlot dx = b.slot(k);
          if (dx.grad.defined())
            copy_elements<T>(dx.grad.dim, part_of(b.dy(), along, begin), view_of(dx.grad), dx.add);
        }
      });
  return y;
}

Tensor repeat(Rank& rank, Tensor x, int dim, int64_t times, At at) {
  const Op op{rank, "repeat", at};
  const int d = op.dim_of(x, dim);
  op.check({{"times >= 0", times >= 0}}, {&x});
  const Extent e = extent_of(x.dim, d);
  Tensor ones = op.empty({1, times, 1}, x.dtype);
  fill_constant(rank, ones, 1, at);
  return mul(rank, x.view({e.outer, 1, e.n * e.inner}), ones, at)
      .view(with_size(x.dim, d, x.dim[d] * times), at);
}

}  // namespace pith
