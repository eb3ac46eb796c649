// index: rows taken by id, rows added by id, and the k largest of a row.
//   in     x f32|f64   ids i32 [n]                 out    as each op says in ops.h; top_k ids i32
//   keeps  ids         grad  index_select: rows of dy added by id in order; scatter_add: rows of dy
//          taken by id; top_k: dy added at the ids
//   errors an id outside the rows (its place and value are named); k outside [1, size]
//   bitwise run-to-run: yes, for any number of threads
#include <algorithm>

#include "ops/general.h"
#include "ops/ops.h"

namespace pith {
namespace {

void check_ids(const Rank& rank, const char* op, At at, const Tensor& x, const Tensor& ids,
               int64_t rows) {
    check(rank, op, at,
          {{"a defined tensor", x.defined()},
           {"ids of dtype i32 and one dimension", ids.dtype == DType::I32 && ids.dim.rank == 1},
           {"tensors on one device", x.device == ids.device}},
          {&x, &ids});
    need_cpu(op, at, ids);
    for (int64_t i = 0, n = ids.numel(); i < n; i++) {
        if (ids.i32()[i] >= 0 && ids.i32()[i] < rows) continue;
        const std::string need =
            text("ids[%ld] = %d in [0,%ld)", long(i), ids.i32()[i], long(rows));
        check(rank, op, at, {{need.c_str(), false}}, {&x, &ids});
    }
}

// Elements of one index of the first dimension.
int64_t row_size(const Tensor& x) {
    Dims dims = x.dim;
    dims[0] = 1;
    return dims.numel();
}

// Row i of `to` (+)= row ids[i] of x.
void take_rows_cpu(const Rank& rank, const char* op, At at, Tensor x, Tensor ids, GradSlot to) {
    float_kernel(rank, op, at, x, [&]<class T>(T*) {
        const int64_t n = row_size(x);
        const Slot<T> y = slot_of<T>(to);
        parallel_rows(ids.numel(), n, [&](int64_t i) {
            const T* row = x.as<T>() + ids.i32()[i] * n;
            for (int64_t j = 0; j < n; j++) y.put(i * n + j, row[j]);
        });
    });
}

// Row ids[i] of `to` += row i of x, in the order of i; columns are divided among the threads.
void add_rows_cpu(const Rank& rank, const char* op, At at, Tensor x, Tensor ids, Tensor to) {
    float_kernel(rank, op, at, x, [&]<class T>(T*) {
        const int64_t n = row_size(x), blocks = (n + kSpan - 1) / kSpan;
        parallel_rows(blocks, ids.numel() * kSpan, [&](int64_t block) {
            const int64_t first = block * kSpan, count = std::min(kSpan, n - first);
            for (int64_t i = 0; i < ids.numel(); i++) {
                const T* from = x.as<T>() + i * n + first;
                T* row = to.as<T>() + ids.i32()[i] * n + first;
                for (int64_t j = 0; j < count; j++) row[j] += from[j];
            }
        });
    });
}

void select_grad(const Pass& pass) {
    const Tensor dx = pass.zeroed_slot(0);
    if (dx.defined())
        add_rows_cpu(pass.rank, "index_select", pass.node.at, pass.dy(), pass.kept[0], dx);
}

void scatter_grad(const Pass& pass) {
    const GradSlot dx = pass.slot(0);
    if (!dx.grad.defined()) return;
    take_rows_cpu(pass.rank, "scatter_add", pass.node.at, pass.dy(), pass.kept[0], dx);
}

// The k largest of n numbers, each inserted behind those that are not smaller: ties keep their
// order.
template <class T>
void largest(const T* x, int64_t n, int k, T* values, int32_t* ids) {
    int count = 0;
    for (int64_t i = 0; i < n; i++) {
        if (count == k && !(x[i] > values[k - 1])) continue;
        int at = count < k ? count++ : k - 1;
        for (; at > 0 && x[i] > values[at - 1]; at--) {
            values[at] = values[at - 1];
            ids[at] = ids[at - 1];
        }
        values[at] = x[i];
        ids[at] = static_cast<int32_t>(i);
    }
}

void top_k_cpu(const Rank& rank, At at, Tensor x, int k, Tensor values, Tensor ids) {
    float_kernel(rank, "top_k", at, x, [&]<class T>(T*) {
        parallel_rows(x.rows(), x.cols() * 2, [&](int64_t r) {
            largest(x.as<T>() + r * x.cols(), x.cols(), k, values.as<T>() + r * k,
                    ids.i32() + r * k);
        });
    });
}

void top_k_grad_cpu(const Rank& rank, const Node& node, Tensor dy, Tensor ids, Tensor dx) {
    float_kernel(rank, "top_k", node.at, dy, [&]<class T>(T*) {
        const int64_t n = dx.cols(), k = ids.cols();
        for (int64_t i = 0; i < ids.numel(); i++)
            dx.as<T>()[i / k * n + ids.i32()[i]] += dy.as<T>()[i];
    });
}

void top_k_grad(const Pass& pass) {
    const Tensor dx = pass.zeroed_slot(0);
    if (dx.defined()) top_k_grad_cpu(pass.rank, pass.node, pass.dy(), pass.kept[0], dx);
}

}  // namespace

Tensor index_select(Rank& rank, Tensor x, Tensor ids, At at) {
    check_ids(rank, "index_select", at, x, ids, x.dim[0]);
    Dims dims = x.dim;
    dims[0] = ids.numel();
    Tensor y = empty(rank, dims, x.dtype, at);
    take_rows_cpu(rank, "index_select", at, x, ids, {y});
    record_grad<select_grad>(rank, "index_select", at, {x}, y, {{ids}});
    return y;
}

Tensor scatter_add(Rank& rank, Tensor src, Tensor ids, int64_t rows, At at) {
    check_ids(rank, "scatter_add", at, src, ids, rows);
    check(rank, "scatter_add", at,
          {{"rows >= 0", rows >= 0}, {"an id a row of src", ids.numel() == src.dim[0]}},
          {&src, &ids});
    Dims dims = src.dim;
    dims[0] = rows;
    Tensor y = zeros(rank, dims, src.dtype, at);
    add_rows_cpu(rank, "scatter_add", at, src, ids, y);
    record_grad<scatter_grad>(rank, "scatter_add", at, {src}, y, {{ids}});
    return y;
}

TopK top_k(Rank& rank, Tensor x, int k, At at) {
    check_alike(rank, "top_k", at, {&x});
    if (k < 1 || k > x.cols()) {
        const std::string need = text("1 <= k <= size of the last dimension for k = %d", k);
        check(rank, "top_k", at, {{need.c_str(), false}}, {&x});
    }
    Dims dims = x.dim;
    dims[dims.rank - 1] = k;
    TopK y{empty(rank, dims, x.dtype, at), empty(rank, dims, DType::I32, at)};
    top_k_cpu(rank, at, x, k, y.values, y.ids);
    record_grad<top_k_grad>(rank, "top_k", at, {x}, y.values, {{y.ids}});
    return y;
}

}  // namespace pith
