// grouped: BF16 products by expert on the GPU. offsets I32 [E+1], on the device, say which rows are
// an expert's and are read there: nothing waits for the host. Empty experts are ordinary. `tile` is
// one of kGroupedTiles ways to cut the product; -1: by its shape.
#pragma once
#include "core/rank.h"

namespace pith {

constexpr int kGroupedTiles = 6;

// The GPU moves 16 bytes at once: sizes are multiples of 8, addresses of 16 bytes.
inline bool grouped_fits(i64 in, i64 out) { return in * out > 0 && (in | out) % 8 == 0; }

// y[r] = w[e] x[r]; x BF16 [P, in], w BF16 [E, out, in], y BF16 [P, out].
void grouped_forward(Rank& rank, const Tensor& x, const Tensor& w, const Tensor& offsets,
    const Tensor& y, int tile = -1);
// dx[r] = dy[r] w[e]; dy BF16 [P, out], dx BF16 [P, in].
void grouped_input_grad(Rank& rank, const Tensor& dy, const Tensor& w, const Tensor& offsets,
    const Tensor& dx, int tile = -1);
// dw[e] += dy^T x over the expert's rows; dw F32 [E, out, in].
void grouped_weight_grad(Rank& rank, const Tensor& dy, const Tensor& x, const Tensor& offsets,
    const Tensor& dw, int tile = -1);

}
