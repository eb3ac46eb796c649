#include <algorithm>

#include "ops/cpu.h"

namespace pith {
namespace {

// x from index `begin` of a dimension on.
View part_of(const Tensor& x, int dim, i64 begin) {
  View part = view_of(x);
  part.begin = begin * part.step[dim];
  return part;
}

// The elements that a view, of each at most once, has in the index space `dims`.
Tensor taken(const Op& op, const View& part, const Dims& dims) {
  Tensor y = op.empty(dims, part.x.dtype);
  op.typed(part.x, [&]<class T>(T*) { copy_elements<T>(op, dims, part, view_of(y), false); });
  const i64* s = part.step;
  record(op, {part.x}, {&y})
      .numbers({s[0], s[1], s[2], s[3], s[4], part.begin})
      .bx({}, []<class T>(Backward<T> b) {
        View to{b.zeroed(0), b.node.i[kMaxDims]};
        std::copy_n(b.node.i, kMaxDims, to.step);
        copy_elements<T>(b.op(), b.dy().dim, view_of(b.dy()), to, true);
      });
  return y;
}

// Row ids[i] of y += row i of x, in the order of i.
template <class T>
void scatter_rows(const Op& op, const Tensor& x, const Tensor& ids, const Tensor& y) {
  i64 count = ids.numel(), n = count ? x.numel() / count : 0;
  if (!y.data) return;
  if (x.on_gpu()) return OnCuda<T>::scatter_rows(op.rank, x, n, ids, y);
  column_blocks(count, n, [&](i64 first, i64 width) {
    for (i64 i = 0; i < count; i++) {
      T* to = y.as<T>() + ids.i32()[i] * n + first;
      const T* from = x.as<T>() + i * n + first;
      for (i64 j = 0; j < width; j++) to[j] += from[j];
    }
  });
}

i64 width_of(const Dims& dims) { return dims[0] ? dims.numel() / dims[0] : 0; }

// Rows ids of x, whose first dimension is replaced by those of ids.
Tensor select(const Op& op, const Tensor& x, const Tensor& ids) {
  op.check_ids("ids", ids, x.dim[0]);
  Dims dims = ids.dim;
  for (int i = 1; i < x.dim.rank; i++) dims[dims.rank++] = x.dim[i];
  Tensor y = op.empty(dims, x.dtype);
  op.typed(x, [&]<class T>(T*) { gather_rows<T>(op, x, width_of(x.dim), ids, {}, {y}); });
  record(op, {x}, {&y}).bw(0, {ids}, []<class T>(Backward<T> b) {
    scatter_rows<T>(b.op(), b.dy(), b.keep[0], b.zeroed(0));
  });
  return y;
}

void check_rows(const Op& op, const Tensor& x, const Tensor& ids) {
  op.check({{"a defined tensor", x.defined()},
               {"ids of dtype i32 and one dimension", ids.dtype == DType::I32 && ids.dim.rank == 1},
               {"tensors on one device", x.device == ids.device}},
      {&x, &ids});
}

}

Tensor permute(Rank& rank, Tensor x, Dims order, At at) {
  Op op{rank, "permute", at};
  op.check_alike({&x});
  op.check({{"one entry of order a dimension", order.rank == x.dim.rank}}, {&x});
  View whole = view_of(x);
  View part{x};
  Dims dims = order;
  unsigned seen = 0;
  for (int i = 0; i < order.rank; i++) {
    bool fits = order[i] >= 0 && order[i] < order.rank && !(seen >> order[i] & 1);
    op.check({{"each dimension once in order", fits}}, {&x});
    seen |= 1u << order[i];
    dims[i] = x.dim[int(order[i])];
    part.step[i] = whole.step[order[i]];
  }
  return taken(op, part, dims);
}

Tensor reshape(Rank& rank, Tensor x, Dims dims, At at) {
  i64* end = dims.size + dims.rank;
  bool sizes = dims.rank > 0 && *std::min_element(dims.size, end) >= -1;
  Op{rank, "reshape", at}.check(
      {{"a defined tensor", x.defined()},
          {"sizes >= 0, at most one of them -1", sizes && std::count(dims.size, end, -1) <= 1}},
      {&x});
  return x.view(dims, at);
}

Tensor slice(Rank& rank, Tensor x, int dim, i64 begin, i64 end, At at) {
  Op op{rank, "slice", at};
  int d = op.dim_of(x, dim);
  string need = text("0 <= begin <= end <= size for [%ld,%ld) of dimension %d", begin, end, d);
  op.check({{need.c_str(), begin >= 0 && begin <= end && end <= x.dim[d]}}, {&x});
  return taken(op, part_of(x, d, begin), with_size(x.dim, d, end - begin));
}

TensorList split(Rank& rank, Tensor x, int dim, Dims sizes, At at) {
  Op op{rank, "split", at};
  int d = op.dim_of(x, dim);
  i64 total = 0;
  for (int i = 0; i < sizes.rank; i++) total += sizes[i];
  op.check({{"sizes that sum to the dimension's", sizes.rank > 0 && total == x.dim[d]}}, {&x});
  TensorList ys;
  i64 begin = 0;
  for (int i = 0; i < sizes.rank; begin += sizes[i++])
    ys.push(slice(rank, x, d, begin, begin + sizes[i], at));
  return ys;
}

Tensor concat(Rank& rank, TensorList xs, int dim, At at) {
  Op op{rank, "concat", at};
  op.check({{"at least one tensor", xs.count > 0}}, {&xs[0]});
  int d = op.dim_of(xs[0], dim);
  Dims dims = with_size(xs[0].dim, d, 0);
  for (int k = 0; k < xs.count; k++) {
    op.check_alike({&xs[0], &xs[k]});
    bool fits = with_size(xs[k].dim, d, xs[0].dim[d]) == xs[0].dim;
    op.check({{"equal sizes but for the one dimension", fits}}, {&xs[0], &xs[k]});
    dims[d] += xs[k].dim[d];
  }
  Tensor y = op.empty(dims, xs[0].dtype);
  op.typed(y, [&]<class T>(T*) {
    i64 begin = 0;
    for (int k = 0; k < xs.count; begin += xs[k++].dim[d])
      copy_elements<T>(op, xs[k].dim, view_of(xs[k]), part_of(y, d, begin), false);
  });
  record(op, {xs[0], xs[1], xs[2], xs[3], xs[4], xs[5], xs[6], xs[7]}, {&y})
      .numbers({d})
      .bx({}, []<class T>(Backward<T> b) {
        int along = int(b.node.i[0]);
        i64 begin = 0;
        for (int k = 0; k < b.node.in.count && b.node.in[k].defined();
             begin += b.node.in[k++].dim[along]) {
          GradSlot dx = b.slot(k);
          if (dx.grad.defined())
            copy_elements<T>(
                b.op(), dx.grad.dim, part_of(b.dy(), along, begin), view_of(dx.grad), dx.add);
        }
      });
  return y;
}

Tensor repeat(Rank& rank, Tensor x, int dim, i64 times, At at) {
  Op op{rank, "repeat", at};
  int d = op.dim_of(x, dim);
  op.check({{"times >= 0", times >= 0}}, {&x});
  const Extent e = extent_of(x.dim, d);
  Tensor ones = op.empty({1, times, 1}, x.dtype);
  fill_constant(rank, ones, 1, at);
  return mul(rank, x.view({e.outer, 1, e.n * e.inner}), ones, at)
      .view(with_size(x.dim, d, x.dim[d] * times), at);
}

Tensor index_select(Rank& rank, Tensor x, Tensor ids, At at) {
  Op op{rank, "index_select", at};
  check_rows(op, x, ids);
  return select(op, x, ids);
}

Tensor embedding(Rank& rank, Tensor ids, Tensor w, At at) {
  Op op{rank, "embedding", at};
  op.check({{"ids I32 of at most 4 dimensions",
                ids.dtype == DType::I32 && ids.defined() && ids.dim.rank < kMaxDims},
               {"w [V, D]", w.dim.rank == 2}, {"tensors on one device", ids.device == w.device}},
      {&ids, &w});
  return select(op, w, ids);
}

Tensor scatter_add(Rank& rank, Tensor src, Tensor ids, i64 rows, At at) {
  Op op{rank, "scatter_add", at};
  check_rows(op, src, ids);
  op.check_ids("ids", ids, rows);
  op.check(
      {{"rows >= 0", rows >= 0}, {"an id a row of src", ids.numel() == src.dim[0]}}, {&src, &ids});
  Tensor y = zeros(rank, with_size(src.dim, 0, rows), src.dtype, at);
  op.typed(src, [&]<class T>(T*) { scatter_rows<T>(op, src, ids, y); });
  record(op, {src}, {&y}).bx({ids}, []<class T>(Backward<T> b) {
    gather_rows<T>(b.op(), b.dy(), width_of(b.node.in[0].dim), b.keep[0], {}, b.slot(0));
  });
  return y;
}

}
