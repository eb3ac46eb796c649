// reduce: sum, mean, max, running sum and softmax over one dimension.
//   in     x f32|f64, dim (negative: from the end)
//   out    like x, with size 1 in dim (sum, mean, max) or of x's shape (cumsum, softmax)
//   keeps  max: i32 index of the first maximum; softmax: y   grad  += dy/n, dy at that index, the
//          running sum from the end, y * (dy - <dy, y>)
//   errors no such dimension; mean or max over an empty one
//   bitwise run-to-run: yes, for any number of threads
#include <algorithm>

#include "ops/general.h"
#include "ops/ops.h"

namespace pith {
namespace {

Tensor reduced(Rank& rank, const Tensor& x, int dim, At at) {
    Dims dims = x.dim;
    dims[dim] = 1;
    return empty(rank, dims, x.dtype, at);
}

template <class R>
void reduce_cpu(const Rank& rank, const char* op, At at, Tensor x, int dim, double divisor,
                Tensor y) {
    float_kernel(rank, op, at, x, [&]<class T>(T*) {
        reduce<R>(extent_of(x.dim, dim), x.as<T>(), Slot<T>{y.as<T>()}, static_cast<T>(divisor));
    });
}

void sum_grad_cpu(const Rank& rank, const Node& node, Tensor dy, GradSlot dx) {
    float_kernel(rank, node.op, node.at, dy, [&]<class T>(T*) {
        const Dims& dims = node.in[0].dim;
        const T divisor = static_cast<T>(node.f[0]);
        elementwise(
            Walk(dims, {steps_of(dims, dims), steps_of(dy.dim, dims)}), slot_of<T>(dx),
            [=](T g) { return g / divisor; }, dy.as<T>());
    });
}

void sum_grad(const Pass& pass) {
    const GradSlot dx = pass.slot(0);
    if (dx.grad.defined()) sum_grad_cpu(pass.rank, pass.node, pass.dy(), dx);
}

// sum, or mean where divisor is not 1.
Tensor sum_over(Rank& rank, const char* op, At at, const Tensor& x, int dim, double divisor) {
    Tensor y = reduced(rank, x, dim, at);
    reduce_cpu<SumOf>(rank, op, at, x, dim, divisor, y);
    if (Node* node = record_grad<sum_grad>(rank, op, at, {x}, y)) node->f[0] = divisor;
    return y;
}

// The first index in dim at which x equals its maximum y; 0 where there is none (NaN).
void first_index_cpu(const Rank& rank, At at, Tensor x, Tensor y, int dim, Tensor first) {
    float_kernel(rank, "max", at, x, [&]<class T>(T*) {
        const Extent e = extent_of(x.dim, dim);
        parallel_rows(e.outer, e.n * e.inner, [&](int64_t o) {
            const T *xs = x.as<T>() + o * e.n * e.inner, *top = y.as<T>() + o * e.inner;
            int32_t* to = first.i32() + o * e.inner;
            std::fill(to, to + e.inner, 0);
            for (int64_t j = e.n - 1; j >= 0; j--)
                for (int64_t i = 0; i < e.inner; i++)
                    if (xs[j * e.inner + i] == top[i]) to[i] = static_cast<int32_t>(j);
        });
    });
}

void max_grad_cpu(const Rank& rank, const Node& node, Tensor dy, Tensor first, Tensor dx) {
    float_kernel(rank, "max", node.at, dy, [&]<class T>(T*) {
        const Extent e = extent_of(node.in[0].dim, static_cast<int>(node.i[0]));
        for (int64_t r = 0; r < dy.numel(); r++) {
            const int64_t o = r / e.inner, i = r % e.inner;
            dx.as<T>()[(o * e.n + first.i32()[r]) * e.inner + i] += dy.as<T>()[r];
        }
    });
}

void max_grad(const Pass& pass) {
    const Tensor dx = pass.zeroed_slot(0);
    if (dx.defined()) max_grad_cpu(pass.rank, pass.node, pass.dy(), pass.kept[0], dx);
}

// to [outer, n, inner] = the running sum of x over n, from the end if `reverse`.
template <class T>
void running_sum(const Extent& e, const T* x, Slot<T> to, bool reverse) {
    const int64_t blocks = (e.inner + kColumns - 1) / kColumns;
    parallel_rows(e.outer * blocks, e.n * std::min(e.inner, kColumns), [&](int64_t task) {
        const int64_t first = task % blocks * kColumns;
        const int64_t width = std::min(kColumns, e.inner - first);
        T sum[kColumns] = {};
        for (int64_t step = 0; step < e.n; step++) {
            const int64_t j = reverse ? e.n - 1 - step : step;
            const int64_t at = (task / blocks * e.n + j) * e.inner + first;
            for (int64_t c = 0; c < width; c++) {
                sum[c] += x[at + c];
                to.put(at + c, sum[c]);
            }
        }
    });
}

void cumsum_cpu(const Rank& rank, At at, Tensor x, int dim, GradSlot y, bool reverse) {
    float_kernel(rank, "cumsum", at, x, [&]<class T>(T*) {
        running_sum(extent_of(x.dim, dim), x.as<T>(), slot_of<T>(y), reverse);
    });
}

void cumsum_grad(const Pass& pass) {
    const GradSlot dx = pass.slot(0);
    if (!dx.grad.defined()) return;
    cumsum_cpu(pass.rank, pass.node.at, pass.dy(), static_cast<int>(pass.node.i[0]), dx, true);
}

// Over the last dimension.
void softmax_cpu(const Rank& rank, At at, Tensor x, Tensor y) {
    float_kernel(rank, "softmax", at, x, [&]<class T>(T*) {
        const int64_t n = x.cols();
        parallel_rows(x.rows(), n * 4, [&](int64_t r) {
            const T* row = x.as<T>() + r * n;
            T* to = y.as<T>() + r * n;
            std::copy(row, row + n, to);
            const T sum = exp_sum(to, n, max_of(row, n));
            for (int64_t i = 0; i < n; i++) to[i] /= sum;
        });
    });
}

void softmax_grad_cpu(const Rank& rank, const Node& node, Tensor dy, Tensor y, GradSlot dx) {
    float_kernel(rank, "softmax", node.at, dy, [&]<class T>(T*) {
        const int64_t n = y.cols();
        const Slot<T> to = slot_of<T>(dx);
        parallel_rows(y.rows(), n * 2, [&](int64_t r) {
            const T *g = dy.as<T>() + r * n, *p = y.as<T>() + r * n;
            const T mean = dot(g, p, n);
            for (int64_t i = 0; i < n; i++) to.put(r * n + i, p[i] * (g[i] - mean));
        });
    });
}

void softmax_grad(const Pass& pass) {
    const GradSlot dx = pass.slot(0);
    if (dx.grad.defined()) softmax_grad_cpu(pass.rank, pass.node, pass.dy(), pass.kept[0], dx);
}

}  // namespace

Tensor sum(Rank& rank, Tensor x, int dim, At at) {
    return sum_over(rank, "sum", at, x, dim_of(rank, "sum", at, x, dim), 1);
}

Tensor mean(Rank& rank, Tensor x, int dim, At at) {
    const int d = dim_of(rank, "mean", at, x, dim);
    check(rank, "mean", at, {{"elements in the dimension", x.dim[d] > 0}}, {&x});
    return sum_over(rank, "mean", at, x, d, static_cast<double>(x.dim[d]));
}

Tensor max(Rank& rank, Tensor x, int dim, At at) {
    const int d = dim_of(rank, "max", at, x, dim);
    check(rank, "max", at, {{"elements in the dimension", x.dim[d] > 0}}, {&x});
    Tensor y = reduced(rank, x, d, at), first;
    reduce_cpu<MaxOf>(rank, "max", at, x, d, 1, y);
    if (rank.tape && x.needs_grad()) {
        first = empty(rank, y.dim, DType::I32, at);
        first_index_cpu(rank, at, x, y, d, first);
    }
    if (Node* node = record_grad<max_grad>(rank, "max", at, {x}, y, {{first}})) node->i[0] = d;
    return y;
}

Tensor cumsum(Rank& rank, Tensor x, int dim, At at) {
    const int d = dim_of(rank, "cumsum", at, x, dim);
    Tensor y = empty(rank, x.dim, x.dtype, at);
    cumsum_cpu(rank, at, x, d, {y}, false);
    if (Node* node = record_grad<cumsum_grad>(rank, "cumsum", at, {x}, y)) node->i[0] = d;
    return y;
}

Tensor softmax(Rank& rank, Tensor x, int dim, At at) {
    const int d = dim_of(rank, "softmax", at, x, dim), last = x.dim.rank - 1;
    if (d != last) {  // exchanged with the last dimension, and back
        Dims order;
        for (int i = 0; i <= last; i++) order[order.rank++] = i == d ? last : i == last ? d : i;
        return permute(rank, softmax(rank, permute(rank, x, order, at), -1, at), order, at);
    }
    Tensor y = empty(rank, x.dim, x.dtype, at);
    softmax_cpu(rank, at, x, y);
    record_grad<softmax_grad>(rank, "softmax", at, {x}, y, {{y}});
    return y;
}

}  // namespace pith
