#include "ops/general.h"

#include <cstring>

namespace pith {

Tensor Pass::zeroed_slot(int k) const {
    const GradSlot s = slot(k);
    need_cpu(node.op, node.at, node.in[k]);
    if (!s.add && s.grad.data) std::memset(s.grad.data, 0, s.grad.bytes());
    return s.grad;
}

void check_alike(const Rank& rank, const char* op, At at, std::initializer_list<const Tensor*> ts) {
    const Tensor& first = **ts.begin();
    for (const Tensor* t : ts)
        check(rank, op, at,
              {{"defined tensors", t->defined()},
               {"equal dtypes", t->dtype == first.dtype},
               {"tensors on one device", t->device == first.device}},
              ts);
}

int dim_of(const Rank& rank, const char* op, At at, const Tensor& x, int dim) {
    check(rank, op, at, {{"a defined tensor", x.defined()}}, {&x});
    const int from_begin = dim < 0 ? dim + x.dim.rank : dim;
    if (from_begin < 0 || from_begin >= x.dim.rank)
        check(rank, op, at, {{text("dimension %d of x", dim).c_str(), false}}, {&x});
    return from_begin;
}

Dims broadcast(const Rank& rank, const char* op, At at, std::initializer_list<const Tensor*> ts) {
    Dims all;
    for (const Tensor* t : ts) all.rank = t->dim.rank > all.rank ? t->dim.rank : all.rank;
    for (int i = 0; i < all.rank; i++) all[i] = 1;
    for (const Tensor* t : ts) {
        for (int i = 0; i < t->dim.rank; i++) {
            int64_t& size = all[all.rank - t->dim.rank + i];
            if (size == 1) size = t->dim[i];
            const bool fits = t->dim[i] == 1 || t->dim[i] == size;
            check(rank, op, at, {{"sizes equal or 1, aligned at the last dimension", fits}}, ts);
        }
    }
    return all;
}

Steps steps_of(const Dims& own, const Dims& space) {
    Steps steps;
    int64_t step = 1;
    for (int i = own.rank - 1; i >= 0; i--) {
        steps.dim[space.rank - own.rank + i] = own[i] == 1 ? 0 : step;
        step *= own[i];
    }
    return steps;
}

Walk::Walk(const Dims& space, std::initializer_list<Steps> list)
    : operands(static_cast<int>(list.size())) {
    for (int d = 0; d < space.rank; d++) {
        if (space[d] == 1) continue;
        bool joined = rank > 0;
        for (int k = 0; joined && k < operands; k++)
            joined = step[k][rank - 1] == list.begin()[k].dim[d] * space[d];
        if (!joined) size[rank++] = 1;
        size[rank - 1] *= space[d];
        for (int k = 0; k < operands; k++) step[k][rank - 1] = list.begin()[k].dim[d];
    }
    if (rank == 0) size[rank++] = space.rank > 0 ? 1 : 0;
}

int64_t Walk::outer() const {
    int64_t n = 1;
    for (int d = 0; d + 1 < rank; d++) n *= size[d];
    return n;
}

bool Walk::strided() const {
    bool any = false;
    for (int k = 0; k < operands; k++) any = any || inner_step(k) > 1;
    return any;
}

void Walk::locate(int64_t row, int64_t begin, int64_t* offsets) const {
    for (int k = 0; k < operands; k++) offsets[k] = begin * inner_step(k);
    for (int d = rank - 2; d >= 0; d--) {
        const int64_t i = row % size[d];
        row /= size[d];
        for (int k = 0; k < operands; k++) offsets[k] += i * step[k][d];
    }
}

Walk flat_walk(int64_t n) {
    const Dims space{n};
    const Steps one = steps_of(space, space);
    return Walk(space, {one, one, one, one});
}

Extent extent_of(const Dims& dims, int first, int last) {
    Extent e;
    for (int i = 0; i < dims.rank; i++)
        (i < first ? e.outer : i <= last ? e.n : e.inner) *= dims[i];
    return e;
}

}  // namespace pith
