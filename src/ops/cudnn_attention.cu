#include "ops/cudnn_attention.h"

#include <cuda_bf16.h>

#include "core/cuda.cuh"

namespace pith {

// Not -inf, which is NaN once a whole tile of keys is hidden.
void document_bias(Rank& rank, const Tensor& doc_ends, const Tensor& bias) {
  i64 length = doc_ends.dim[1];
  const int* end = doc_ends.i32();
  auto* to = bias.as<__nv_bfloat16>();
  cuda_each<1>(rank, doc_ends.numel(), [=] __device__(i64 query) {
    const int *keys = end + query / length * length, mine = end[query];
    block_each(length, [=](i64 j) { to[query * length + j] = mine == keys[j] ? 0.f : -1e9f; });
  });
}

}
