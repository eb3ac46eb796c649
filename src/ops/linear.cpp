// linear.
//   grad   dx = dy w, dw = dy^T x, dbias = sum over rows of dy
#include <algorithm>

#include "ops/cpu.h"
#include "ops/ops.h"

namespace pith {

Tensor linear(Rank& rank, Tensor x, Tensor w, Tensor bias, At at) {
  const Op op{rank, "linear", at};
  const int64_t out = w.dim[0];
  op.check({{"x [..., in] and w [out, in]", x.defined() && w.dim.rank == 2 && x.cols() == w.dim[1]},
            {"bias [out] or undefined", !bias.defined() || bias.dim == Dims{out}},
            {"one dtype", one_dtype({&x, &w, &bias})}},
           {&x, &w, &bias});
  Dims dims = x.dim;
  dims[dims.rank - 1] = out;
  Tensor y = op.empty(dims, x.dtype);
  op.on_cpu(x, [&]<class T>(T*) {
    if (bias.defined())
      parallel_rows(x.rows(), out,
                    [&](int64_t r) { std::copy_n(bias.as<T>(), out, row_of<T>(y, r)); });
    linear_y<T>(x, w, {y.as<T>(), bias.defined()});
  });
  op.record({x, w, bias}, {&y})
      .bx({w}, [](const auto& b) { linear_dx(b.dy(), b.keep[0], b.to(0)); })
      .bw(1, {x}, []<class T>(Backward<T> b) {
        linear_dw(b.dy(), b.keep[0], b.to(1));
        add_columns<T>(b.dy().rows(), b.dy().cols(), b.to(2),
                       [&, d = b.dy().template as<T>(), n = b.dy().cols()](int64_t r, int64_t j) {
                         return d[r * n + j];
                       });
      });
  return y;
}

}  // namespace pith
