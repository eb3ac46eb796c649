// layer_parts: what several layer ops share on the CPU. defines: set_backward, check_ids,
// add_columns
#pragma once
#include "ops/cpu.h"
#include "ops/cpu_rows.h"

namespace pith {

// Completes a node whose weights are inputs `weights`. Weight gradients can wait only where they go
// to accumulators: one that another op made the weight from is due in bx, before that op's.
template <void (*bx)(Rank&, Node&), void (*bw)(Rank&, Node* const*, int)>
void set_backward(Node& node, std::initializer_list<int> weights) {
    bool made = false;
    for (const int k : weights) made |= node.in[k].var >= 0 && !node.in[k].grad;
    node.bx = bx;
    node.bw = bw;
    if (!made) return;
    node.bw = nullptr;
    node.bx = [](Rank& rank, Node& n) {
        Node* one = &n;
        if constexpr (bx != nullptr) bx(rank, n);
        bw(rank, &one, 1);
    };
}

// Throws unless every element of `ids` (I32, in main memory) is in [0, limit) or is `also`; the
// message gives the first that is not.
inline void check_ids(const Rank& rank, const char* op, At at, const char* what, const Tensor& ids,
                      int64_t limit, int32_t also = 0) {
    const int32_t* id = ids.i32();
    for (int64_t i = 0, n = ids.numel(); i < n; i++) {
        if ((id[i] >= 0 && id[i] < limit) || (also && id[i] == also)) continue;
        const std::string need =
            text("%s in [0,%ld), not %d at element %ld", what, long(limit), id[i], long(i));
        check(rank, op, at, {{need.c_str(), false}}, {&ids});
    }
}

// to[c] = or += the sum of f(r, c) over r in [0, rows), in the order of r.
template <class T, class F>
void add_columns(int64_t rows, int64_t cols, Slot<T> to, F&& f) {
    constexpr int64_t kColumns = 64;
    parallel_rows((cols + kColumns - 1) / kColumns, rows * kColumns, [&](int64_t block) {
        const int64_t first = block * kColumns, left = cols - first;
        const int64_t n = left < kColumns ? left : kColumns;
        T sum[kColumns] = {};
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < n; c++) sum[c] += f(r, first + c);
        for (int64_t c = 0; c < n; c++) to.put(first + c, sum[c]);
    });
}

}  // namespace pith
