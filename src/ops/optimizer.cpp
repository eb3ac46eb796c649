// adamw_step: g' = grad_scale g; m = b1 m + (1-b1) g'; v = b2 v + (1-b2) g'^2;
// w -= lr (weight_decay w + (m / (1-b1^step)) / (sqrt(v / (1-b2^step)) + eps)).

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

}

void adamw_step(Rank& rank, Tensor w, Tensor g, Tensor m, Tensor v, const AdamW& options, At at) {
  Op op{rank, "adamw_step", at};
  op.check({{"w, g, m and v of one shape", g.dim == w.dim && m.dim == w.dim && v.dim == w.dim},
               {"one dtype", one_dtype({&w, &g, &m, &v})}, {"step >= 1", options.step >= 1}},
      {&w, &g, &m, &v});
  op.typed(w, [&]<class T>(T*) {
    if (w.on_gpu()) return OnCuda<T>::adamw(rank, w, g, m, v, options);
    const AdamWFactors<T> factors(options);
    const T* grad = g.as<T>();
    T *to = w.as<T>(), *first = m.as<T>(), *second = v.as<T>();
    parallel_blocks(w.numel(), 16, [=](i64 i, i64 end) {
      for (; i < end; i++) factors.step(grad[i], to[i], first[i], second[i]);
    });
  });
}

double sum_squares(Rank& rank, Tensor x, At at) {
  double total = 0;
  Op{rank, "sum_squares", at}.typed(x, [&]<class T>(T*) {
    if (x.on_gpu()) return void(total = OnCuda<T>::sum_squares(rank, x));
    vector<double> sums((x.numel() + kBlock - 1) / kBlock);
    parallel_blocks(x.numel(), 2, [&](i64 begin, i64 end) {
      const T* v = x.as<T>() + begin;
      sums[begin / kBlock] =
          lane_sum<double>(end - begin, [&](i64 i) { return double(v[i]) * v[i]; });
    });
    for (const double sum : sums) total += sum;
  });
  return total;
}

void fill_normal(Rank& rank, Tensor x, u64 key, u64 first, double std, At at) {
  Op{rank, "fill_normal", at}.typed(x, [&]<class T>(T*) {
    if (x.on_gpu()) return OnCuda<T>::fill_normal(rank, x, key, first, std);
    parallel_rows(
        x.numel(), 100, [&](i64 i) { x.as<T>()[i] = T(std * normal_at(key, first + i)); });
  });
}

void fill_constant(Rank& rank, Tensor x, double value, At at) {
  Op op{rank, "fill_constant", at};
  op.typed(x, [&]<class T>(T*) {
    elementwise<T, Formula::Copy>(op, x.dim, {{}, {.scalar = value}, {}, {}, view_of(x)}, false);
  });
}

void cast(Rank& rank, Tensor from, Tensor to, At at) {
  const Op op{rank, "cast", at};
  op.check({{"equal shapes", from.dim == to.dim}}, {&from, &to});
  if constexpr (kCuda)
    if (to.on_gpu()) return cuda_cast(rank, from, to);
  op.on_cpu(from, [&]<class T>(T*) {
    op.on_cpu(to, [&]<class U>(U*) { std::copy_n(from.as<T>(), to.numel(), to.as<U>()); });
  });
}

}
