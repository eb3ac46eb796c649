// rows: whole rows chosen, repeated and added up.
//   grad   of a choice, the sum over where a row went; of a sum, the choice
#include <algorithm>

#include "ops/ops.h"
#include "ops/views.h"

namespace pith {
namespace {

// Row r of y, of n elements, = or += the sum of rows index[i] of x, i in [begin[r], begin[r+1]) or,
// where begin is undefined, r.
template <class T>
void gather_rows(const Tensor& x, int64_t n, const Tensor& index, const Tensor& begin, Slot<T> y) {
  const int64_t rows = begin.defined() ? begin.dim[0] - 1 : index.numel();
  if (!y.data) return;
  parallel_rows(rows, n * (1 + index.numel() / std::max<int64_t>(1, rows)), [&](int64_t r) {
    const int64_t first = begin.defined() ? begin.i32()[r] : r;
    const int64_t end = begin.defined() ? begin.i32()[r + 1] : r + 1;
    T* to = y.data + r * n;
    if (!y.add) std::fill_n(to, n, T(0));
    for (int64_t i = first; i < end; i++) {
      const T* from = x.as<T>() + index.i32()[i] * n;
      for (int64_t j = 0; j < n; j++) to[j] += from[j];
    }
  });
}

// Row ids[i] of y += row i of x, in the order of i.
template <class T>
void scatter_rows(const Tensor& x, const Tensor& ids, const Tensor& y) {
  const int64_t count = ids.numel(), n = count ? x.numel() / count : 0;
  if (!y.data) return;
  column_blocks(count, n, [&](int64_t first, int64_t width) {
    for (int64_t i = 0; i < count; i++) {
      T* to = y.as<T>() + ids.i32()[i] * n + first;
      const T* from = x.as<T>() + i * n + first;
      for (int64_t j = 0; j < width; j++) to[j] += from[j];
    }
  });
}

int64_t width_of(const Dims& dims) { return dims[0] ? dims.numel() / dims[0] : 0; }

constexpr auto kScatterGrad = []<class T>(Backward<T> b) {
  scatter_rows<T>(b.dy(), b.keep[0], b.zeroed(0));
};
constexpr auto kGatherGrad = [](const auto& b) {
  gather_rows(b.dy(), width_of(b.node.in[0].dim), b.keep[0], b.keep[1], b.to(0));
};

// Rows ids of x, whose first dimension is replaced by those of ids.
Tensor select(const Op& op, const Tensor& x, const Tensor& ids) {
  Dims dims = ids.dim;
  for (int i = 1; i < x.dim.rank; i++) dims[dims.rank++] = x.dim[i];
  Tensor y = op.empty(dims, x.dtype);
  op.on_cpu(x, [&]<class T>(T*) { gather_rows<T>(x, width_of(x.dim), ids, {}, {y.as<T>()}); });
  return y;
}

void check_rows(const Op& op, const Tensor& x, const Tensor& ids, int64_t rows) {
  op.check({{"a defined tensor", x.defined()},
            {"ids of dtype i32 and one dimension", ids.dtype == DType::I32 && ids.dim.rank == 1},
            {"tensors on one device", x.device == ids.device}},
           {&x, &ids});
  op.check_ids("ids", ids, rows);
}

// Rows to pairs or pairs to rows. `need` tells x's shape.
Tensor move_rows(const Op& op, bool to_pairs, const char* need, const Tensor& x,
                 const Dispatched& d) {
  const int64_t P = d.row_of.dim[0], R = d.row_begin.dim[0] - 1;
  op.check({{"row_of I32 [P], pair_of I32 [P] and row_begin I32 [R+1]",
             is_i32(d.row_of, {P}) && is_i32(d.pair_of, {P}) && is_i32(d.row_begin, {R + 1})},
            {need, x.dim.rank == 2 && x.dim[0] == (to_pairs ? R : P)}},
           {&x, &d.row_of, &d.pair_of, &d.row_begin});
  Tensor y = op.empty({to_pairs ? P : R, x.dim[1]}, x.dtype);
  const TensorList pairs = {d.row_of, {}}, rows = {d.pair_of, d.row_begin};
  const TensorList &forth = to_pairs ? pairs : rows, &back = to_pairs ? rows : pairs;
  op.on_cpu(x, [&]<class T>(T*) {
    op.check_offsets("row_begin", d.row_begin, P);
    op.check_ids("row_of", d.row_of, R);
    op.check_ids("pair_of", d.pair_of, P);
    gather_rows<T>(x, x.dim[1], forth[0], forth[1], {y.as<T>()});
  });
  record(op, {x}, {&y}).bx(back, kGatherGrad);
  return y;
}

}  // namespace

Tensor index_select(Rank& rank, Tensor x, Tensor ids, At at) {
  const Op op{rank, "index_select", at};
  check_rows(op, x, ids, x.dim[0]);
  Tensor y = select(op, x, ids);
  record(op, {x}, {&y}).bx({ids}, kScatterGrad);
  return y;
}

Tensor embedding(Rank& rank, Tensor ids, Tensor w, At at) {
  const Op op{rank, "embedding", at};
  op.check({{"ids I32 of at most 4 dimensions",
             ids.dtype == DType::I32 && ids.defined() && ids.dim.rank < kMaxDims},
            {"w [V, D]", w.dim.rank == 2}},
           {&ids, &w});
  op.check_ids("ids", ids, w.dim[0]);
  Tensor y = select(op, w, ids);
  record(op, {w}, {&y}).bw(0, {ids}, kScatterGrad);
  return y;
}

Tensor scatter_add(Rank& rank, Tensor src, Tensor ids, int64_t rows, At at) {
  const Op op{rank, "scatter_add", at};
  check_rows(op, src, ids, rows);
  op.check({{"rows >= 0", rows >= 0}, {"an id a row of src", ids.numel() == src.dim[0]}},
           {&src, &ids});
  Tensor y = zeros(rank, with_size(src.dim, 0, rows), src.dtype, at);
  op.on_cpu(src, [&]<class T>(T*) { scatter_rows<T>(src, ids, y); });
  record(op, {src}, {&y}).bx({ids, {}}, kGatherGrad);
  return y;
}

Tensor expand_rows(Rank& rank, const Dispatched& d, At at) {
  return move_rows({rank, "expand_rows", at}, true, "rows [R, D]", d.rows, d);
}

Tensor reduce_pairs(Rank& rank, Tensor y, const Dispatched& d, At at) {
  return move_rows({rank, "reduce_pairs", at}, false, "y [P, D]", y, d);
}

}  // namespace pith
