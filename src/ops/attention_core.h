// attention_core: softmax attention between heads that lie anywhere in memory: what every form of
// attention comes down to, the ring included.
// defines: HeadView, Positions, positions_of, KeyRange, AttentionCore, visible_keys,
// attention_forward, AttentionGrads, attention_backward
#pragma once
#include "ops/ops.h"

namespace pith {

// Head h of position s of row b of the batch begins at at<T>(b, h, s). Steps are in elements.
struct HeadView {
  char* data = nullptr;
  int64_t batch = 0, position = 0, head = 0;
  template <class T>
  T* at(int64_t b, int64_t h, int64_t s) const {
    return reinterpret_cast<T*>(data) + b * batch + h * head + s * position;
  }
};

// Row coordinates of a block of positions and the ends of their documents; both ascend, so that
// what a query sees is one range of keys.
struct Positions {
  int64_t count = 0;
  const int32_t* coord = nullptr;    // [count]
  const int32_t* doc_end = nullptr;  // of batch row b from b * doc_stride; null: one document
  int64_t doc_stride = 0;
};
// Positions [begin, begin + count) of a table I32 [1 or 1+B, n]: coordinates and, by batch row,
// ends.
inline Positions positions_of(const Tensor& table, int64_t begin, int64_t count) {
  const int32_t* ends = table.dim[0] > 1 ? table.i32() + table.dim[1] + begin : nullptr;
  return {count, table.i32() + begin, ends, table.dim[1]};
}

struct KeyRange {
  int64_t begin = 0, end = 0;
  int64_t count() const { return begin < end ? end - begin : 0; }
  // Grows to hold `o` too.
  void cover(KeyRange o) {
    if (o.count() == 0) return;
    if (count() == 0) *this = o;
    begin = begin < o.begin ? begin : o.begin;
    end = end > o.end ? end : o.end;
  }
};

// Queries of one block against keys of one block.
struct AttentionCore {
  DType dtype = DType::F32;
  int64_t batch = 0;
  int heads = 0, kv_heads = 0;  // kv_heads divides heads
  int size = 0, v_size = 0;     // elements of a head of q and k, and of v
  double scale = 1;
  bool causal = true;
  int window = 0;
  Positions query, key;
  HeadView q, k, v;        // read only
  HeadView bias, visible;  // "position" is the query's; batch or head 0: broadcast; visible: U8
};

// The keys that query i of batch row b may see, before `visible`.
KeyRange visible_keys(const AttentionCore& core, int64_t b, int64_t i);

// out = softmax(scale q k^T + bias) v and lse [B, H, queries] = log of the sum of exponentials. A
// query that sees nothing gives out = 0 and lse = -inf.
void attention_forward(Rank& rank, const AttentionCore& core, HeadView out, const Tensor& lse,
                       At at);

// Where gradients are added; a part without data is left out.
struct AttentionGrads {
  HeadView q, k, v, bias;
};
// From the final out and lse, which may cover more keys than this block's: the gradients of this
// block's part of the sum.
void attention_backward(Rank& rank, const AttentionCore& core, HeadView out, const Tensor& lse,
                        HeadView dout, const AttentionGrads& grads, At at);

}  // namespace pith
