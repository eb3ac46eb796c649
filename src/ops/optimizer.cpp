// adamw_step: g' = grad_scale g; m = b1 m + (1-b1) g'; v = b2 v + (1-b2) g'^2;
// w -= lr (weight_decay w + (m / (1-b1^step)) / (sqrt(v / (1-b2^step)) + eps)).
//   in     w, g, m, v of one shape and dtype, f32|f64
//   errors shapes or dtypes differ; step < 1

#include <algorithm>

#include "core/rng.h"
#include "ops/cpu.h"

namespace pith {
namespace {

constexpr i64 kBlock = 1 << 13;

// f(begin, end) of consecutive blocks of [0, n); `work`: operations an element.
template <class F>
void parallel_blocks(i64 n, i64 work, F&& f) {
  parallel_rows((n + kBlock - 1) / kBlock, kBlock * work,
                [&](i64 b) { f(b * kBlock, min(n, (b + 1) * kBlock)); });
}

template <class T>
void adamw_block(const AdamW& o, i64 n, const T* g, T* w, T* m, T* v) {
  const T b1 = T(o.beta1), c1 = T(1 - o.beta1), b2 = T(o.beta2), c2 = T(1 - o.beta2);
  const T scale = T(o.grad_scale), eps = T(o.eps), keep = T(1 - o.lr * o.weight_decay);
  const T rate = T(o.lr / (1 - std::pow(o.beta1, double(o.step))));
  const T root = T(1 / std::sqrt(1 - std::pow(o.beta2, double(o.step))));
  for (i64 i = 0; i < n; i++) {
    const T grad = g[i] * scale;
    m[i] = m[i] * b1 + grad * c1;
    v[i] = v[i] * b2 + grad * grad * c2;
    w[i] = w[i] * keep - rate * (m[i] / (std::sqrt(v[i]) * root + eps));
  }
}

}

void adamw_step(Rank& rank, Tensor w, Tensor g, Tensor m, Tensor v, const AdamW& options, At at) {
  const Op op{rank, "adamw_step", at};
  op.check({{"w, g, m and v of one shape", g.dim == w.dim && m.dim == w.dim && v.dim == w.dim},
            {"one dtype", one_dtype({&w, &g, &m, &v})},
            {"step >= 1", options.step >= 1}},
           {&w, &g, &m, &v});
  op.on_cpu(w, [&]<class T>(T*) {
    parallel_blocks(w.numel(), 16, [&](i64 i, i64 end) {
      adamw_block(options, end - i, g.as<T>() + i, w.as<T>() + i, m.as<T>() + i, v.as<T>() + i);
    });
  });
}

double sum_squares(Rank& rank, Tensor x, At at) {
  vector<double> sums((x.numel() + kBlock - 1) / kBlock);
  Op{rank, "sum_squares", at}.on_cpu(x, [&]<class T>(T*) {
    parallel_blocks(x.numel(), 2, [&](i64 begin, i64 end) {
      const T* v = x.as<T>() + begin;
      sums[begin / kBlock] =
          lane_sum<double>(end - begin, [&](i64 i) { return double(v[i]) * v[i]; });
    });
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

void fill_normal(Rank& rank, Tensor x, u64 key, u64 first, double std, At at) {
  Op{rank, "fill_normal", at}.on_cpu(x, [&]<class T>(T*) {
    parallel_rows(x.numel(), 100,
                  [&](i64 i) { x.as<T>()[i] = T(std * normal_at(key, first + i)); });
  });
}

void fill_constant(Rank& rank, Tensor x, double value, At at) {
  const Op op{rank, "fill_constant", at};
  op.typed(x, [&]<class T>(T*) {
    elementwise<T, Formula::Copy>(op, x.dim, {{}, {.scalar = value}, {}, {}, view_of(x)}, false);
  });
}

}
