// embedding: y[i] = w[ids[i]].
//   in     ids I32 [...], up to four dimensions   w [V, D] f32|f64        out  [..., D]
//   keeps  bw: ids            grad  bw: dw[ids[i]] += dy[i], in the order of i
//   errors an id outside [0, V)
//   bitwise run-to-run: yes, for any number of threads
#include <algorithm>

#include "ops/layer_parts.h"
#include "ops/ops.h"

namespace pith {

template <class T>
static void embedding_cpu(const Tensor& ids, const Tensor& w, const Tensor& y) {
  const int64_t D = w.dim[1];
  parallel_rows(ids.numel(), D, [&](int64_t i) {
    std::copy_n(w.as<T>() + ids.i32()[i] * D, D, y.as<T>() + i * D);
  });
}

// Threads divide the columns: a row of dw may be met many times, and in one order.
template <class T>
static void embedding_bw_cpu(const Tensor& dy, const Tensor& ids, T* dw) {
  const int64_t D = dy.cols(), tokens = ids.numel();
  if (!dw) return;
  column_blocks(tokens, D, [&](int64_t first, int64_t n) {
    for (int64_t i = 0; i < tokens; i++) {
      T* to = dw + ids.i32()[i] * D + first;
      const T* from = dy.as<T>() + i * D + first;
      for (int64_t j = 0; j < n; j++) to[j] += from[j];
    }
  });
}

static void embedding_bw(Rank& rank, Node& node) {
  float_kernel(rank, node, [&]<class T>(T*) {
    embedding_bw_cpu(node.grad[0], node.bw_keep[0], zeroed(rank, node, 0).as<T>());
  });
}

Tensor embedding(Rank& rank, Tensor ids, Tensor w, At at) {
  check(rank, "embedding", at,
        {{"ids I32 of at most 4 dimensions",
          ids.dtype == DType::I32 && ids.defined() && ids.dim.rank < kMaxDims},
         {"w [V, D]", w.dim.rank == 2}},
        {&ids, &w});
  Dims dims = ids.dim;
  dims[dims.rank++] = w.dim[1];
  Tensor y = empty(rank, dims, w.dtype, at);
  float_kernel(rank, "embedding", at, w, [&]<class T>(T*) {
    check_ids(rank, "embedding", at, "ids", ids, w.dim[0]);
    embedding_cpu<T>(ids, w, y);
  });
  if (Node* n = record(rank, "embedding", at, {w}, {&y})) {
    n->bw_keep = {ids};
    set_backward<nullptr, embedding_bw>(*n, {0});
  }
  return y;
}

}  // namespace pith
