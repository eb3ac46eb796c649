// cudnn_attention: BF16 attention of a packed projection by cuDNN; results repeat bit for bit.
#pragma once
#include "core/rank.h"

namespace pith {

// window: as AttentionMask's.
struct AttentionShape {
  i64 batch = 0, length = 0, heads = 0, kv_heads = 0, size = 0;
  bool causal = true;
  i64 window = 0;
  double scale = 1;
  bool operator==(const AttentionShape&) const = default;
};
// Whether cuDNN takes it.
bool cudnn_attention_fits(const AttentionShape& s, bool documents);

// qkv [B*S, (H+2K)*N] and out [B*S, H*N] BF16, lse F32 [B, H, S], doc_ends as AttentionMask's; the
// backward writes all of dqkv.
struct AttentionTensors {
  Tensor qkv, doc_ends, out, lse, dout, dqkv;
};
void cudnn_attention_forward(Rank& rank, const AttentionShape& s, const AttentionTensors& t);
void cudnn_attention_backward(Rank& rank, const AttentionShape& s, const AttentionTensors& t);

// For those two: bias BF16 [B, S, S], which hides the keys of other documents.
void document_bias(Rank& rank, const Tensor& doc_ends, const Tensor& bias);

}
