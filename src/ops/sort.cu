// sort: of ids, by CUB, and what it tells of a dispatch.
#include <bit>
#include <cub/device/device_radix_sort.cuh>

#include "core/cuda.cuh"
#include "ops/cpu.h"

namespace pith {

void cuda_sort(Rank& rank, const Tensor& ids, i64 limit, const Tensor& sorted,
               const Tensor& order) {
  i64 n = ids.numel();
  if (n == 0) return;
  const cudaStream_t stream = cuda_of(rank).stream;
  Tensor places = empty(rank, {n}, DType::I32);
  int* place = places.i32();
  cuda_each(rank, n, [=] __device__(i64 i) { place[i] = int(i); });
  int bits = max<int>(1, std::bit_width(u64(limit)));
  size_t bytes = 0;
  auto sort = [&](void* room) {
    cuda_check(cub::DeviceRadixSort::SortPairs(room, bytes, ids.i32(), sorted.i32(), places.i32(),
                                               order.i32(), n, 0, bits, stream));
  };
  sort(nullptr);
  Tensor room = empty(rank, {i64(bytes)}, DType::U8);
  sort(room.data);
}

Tensor cuda_dispatch(Rank& rank, const Tensor& ids, int experts, Dispatched& d) {
  i64 T = ids.dim[0], k = ids.dim[1], P = T * k;
  Tensor sorted = empty(rank, {P}, DType::I32), order = empty(rank, {P}, DType::I32);
  cuda_sort(rank, ids, experts, sorted, order);
  d.row_of = empty(rank, {P}, DType::I32);
  d.pair_of = empty(rank, {P}, DType::I32);
  d.offsets = empty(rank, {experts + 1}, DType::I32);
  d.row_begin = empty(rank, {T + 1}, DType::I32);
  const int *from = order.i32(), *expert = sorted.i32();
  int *row_of = d.row_of.i32(), *pair_of = d.pair_of.i32();
  int *offsets = d.offsets.i32(), *row_begin = d.row_begin.i32();
  cuda_each(rank, P, [=] __device__(i64 place) {
    row_of[place] = int(from[place] / k);
    pair_of[from[place]] = int(place);
  });
  cuda_each(rank, max<i64>(T, experts) + 1, [=] __device__(i64 i) {
    if (i <= T) row_begin[i] = int(i * k);
    if (i > experts) return;
    i64 low = 0, high = P;  // the first pair of expert i or a later one
    while (low < high) {
      i64 middle = (low + high) / 2;
      if (expert[middle] < i)
        low = middle + 1;
      else
        high = middle;
    }
    offsets[i] = int(low);
  });
  return order;
}

struct Cuts {
  const int* of[TensorList::kMax];
  int count;
  explicit Cuts(const TensorList& offsets) : count(offsets.count) {
    for (int i = 0; i < count; i++) of[i] = offsets[i].i32();
  }
};

Tensor cuda_join_offsets(Rank& rank, const TensorList& offsets) {
  Tensor all = empty(rank, offsets[0].dim, DType::I32);
  const Cuts cuts(offsets);
  int* sum = all.i32();
  cuda_each(rank, all.numel(), [=] __device__(i64 e) {
    int first = 0;
    for (int i = 0; i < cuts.count; i++) first += cuts.of[i][e];
    sum[e] = first;
  });
  return all;
}

// A pair's place grows by the pairs that the parts before its own have up to its expert, and those
// after it have of earlier experts.
Tensor cuda_join(Rank& rank, const TensorList& x, const TensorList& index,
                 const TensorList& offsets) {
  constexpr int kPack = 8;
  i64 packs = x[0].cols() / kPack, total = 0;
  auto pairs = [&](int i) { return index[i].defined() ? index[i].numel() : x[i].dim[0]; };
  for (int i = 0; i < x.count; i++) total += pairs(i);
  Tensor all = empty(rank, {total, x[0].cols()}, DType::BF16);
  BF16* to = all.as<BF16>();
  const Cuts cuts(offsets);
  i64 experts = offsets[0].dim[0] - 1;
  for (int part = 0; part < x.count; part++) {
    const BF16* from = x[part].as<BF16>();
    const int* row = index[part].i32();
    cuda_rows(rank, pairs(part), packs, [=] __device__(i64 p, Team team) {
      i64 expert = 0, end = experts;
      while (end - expert > 1) {
        i64 middle = (expert + end) / 2;
        (cuts.of[part][middle] <= p ? expert : end) = middle;
      }
      i64 place = p;
      for (int i = 0; i < cuts.count; i++)
        if (i != part) place += cuts.of[i][expert + (i < part)];
      i64 source = row ? row[p] : p;
      team.each(packs, [&](i64 j) {
        pack<kPack>(to + place * packs * kPack, j) = pack<kPack>(from + source * packs * kPack, j);
      });
    });
  }
  return all;
}

}
