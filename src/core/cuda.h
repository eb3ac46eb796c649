// cuda: a rank's GPU, in builds with CUDA. A failed call of CUDA's is an Error.
// Work is queued on the rank's stream; what reads back waits for it.
#pragma once
#include "core/rank.h"

namespace pith {

// "NVIDIA H100 80GB HBM3, sm_90, 79.2 GiB"; without one, `why`.
vector<string> cuda_devices(string& why);

Cuda* cuda_open(int device);
void cuda_close(Cuda* cuda);

// Of the device's pool; null if there is not enough.
void* cuda_allocate(Cuda& cuda, i64 bytes);
void cuda_free(Cuda& cuda, void* data);
void cuda_zero(Rank& rank, void* data, i64 bytes);
// Between any memories; waits for the stream.
void cuda_copy(Rank& rank, void* to, const void* from, i64 bytes);
// To the host, from any thread; of what the rank's stream has done at the last cuda_sync.
void cuda_read(Cuda& cuda, void* to, const void* from, i64 bytes);
void cuda_sync(Cuda& cuda);
void cuda_add(Rank& rank, const Tensor& to, const Tensor& from);

inline Cuda& cuda_of(const Rank& rank) { return *rank.allocator->cuda; }

}
