// ring_attention: attention when each member of the cp group holds a part of every row. With cp = 1
// it is attention_forward() and attention_backward().
// defines: is_zigzag_part, ring_forward, ring_backward
#pragma once
#include "ops/attention_core.h"

namespace pith {

// Whether `coord` [count] are the coordinates that this member holds of a row cut into 2*cp equal
// chunks: those of chunk r and then those of chunk 2*cp-1-r, r being its place in the group.
bool is_zigzag_part(const Rank& rank, const int32_t* coord, int64_t count);

// `core` holds the local queries, keys and values, which every member has as many of, without bias
// or `visible`. A member sees what it would see if it had the whole rows: out and lse cover all
// their keys, and a key's gradient comes from all their queries.
void ring_forward(Rank& rank, const AttentionCore& core, HeadView out, const Tensor& lse, At at);
void ring_backward(Rank& rank, const AttentionCore& core, HeadView out, const Tensor& lse,
                   HeadView dout, const AttentionGrads& grads, At at);

}  // namespace pith
