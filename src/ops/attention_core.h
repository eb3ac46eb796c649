// attention_core: softmax attention between heads that lie anywhere in memory, on the CPU: what
// every form of attention comes down to, the ring included.
// defines: HeadView, Positions, KeyRange, AttentionCore, visible_keys, attention_forward,
// AttentionGrads, attention_backward
#pragma once
#include "ops/ops.h"

namespace pith {

// Element n of a head is at(b, h, s)[n]: of head h of position s of row b of the batch.
template <class T>
struct HeadView {
    T* data = nullptr;
    int64_t batch = 0, position = 0, head = 0;
    T* at(int64_t b, int64_t h, int64_t s) const {
        return data + b * batch + h * head + s * position;
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

struct KeyRange {
    int64_t begin = 0, end = 0;
    bool empty() const { return begin >= end; }
    int64_t count() const { return empty() ? 0 : end - begin; }
    // Grows to hold `o` too.
    void cover(KeyRange o) {
        if (o.empty()) return;
        *this =
            empty() ? o : KeyRange{begin < o.begin ? begin : o.begin, end > o.end ? end : o.end};
    }
};

// Queries of one block against keys of one block.
template <class T>
struct AttentionCore {
    int64_t batch = 0;
    int heads = 0, kv_heads = 0;  // kv_heads divides heads
    int size = 0, v_size = 0;     // elements of a head of q and k, and of v
    double scale = 1;
    bool causal = true;
    int window = 0;
    Positions query, key;
    HeadView<const T> q, k, v;
    HeadView<const T> bias;           // "position" is the query's; batch or head 0: broadcast
    HeadView<const uint8_t> visible;  // likewise
};

// The keys that query i of batch row b may see, before `visible`.
template <class T>
KeyRange visible_keys(const AttentionCore<T>& core, int64_t b, int64_t i);

// out = softmax(scale q k^T + bias) v and lse [B, H, queries] = log of the sum of exponentials. A
// query that sees nothing gives out = 0 and lse = -inf.
template <class T>
void attention_forward(const AttentionCore<T>& core, HeadView<T> out, T* lse);

// Where gradients are added; a part without data is left out.
template <class T>
struct AttentionGrads {
    HeadView<T> q, k, v, bias;
};
// From the final out and lse, which may cover more keys than this block's: the gradients of this
// block's part of the sum.
template <class T>
void attention_backward(const AttentionCore<T>& core, HeadView<const T> out, const T* lse,
                        HeadView<const T> dout, const AttentionGrads<T>& grads);

}  // namespace pith
