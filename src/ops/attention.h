// attention: between heads that lie anywhere in memory.
#pragma once
#include "ops/op.h"

namespace pith {

// Head h of position s of row b of the batch begins at at<T>(b, h, s). Steps are in elements.
struct HeadView {
  char* data = nullptr;
  i64 batch = 0, position = 0, head = 0;
  template <class T>
  T* at(i64 b, i64 h, i64 s) const {
    return reinterpret_cast<T*>(data) + b * batch + h * head + s * position;
  }
};

// Row coordinates and ends of documents; both ascend, so that a query sees one range of keys.
struct Positions {
  i64 count = 0;
  const int* coord = nullptr;    // [count]
  const int* doc_end = nullptr;  // of batch row b from b * doc_stride; null: one document
  i64 doc_stride = 0;
};
// The last `count` of a table I32 [1 or 1+B, n]: coordinates, then ends by batch row.
inline Positions positions_of(const Tensor& table, i64 count) {
  i64 n = table.dim[1], begin = n - count;
  return {count, table.i32() + begin, table.dim[0] > 1 ? table.i32() + n + begin : nullptr, n};
}

struct KeyRange {
  i64 begin = 0, end = 0;
  i64 count() const { return begin < end ? end - begin : 0; }
  void cover(KeyRange o) {
    if (o.count() == 0) return;
    if (count() == 0) *this = o;
    begin = begin < o.begin ? begin : o.begin;
    end = end > o.end ? end : o.end;
  }
};

// Inputs, or where their gradients are added if there is data. bias: "position" is the query's.
struct AttentionViews {
  HeadView q, k, v, bias;
};

struct AttentionCore {
  DType dtype = DType::F32;
  i64 batch = 0, heads = 0, kv_heads = 0;
  i64 size = 0, v_size = 0;  // of a head of q and k, and of v
  double scale = 1;
  bool causal = true;
  i64 window = 0;
  Positions query, key;
  AttentionViews in;
};

// The keys that query i of batch row b may see, before any bias.
KeyRange visible_keys(const AttentionCore& core, i64 b, i64 i);

// out and lse [B, H, queries], the log of the sum; 0 and -inf where no key is seen.
void attention_forward(const Op& op, const AttentionCore& core, HeadView out, const Tensor& lse);
// out and lse may be over more keys than the core's.
void attention_backward(const Op& op, const AttentionCore& core, HeadView out, const Tensor& lse,
    HeadView dout, const AttentionViews& grads);

}
