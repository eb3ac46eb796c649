// rms_norm, add_rms_norm.
//   grad   u = dy w, s = 1/rms: dx = s (u - x s^2 mean(u x)) and dsum, to x and residual;
//          dw = sum over rows of dy x s
#include <algorithm>

#include "ops/cpu.h"
#include "ops/ops.h"

namespace pith {

// Without a residual sum is x, and no output of the node.
static AddRmsNorm norm_of_sum(const Op& op, bool summed, const Tensor& x, const Tensor& residual,
                              const Tensor& w, double eps) {
  const int64_t D = w.numel();
  op.check({{"x [..., D] and w [D]", x.defined() && w.dim == Dims{x.cols()}},
            {"residual of x's shape", !summed || residual.dim == x.dim},
            {"one dtype", one_dtype({&x, &residual, &w})}},
           {&x, &residual, &w});
  AddRmsNorm y{summed ? op.like(x) : x, op.like(x)};
  const Tensor rstd = op.empty({x.rows()}, x.dtype);
  op.on_cpu(x, [&]<class T>(T*) {
    parallel_rows(x.rows(), D * 4, [&](int64_t r) {
      T *row = row_of<T>(y.sum, r), *out = row_of<T>(y.normed, r);
      const T *a = row_of<T>(x, r), *b = residual.as<T>() + r * D;
      for (int64_t j = 0; summed && j < D; j++) row[j] = a[j] + b[j];
      const T scale = rstd.as<T>()[r] = rms_scale(row, D, T(eps));
      for (int64_t j = 0; j < D; j++) out[j] = row[j] * scale * w.as<T>()[j];
    });
  });
  const auto bx = []<class T>(Backward<T> b) {
    const bool two = b.node.out.count == 2;
    const Tensor &dy = b.dy(two), dsum = two ? b.dy() : Tensor{}, dx = b.op().like(b.keep[0]);
    const int64_t n = dx.cols();
    parallel_rows(dx.rows(), n * 8, [&](int64_t r) {
      T* to = row_of<T>(dx, r);
      if (dy.defined())
        rms_norm_grad(n, row_of<T>(dy, r), b.keep[1].template as<T>(), row_of<T>(b.keep[0], r),
                      b.keep[2].template as<T>()[r], to);
      else
        std::fill_n(to, n, T(0));
      const T* more = dsum.as<T>() + r * n;
      for (int64_t j = 0; dsum.defined() && j < n; j++) to[j] += more[j];
    });
    if (two && b.node.in[1].needs_grad()) {
      const Tensor copy = b.op().like(dx);
      std::copy_n(dx.data, dx.bytes(), copy.data);
      add_grad(b.rank, b.node.in[1], copy);
    }
    add_grad(b.rank, b.node.in[0], dx);
  };
  const auto bw = []<class T>(Backward<T> b) {
    const Tensor &dy = b.dy(b.node.out.count - 1), &rows = b.keep[0];
    if (!dy.defined()) return;
    const int64_t n = rows.cols();
    const T *g = dy.as<T>(), *row = rows.as<T>(), *scale = b.keep[1].template as<T>();
    add_columns<T>(rows.rows(), n, b.to(2), [=](int64_t r, int64_t j) {
      return g[r * n + j] * (row[r * n + j] * scale[r]);
    });
  };
  (summed ? record(op, {x, residual, w}, {&y.sum, &y.normed})
          : record(op, {x, residual, w}, {&y.normed}))
      .bx({y.sum, w, rstd}, bx)
      .bw(2, {y.sum, rstd}, bw);
  return y;
}

Tensor rms_norm(Rank& rank, Tensor x, Tensor w, double eps, At at) {
  return norm_of_sum({rank, "rms_norm", at}, false, x, {}, w, eps).normed;
}

AddRmsNorm add_rms_norm(Rank& rank, Tensor x, Tensor residual, Tensor w, double eps, At at) {
  return norm_of_sum({rank, "add_rms_norm", at}, true, x, residual, w, eps);
}

}  // namespace pith
