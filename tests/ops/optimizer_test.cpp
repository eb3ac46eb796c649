#include "ops/gradcheck.h"
#include "ops/ops.h"

namespace pith {
namespace {

TEST(Adamw, FollowsTheTextbookStepByStep) {
  const AdamW options[] = {
      {.lr = 1e-2},
      {.lr = 0.3, .beta1 = 0.8, .beta2 = 0.95, .eps = 1e-3, .weight_decay = 0.5},
      {.lr = 1e-2, .beta1 = 0, .weight_decay = 0, .grad_scale = 0.125},
  };
  for (AdamW o : options)
    for (const DType dtype : {DType::F64, DType::F32})
      for (const int64_t n : {int64_t{0}, int64_t{1}, int64_t{20001}}) {
        TestRank t;
        const Tensor w = t.random({n}, 1, 1, 0, dtype);
        const Tensor m = t.floats({n}, {}, dtype), v = t.floats({n}, {}, dtype);
        std::vector<double> theta = values_of(w), first(n), second(n);
        for (o.step = 1; o.step <= 12; o.step++) {
          const Tensor g = t.random({n}, 10 + o.step, 1, 0.5, dtype);
          adamw_step(t.rank, w, g, m, v, o);
          const std::vector<double> grads = values_of(g);
          for (int64_t i = 0; i < n; i++) {
            const double d = grads[i] * o.grad_scale;
            first[i] = o.beta1 * first[i] + (1 - o.beta1) * d;
            second[i] = o.beta2 * second[i] + (1 - o.beta2) * d * d;
            const double m_hat = first[i] / (1 - std::pow(o.beta1, o.step));
            const double v_hat = second[i] / (1 - std::pow(o.beta2, o.step));
            theta[i] -= o.lr * (m_hat / (std::sqrt(v_hat) + o.eps) + o.weight_decay * theta[i]);
          }
          const double limit = dtype == DType::F64 ? 1e-13 : 1e-6;
          EXPECT_LE(relative_error(values_of(w), theta), limit) << "step " << o.step;
          EXPECT_LE(relative_error(values_of(m), first), limit) << "step " << o.step;
          EXPECT_LE(relative_error(values_of(v), second), limit) << "step " << o.step;
        }
      }
}

TEST(Adamw, FirstStepIsTheRateAndDecayIsApart) {
  TestRank t;
  const Tensor w = t.floats({2}, {1, 1}), m = t.floats({2}, {}), v = t.floats({2}, {});
  adamw_step(
      t.rank, w, t.floats({2}, {1e-4, -50}), m, v, {.lr = 0.01, .eps = 0, .weight_decay = 0});
  EXPECT_NEAR(w.as<double>()[0], 0.99, 1e-14);  // whatever the gradient's size
  EXPECT_NEAR(w.as<double>()[1], 1.01, 1e-14);
  const Tensor u = t.floats({1}, {8}), zero = t.floats({1}, {});
  const Tensor m1 = t.floats({1}, {}), v1 = t.floats({1}, {});
  for (int64_t step = 1; step <= 3; step++)
    adamw_step(t.rank, u, zero, m1, v1, {.lr = 0.5, .weight_decay = 0.5, .step = step});
  EXPECT_EQ(u.as<double>()[0], 8 * 0.75 * 0.75 * 0.75);
  EXPECT_EQ(m1.as<double>()[0], 0);
  EXPECT_EQ(v1.as<double>()[0], 0);
}

TEST(Flat, SumSquares) {
  for (const int64_t n : {0, 1, 17, 8191, 8192, 40003}) {
    TestRank t;
    const Tensor x = t.random({n}, 3, 2, 0, DType::F32);
    long double want = 0;
    for (const double v : values_of(x)) want += static_cast<long double>(v) * v;
    const double got = sum_squares(t.rank, x);
    EXPECT_NEAR(got, static_cast<double>(want), 1e-13 * static_cast<double>(want)) << n;
    EXPECT_EQ(sum_squares(t.rank, x), got);
  }
}

TEST(Flat, FillNormalDoesNotDependOnTheCut) {
  TestRank t;
  const int64_t n = 20001;
  const uint64_t key = stream_key(7, "model.layers.0.weight"), first = 12345;
  const Tensor whole = empty(t.rank, {n}, DType::F32), cut = empty(t.rank, {n}, DType::F32);
  fill_normal(t.rank, whole, key, first, 0.02);
  for (int64_t i = 0; i < n; i++)
    ASSERT_EQ(whole.f32()[i], static_cast<float>(0.02 * normal_at(key, first + i))) << i;
  for (int64_t begin = 0, size = 1; begin < n; begin += size, size = size * 2 + 1) {
    const int64_t end = std::min(n, begin + size);
    fill_normal(t.rank, cut.slice_rows(begin, end), key, first + begin, 0.02);
  }
  EXPECT_EQ(values_of(cut), values_of(whole));
  double mean = 0;
  for (const double v : values_of(whole)) mean += v / n;
  EXPECT_NEAR(std::sqrt(sum_squares(t.rank, whole) / n), 0.02, 0.0005);
  EXPECT_NEAR(mean, 0, 0.0006);
  fill_normal(t.rank, empty(t.rank, {0}, DType::F32), key, 0, 1);
}

TEST(Flat, FillConstant) {
  TestRank t;
  for (const DType dtype : {DType::F32, DType::F64}) {
    const Tensor x = t.random({9000}, 1, 1, 0, dtype);
    fill_constant(t.rank, x.slice_rows(1, 8999), 0.25);
    const std::vector<double> got = values_of(x);
    EXPECT_NE(got[0], 0.25);
    EXPECT_NE(got[8999], 0.25);
    EXPECT_EQ(std::count(got.begin(), got.end(), 0.25), 8998);
  }
}

TEST(Flat, ErrorsNameTheCallersLine) {
  TestRank t;
  const Tensor a = t.random({3}), b = t.random({4}), f32 = t.random({3}, 1, 1, 0, DType::F32);
  const int line = __LINE__ + 1;
  const auto wrong = [&] { adamw_step(t.rank, a, b, a, a, {}); };
  expect_error(
      wrong, {text("optimizer_test.cpp:%d: adamw_step: need w, g, m", line).c_str(), "[4] f64"});
  expect_error([&] { adamw_step(t.rank, a, f32, a, a, {}); }, {"adamw_step: need one dtype"});
  expect_error([&] { adamw_step(t.rank, a, a, a, a, {.step = 0}); }, {"need step >= 1"});
  expect_error([&] { sum_squares(t.rank, t.ints({1}, {1})); },
      {"optimizer_test.cpp:", "sum_squares: need dtype f32 or f64"});
}

}  // namespace
}  // namespace pith
