// rms_norm: y = x / sqrt(mean(x^2) + eps) * w, over the last dimension.
// add_rms_norm: sum = x + residual, normed = rms_norm(sum, w, eps), in one pass.
//                                                           Zhang & Sennrich 2019, arXiv:1910.07467
//   in     x, residual [..., D]   w [D]   f32|f64, one dtype         out  like x
//   keeps  bx: x (or sum), w, rstd [rows]   bw: x (or sum), rstd
//   grad   with u = dy w:  bx: dx += rstd (u - x rstd^2 mean(u x)), and dsum, to x and residual
//          bw: dw += sum over rows of dy x rstd
//   errors w is not [D]; residual's shape is not x's; dtypes differ
//   bitwise run-to-run: yes, for any number of threads
#include <cmath>

#include "ops/layer_parts.h"
#include "ops/ops.h"

namespace pith {

// `residual` may be undefined; then sum is not written.
template <class T>
static void rms_norm_cpu(const Tensor& x, const Tensor& residual, const Tensor& w, double eps,
                         const Tensor& sum, const Tensor& y, const Tensor& rstd) {
    const int64_t D = x.cols();
    parallel_rows(x.rows(), D * 4, [&](int64_t r) {
        const T* row = x.as<T>() + r * D;
        if (residual.defined()) {
            const T* other = residual.as<T>() + r * D;
            T* total = sum.as<T>() + r * D;
            for (int64_t j = 0; j < D; j++) total[j] = row[j] + other[j];
            row = total;
        }
        const T scale = 1 / std::sqrt(dot(row, row, D) / D + static_cast<T>(eps));
        rstd.as<T>()[r] = scale;
        T* out = y.as<T>() + r * D;
        for (int64_t j = 0; j < D; j++) out[j] = row[j] * scale * w.as<T>()[j];
    });
}

// dx of each row, plus `more` where it is defined. dy may be undefined when `more` is not.
template <class T>
static void rms_norm_bx_cpu(const Tensor& dy, const Tensor& x, const Tensor& w, const Tensor& rstd,
                            const Tensor& more, Slot<T> dx) {
    const int64_t D = x.cols();
    if (!dx.data) return;
    parallel_rows(x.rows(), D * 8, [&](int64_t r) {
        const T* row = x.as<T>() + r * D;
        const T* plus = more.defined() ? more.as<T>() + r * D : nullptr;
        const T* weight = w.as<T>();
        const Slot<T> out{dx.data + r * D, dx.add};
        const T scale = rstd.as<T>()[r];
        if (!dy.defined()) {
            for (int64_t j = 0; j < D; j++) out.put(j, plus[j]);
            return;
        }
        const T* g = dy.as<T>() + r * D;
        const T along = lane_sum<T>(D, [&](int64_t j) { return g[j] * weight[j] * row[j]; });
        const T c = along * scale * scale * scale / D;
        for (int64_t j = 0; j < D; j++) out.put(j, g[j] * weight[j] * scale - row[j] * c);
        for (int64_t j = 0; plus && j < D; j++) out.data[j] += plus[j];
    });
}

template <class T>
static void rms_norm_bw_cpu(const Tensor& dy, const Tensor& x, const Tensor& rstd, Slot<T> dw) {
    const int64_t D = x.cols();
    if (!dw.data) return;
    const T* g = dy.as<T>();
    const T* row = x.as<T>();
    const T* scale = rstd.as<T>();
    add_columns(x.rows(), D, dw,
                [=](int64_t r, int64_t j) { return g[r * D + j] * (row[r * D + j] * scale[r]); });
}

static void rms_norm_bx(Rank& rank, Node& node) {
    const TensorList& keep = node.bx_keep;
    float_kernel(rank, node.op, node.at, node.grad[0], [&]<class T>(T*) {
        rms_norm_bx_cpu(node.grad[0], keep[0], keep[1], keep[2], {},
                        writable<T>(rank, node.in[0], node.at));
    });
}

static void add_rms_norm_bx(Rank& rank, Node& node) {
    const TensorList& keep = node.bx_keep;
    const Tensor total = empty(rank, keep[0].dim, keep[0].dtype, node.at);
    float_kernel(rank, node.op, node.at, total, [&]<class T>(T*) {
        rms_norm_bx_cpu<T>(node.grad[1], keep[0], keep[1], keep[2], node.grad[0], {total.as<T>()});
        const Slot<T> other = writable<T>(rank, node.in[1], node.at);
        if (!other.data) return;
        const int64_t D = total.cols();
        parallel_rows(total.rows(), D, [&](int64_t r) {
            for (int64_t i = r * D; i < (r + 1) * D; i++) other.put(i, total.as<T>()[i]);
        });
    });
    add_grad(rank, node.in[0], total);
}

// The last output and the last input are the normed rows and w in both ops.
static void rms_norm_bw(Rank& rank, Node* const* nodes, int n) {
    for (int i = 0; i < n; i++) {
        const Node& node = *nodes[i];
        const Tensor& dy = node.grad[node.grad.count - 1];
        if (!dy.defined()) continue;
        float_kernel(rank, node.op, node.at, dy, [&]<class T>(T*) {
            rms_norm_bw_cpu(dy, node.bw_keep[0], node.bw_keep[1],
                            writable<T>(rank, node.in[node.in.count - 1], node.at));
        });
    }
}

Tensor rms_norm(Rank& rank, Tensor x, Tensor w, double eps, At at) {
    check(rank, "rms_norm", at,
          {{"x [..., D] and w [D]", x.defined() && w.dim == Dims{x.cols()}},
           {"one dtype", x.dtype == w.dtype}},
          {&x, &w});
    Tensor y = empty(rank, x.dim, x.dtype, at);
    const Tensor rstd = empty(rank, {x.rows()}, x.dtype, at);
    float_kernel(rank, "rms_norm", at, x,
                 [&]<class T>(T*) { rms_norm_cpu<T>(x, {}, w, eps, {}, y, rstd); });
    if (Node* n = record(rank, "rms_norm", at, {x, w}, {&y})) {
        n->bx_keep = {x, w, rstd};
        n->bw_keep = {x, rstd};
        set_backward<rms_norm_bx, rms_norm_bw>(*n, {1});
    }
    return y;
}

AddRmsNorm add_rms_norm(Rank& rank, Tensor x, Tensor residual, Tensor w, double eps, At at) {
    check(rank, "add_rms_norm", at,
          {{"x [..., D] and w [D]", x.defined() && w.dim == Dims{x.cols()}},
           {"residual of x's shape", residual.dim == x.dim},
           {"one dtype", x.dtype == w.dtype && x.dtype == residual.dtype}},
          {&x, &residual, &w});
    Tensor sum = empty(rank, x.dim, x.dtype, at), y = empty(rank, x.dim, x.dtype, at);
    const Tensor rstd = empty(rank, {x.rows()}, x.dtype, at);
    float_kernel(rank, "add_rms_norm", at, x,
                 [&]<class T>(T*) { rms_norm_cpu<T>(x, residual, w, eps, sum, y, rstd); });
    if (Node* n = record(rank, "add_rms_norm", at, {x, residual, w}, {&sum, &y})) {
        n->bx_keep = {sum, w, rstd};
        n->bw_keep = {sum, rstd};
        set_backward<add_rms_norm_bx, rms_norm_bw>(*n, {2});
    }
    return {sum, y};
}

}  // namespace pith
