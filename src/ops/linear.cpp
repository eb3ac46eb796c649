// linear: y = x w^T + bias.
//   in     x [..., in]   w [out, in]   bias [out] or undefined   f32|f64, one dtype
//   out    [..., out]
//   keeps  bx: w   bw: x      grad  bx: dx += dy w   bw: dw += dy^T x, dbias += sum over rows of dy
//   errors w.dim[1] != x's last size; bias is not [out]; dtypes differ
//   bitwise run-to-run: yes, for any number of threads
#include "ops/layer_parts.h"
#include "ops/ops.h"

namespace pith {

template <class T>
static void linear_cpu(const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& y) {
    const int64_t rows = x.rows(), in = w.dim[1], out = w.dim[0];
    const T* b = bias.as<T>();
    if (b)
        parallel_rows(rows, out, [&](int64_t r) {
            for (int64_t j = 0; j < out; j++) y.as<T>()[r * out + j] = b[j];
        });
    gemm<T>(rows, out, in, {x.as<T>(), in}, {w.as<T>(), in, Layout::Transposed}, b ? 1 : 0,
            y.as<T>(), out);
}

template <class T>
static void linear_bx_cpu(const Tensor& dy, const Tensor& w, Slot<T> dx) {
    const int64_t rows = dy.rows(), in = w.dim[1], out = w.dim[0];
    if (!dx.data) return;
    gemm<T>(rows, in, out, {dy.as<T>(), out}, {w.as<T>(), in}, dx.add ? 1 : 0, dx.data, in);
}

template <class T>
static void linear_bw_cpu(const Tensor& dy, const Tensor& x, Slot<T> dw, Slot<T> dbias) {
    const int64_t rows = x.rows(), in = x.cols(), out = dy.cols();
    if (dw.data)
        gemm<T>(out, in, rows, {dy.as<T>(), out, Layout::Transposed}, {x.as<T>(), in},
                dw.add ? 1 : 0, dw.data, in);
    if (dbias.data)
        add_columns(rows, out, dbias,
                    [&, d = dy.as<T>()](int64_t r, int64_t j) { return d[r * out + j]; });
}

static void linear_bx(Rank& rank, Node& node) {
    float_kernel(rank, node.op, node.at, node.grad[0], [&]<class T>(T*) {
        linear_bx_cpu(node.grad[0], node.bx_keep[0], writable<T>(rank, node.in[0], node.at));
    });
}

static void linear_bw(Rank& rank, Node* const* nodes, int n) {
    for (int i = 0; i < n; i++) {
        const Node& node = *nodes[i];
        float_kernel(rank, node.op, node.at, node.grad[0], [&]<class T>(T*) {
            linear_bw_cpu(node.grad[0], node.bw_keep[0], writable<T>(rank, node.in[1], node.at),
                          writable<T>(rank, node.in[2], node.at));
        });
    }
}

Tensor linear(Rank& rank, Tensor x, Tensor w, Tensor bias, At at) {
    const int64_t out = w.dim[0];
    check(rank, "linear", at,
          {{"x [..., in] and w [out, in]", x.defined() && w.dim.rank == 2 && x.cols() == w.dim[1]},
           {"bias [out] or undefined", !bias.defined() || bias.dim == Dims{out}},
           {"one dtype", x.dtype == w.dtype && (!bias.defined() || bias.dtype == w.dtype)}},
          {&x, &w, &bias});
    Dims dims = x.dim;
    dims[dims.rank - 1] = out;
    Tensor y = empty(rank, dims, x.dtype, at);
    float_kernel(rank, "linear", at, x, [&]<class T>(T*) { linear_cpu<T>(x, w, bias, y); });
    if (Node* n = record(rank, "linear", at, {x, w, bias}, {&y})) {
        n->bx_keep = {w};
        n->bw_keep = {x};
        set_backward<linear_bx, linear_bw>(*n, {1, 2});
    }
    return y;
}

}  // namespace pith
