// sort: of ids, by CUB, and what it tells of a dispatch.
#include <bit>
#include <cub/device/device_radix_sort.cuh>

#include "core/cuda.cuh"
#include "ops/cpu.h"

namespace pith {

void cuda_sort(
    Rank& rank, const Tensor& ids, i64 limit, const Tensor& sorted, const Tensor& order) {
  i64 n = ids.numel();
  if (n == 0) return;
  const cudaStream_t stream = cuda_of(rank).stream;
  Tensor places = empty(rank, {n}, DType::I32);
  int* place = places.i32();
  cuda_each(rank, n, [=] __device__(i64 i) { place[i] = int(i); });
  int bits = max<int>(1, std::bit_width(u64(limit)));
  size_t bytes = 0;
  auto sort = [&](void* room) {
    cuda_check(cub::DeviceRadixSort::SortPairs(
        room, bytes, ids.i32(), sorted.i32(), places.i32(), order.i32(), n, 0, bits, stream));
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

}
