// shape: the same elements in another order, another shape, or another tensor.
//   in     f32|f64; reshape any dtype
//   out    as ops.h says; a copy, but for reshape, which shares its input's storage and gradient
//   keeps  nothing         grad  += the elements' gradients, moved back; repeat: summed over copies
//   errors sizes, ranges or dimensions that do not fit; dtypes or devices differ
//   bitwise run-to-run: yes, for any number of threads
#include "ops/general.h"
#include "ops/ops.h"

namespace pith {
namespace {

// Where a part of a tensor begins, and its steps through the part's index space.
struct Part {
    int64_t offset = 0;
    Steps steps;
};
Part whole_of(const Dims& dims) { return {0, steps_of(dims, dims)}; }
Part part_of(const Dims& dims, int dim, int64_t begin) {
    Part part = whole_of(dims);
    part.offset = begin * part.steps.dim[dim];
    return part;
}

// to (+)= from, two parts of one index space.
void copy_cpu(const Rank& rank, const char* op, At at, const Dims& space, const Tensor& from,
              const Part& source, GradSlot to, const Part& target) {
    float_kernel(rank, op, at, from, [&]<class T>(T*) {
        elementwise(
            Walk(space, {target.steps, source.steps}),
            Slot<T>{to.grad.as<T>() + target.offset, to.add}, [](T x) { return x; },
            from.as<T>() + source.offset);
    });
}

// Dimension i of the result is order[i] of x.
Part permuted(const Dims& dims, const Dims& order) {
    const Part flat = whole_of(dims);
    Part part;
    for (int i = 0; i < order.rank; i++) part.steps.dim[i] = flat.steps.dim[order[i]];
    return part;
}

void permute_grad(const Pass& pass) {
    const GradSlot dx = pass.slot(0);
    if (!dx.grad.defined()) return;
    Dims order;
    for (; order.rank < pass.dy().dim.rank; order.rank++)
        order[order.rank] = pass.node.i[order.rank];
    const Dims& space = pass.dy().dim;
    copy_cpu(pass.rank, "permute", pass.node.at, space, pass.dy(), whole_of(space), dx,
             permuted(dx.grad.dim, order));
}

// i: dim, begin.
void slice_grad(const Pass& pass) {
    const Tensor dx = pass.zeroed_slot(0);
    if (!dx.defined()) return;
    const Dims& space = pass.dy().dim;
    copy_cpu(pass.rank, pass.node.op, pass.node.at, space, pass.dy(), whole_of(space), {dx, true},
             part_of(dx.dim, static_cast<int>(pass.node.i[0]), pass.node.i[1]));
}

// Elements [begin, end) of dimension dim, for slice and split.
Tensor piece(Rank& rank, const char* op, At at, const Tensor& x, int dim, int64_t begin,
             int64_t end) {
    Dims dims = x.dim;
    dims[dim] = end - begin;
    Tensor y = empty(rank, dims, x.dtype, at);
    copy_cpu(rank, op, at, dims, x, part_of(x.dim, dim, begin), {y}, whole_of(dims));
    if (Node* node = record_grad<slice_grad>(rank, op, at, {x}, y)) {
        node->i[0] = dim;
        node->i[1] = begin;
    }
    return y;
}

// i[0]: dim.
void concat_grad(const Pass& pass) {
    const int dim = static_cast<int>(pass.node.i[0]);
    int64_t begin = 0;
    for (int k = 0; k < pass.node.in.count && pass.node.in[k].defined(); k++) {
        const Dims& dims = pass.node.in[k].dim;
        const GradSlot dx = pass.slot(k);
        if (dx.grad.defined())
            copy_cpu(pass.rank, "concat", pass.node.at, dims, pass.dy(),
                     part_of(pass.dy().dim, dim, begin), dx, whole_of(dims));
        begin += dims[dim];
    }
}

// x [outer, n, inner] -> y [outer, times, n, inner].
void repeat_cpu(const Rank& rank, At at, Tensor x, Extent e, int64_t times, Tensor y) {
    const Dims space{e.outer, times, e.n * e.inner};
    copy_cpu(rank, "repeat", at, space, x, {0, steps_of({e.outer, 1, e.n * e.inner}, space)}, {y},
             whole_of(space));
}

void repeat_grad_cpu(const Rank& rank, At at, Tensor dy, Extent e, int64_t times, GradSlot dx) {
    float_kernel(rank, "repeat", at, dy, [&]<class T>(T*) {
        reduce<SumOf>({e.outer, times, e.n * e.inner}, dy.as<T>(), slot_of<T>(dx));
    });
}

void repeat_grad(const Pass& pass) {
    const GradSlot dx = pass.slot(0);
    if (!dx.grad.defined()) return;
    const Extent e = extent_of(pass.node.in[0].dim, static_cast<int>(pass.node.i[0]));
    repeat_grad_cpu(pass.rank, pass.node.at, pass.dy(), e, pass.node.i[1], dx);
}

}  // namespace

Tensor permute(Rank& rank, Tensor x, Dims order, At at) {
    check_alike(rank, "permute", at, {&x});
    check(rank, "permute", at, {{"one entry of order a dimension", order.rank == x.dim.rank}},
          {&x});
    bool seen[kMaxDims] = {};
    Dims dims = order;
    for (int i = 0; i < order.rank; i++) {
        const bool fits = order[i] >= 0 && order[i] < order.rank && !seen[order[i]];
        check(rank, "permute", at, {{"each dimension once in order", fits}}, {&x});
        seen[order[i]] = true;
        dims[i] = x.dim[static_cast<int>(order[i])];
    }
    Tensor y = empty(rank, dims, x.dtype, at);
    copy_cpu(rank, "permute", at, dims, x, permuted(x.dim, order), {y}, whole_of(dims));
    if (Node* node = record_grad<permute_grad>(rank, "permute", at, {x}, y))
        for (int i = 0; i < order.rank; i++) node->i[i] = order[i];
    return y;
}

Tensor reshape(Rank& rank, Tensor x, Dims dims, At at) {
    int open = 0;
    bool sizes = dims.rank > 0;
    for (int i = 0; i < dims.rank; i++) {
        open += dims[i] == -1;
        sizes = sizes && dims[i] >= -1;
    }
    check(rank, "reshape", at,
          {{"a defined tensor", x.defined()},
           {"sizes >= 0, at most one of them -1", sizes && open <= 1}},
          {&x});
    return x.view(dims, at);
}

Tensor slice(Rank& rank, Tensor x, int dim, int64_t begin, int64_t end, At at) {
    const int d = dim_of(rank, "slice", at, x, dim);
    if (begin < 0 || begin > end || end > x.dim[d]) {
        const std::string need = text("0 <= begin <= end <= size for [%ld,%ld) of dimension %d",
                                      long(begin), long(end), d);
        check(rank, "slice", at, {{need.c_str(), false}}, {&x});
    }
    return piece(rank, "slice", at, x, d, begin, end);
}

TensorList split(Rank& rank, Tensor x, int dim, Dims sizes, At at) {
    const int d = dim_of(rank, "split", at, x, dim);
    int64_t total = 0;
    bool positive = true;
    for (int i = 0; i < sizes.rank; i++) {
        total += sizes[i];
        positive = positive && sizes[i] >= 0;
    }
    check(rank, "split", at,
          {{"sizes >= 0", positive},
           {"sizes that sum to the dimension's", sizes.rank > 0 && total == x.dim[d]}},
          {&x});
    TensorList ys;
    int64_t begin = 0;
    for (int i = 0; i < sizes.rank; begin += sizes[i++])
        ys.push(piece(rank, "split", at, x, d, begin, begin + sizes[i]));
    return ys;
}

Tensor concat(Rank& rank, TensorList xs, int dim, At at) {
    check(rank, "concat", at, {{"at least one tensor", xs.count > 0}}, {&xs[0]});
    const int d = dim_of(rank, "concat", at, xs[0], dim);
    Dims dims = xs[0].dim;
    dims[d] = 0;
    for (int k = 0; k < xs.count; k++) {
        check_alike(rank, "concat", at, {&xs[0], &xs[k]});
        bool fits = xs[k].dim.rank == dims.rank;
        for (int i = 0; i < dims.rank; i++) fits = fits && (i == d || xs[k].dim[i] == dims[i]);
        check(rank, "concat", at, {{"equal sizes but for the one dimension", fits}},
              {&xs[0], &xs[k]});
        dims[d] += xs[k].dim[d];
    }
    Tensor y = empty(rank, dims, xs[0].dtype, at);
    int64_t begin = 0;
    for (int k = 0; k < xs.count; begin += xs[k++].dim[d])
        copy_cpu(rank, "concat", at, xs[k].dim, xs[k], whole_of(xs[k].dim), {y},
                 part_of(dims, d, begin));
    Node* node = record_grad<concat_grad>(
        rank, "concat", at, {xs[0], xs[1], xs[2], xs[3], xs[4], xs[5], xs[6], xs[7]}, y);
    if (node) node->i[0] = d;
    return y;
}

Tensor repeat(Rank& rank, Tensor x, int dim, int64_t times, At at) {
    const int d = dim_of(rank, "repeat", at, x, dim);
    check(rank, "repeat", at, {{"times >= 0", times >= 0}}, {&x});
    Dims dims = x.dim;
    dims[d] *= times;
    Tensor y = empty(rank, dims, x.dtype, at);
    repeat_cpu(rank, at, x, extent_of(x.dim, d), times, y);
    if (Node* node = record_grad<repeat_grad>(rank, "repeat", at, {x}, y)) {
        node->i[0] = d;
        node->i[1] = times;
    }
    return y;
}

}  // namespace pith
