#include "ops/gradcheck.h"
#include "ops/ops.h"

namespace pith {
namespace {

struct LossCase {
  int64_t T, D, V;
  std::vector<int32_t> pattern;  // labels, repeated
};
const LossCase kCases[] = {
    {5, 3, 7, {0, 6, 2, 3, 3}},
    {1, 1, 1, {0}},
    {0, 4, 3, {0}},
    {4, 2, 3, {kIgnoreLabel}},
    {6, 5, 9, {kIgnoreLabel, 8, 1}},
    {520, 3, 11, {4, kIgnoreLabel, 10, 0, 7}},
};

std::vector<int32_t> labels_of(const LossCase& c) {
  std::vector<int32_t> labels(c.T);
  for (int64_t i = 0; i < c.T; i++) labels[i] = c.pattern[i % c.pattern.size()];
  return labels;
}

TEST(Loss, Gradients) {
  for (const LossCase& c : kCases)
    for (const double scale : {1.0, 0.125}) {
      TestRank t;
      gradcheck(text("lm_head_cross_entropy [%ld,%ld] of %ld", long(c.T), long(c.D), long(c.V)),
          {t.random({c.T, c.D}), t.random({c.V, c.D}, 2), t.ints({c.T}, labels_of(c))},
          [=](Rank& r, TensorList v) { return lm_head_cross_entropy(r, v[0], v[1], v[2], scale); },
          {.max_elements = 30, .cotangent = scale});
    }
}

TEST(Loss, IsTheFormulaWhateverTheScale) {
  for (const LossCase& c : kCases) {
    TestRank t;
    const Tensor x = t.random({c.T, c.D}), w = t.random({c.V, c.D}, 2);
    const std::vector<int32_t> labels = labels_of(c);
    double want = 0;
    for (int64_t i = 0; i < c.T; i++) {
      if (labels[i] == kIgnoreLabel) continue;
      double sum = 0, at_label = 0;
      for (int64_t v = 0; v < c.V; v++) {
        double logit = 0;
        for (int64_t d = 0; d < c.D; d++)
          logit += x.as<double>()[i * c.D + d] * w.as<double>()[v * c.D + d];
        sum += std::exp(logit);
        if (v == labels[i]) at_label = logit;
      }
      want += std::log(sum) - at_label;
    }
    for (const double scale : {1.0, 1e-6}) {
      const Tensor y = lm_head_cross_entropy(t.rank, x, w, t.ints({c.T}, labels), scale);
      ASSERT_TRUE(y.dim == Dims{1});
      EXPECT_NEAR(y.as<double>()[0], want, 1e-13 * std::max(1.0, want)) << c.T;
    }
  }
}

TEST(Loss, LargeLogits) {
  TestRank t;
  // Two tokens, logits (1e4, -1e4, 0): the label is the largest, then the smallest.
  const Tensor x = t.floats({2, 1}, {1, 1}, DType::F32);
  const Tensor w = t.floats({3, 1}, {1e4, -1e4, 0}, DType::F32);
  Tensor leaf = x;
  make_leaf(t.rank, leaf);
  const Tensor y = lm_head_cross_entropy(t.rank, leaf, w, t.ints({2}, {0, 1}), 1);
  EXPECT_EQ(values_of(y)[0], 2e4);
  add_grad(t.rank, y, y);  // whatever arrives, the gradient is that of `scale`
  backward(t.rank, 0, t.tape.size(), true);
  EXPECT_EQ(values_of(grad_of(t.tape, leaf)), (std::vector<double>{0, 2e4}));
}

// The gradient is the same when the pipeline defers weight gradients, whatever gradient arrives.
TEST(Loss, WeightGradientIsAddedInTheForward) {
  TestRank t;
  Tensor x = t.random({3, 2}), w = t.random({5, 2}, 2), grad = t.floats({5, 2}, {});
  make_leaf(t.rank, x);
  w.grad = grad.data;
  const Tensor labels = t.ints({3}, {1, 4, 1});
  Tensor y = lm_head_cross_entropy(t.rank, x, w, labels, 0.5);
  const std::vector<double> after_forward = values_of(grad);
  double norm = 0;
  for (const double g : after_forward) norm += std::fabs(g);
  EXPECT_GT(norm, 0.1);
  add_grad(t.rank, y, t.floats({1}, {1234}));
  backward(t.rank, 0, t.tape.size(), true);
  weight_grads(t.rank, {{&t.tape, 0, t.tape.size()}});
  EXPECT_EQ(values_of(grad), after_forward);
  EXPECT_LT(std::fabs(values_of(grad_of(t.tape, x))[0]), 2);
  // Nothing is left of it without a tape.
  t.rank.tape = nullptr;
  lm_head_cross_entropy(t.rank, x, w, labels, 0.5);
  EXPECT_EQ(values_of(grad), after_forward);
}

TEST(Loss, NeverHoldsAllLogits) {
  TestRank t;
  const int64_t T = 4096, D = 4, V = 512;
  Tensor x = t.random({T, D}, 1, 1, 0, DType::F32), w = t.random({V, D}, 2, 1, 0, DType::F32);
  make_leaf(t.rank, x);
  const Tensor labels = t.ints({T}, std::vector<int32_t>(T, 3));
  const int64_t before = t.allocator.live_bytes;
  t.allocator.reset_peak();
  const Tensor y = lm_head_cross_entropy(t.rank, x, w, labels, 1);
  EXPECT_LT(t.allocator.peak_bytes - before, T * V * 4 / 8);
  EXPECT_LT(t.allocator.live_bytes - before, 2 * x.bytes()) << "kept until the backward";
}

TEST(Loss, ErrorsNameTheCallersLine) {
  TestRank t;
  Rank& r = t.rank;
  const Tensor x = t.random({2, 3}), w = t.random({4, 3});
  const Tensor far = t.ints({2}, {0, 4});
  const int line = __LINE__ + 1;
  const auto wrong = [&] { lm_head_cross_entropy(r, x, w, far, 1); };
  expect_error(wrong, {text("loss_test.cpp:%d: lm_head_cross_entropy: need", line).c_str(),
                          "labels in [0,4), not 4 at element 1"});
  expect_error(
      [&] {
        lm_head_cross_entropy(r, x, w, t.ints({2}, {0, -1}), 1);
      },
      {"not -1 at element 1"});
  expect_error(
      [&] { lm_head_cross_entropy(r, x, w, t.ints({1}, {0}), 1); }, {"need labels I32 [T]"});
  expect_error(
      [&] {
        lm_head_cross_entropy(r, x, t.random({4, 2}), t.ints({2}, {0, 1}), 1);
      },
      {"need x [T, D] and w [V, D]", "[4,2] f64"});
}

}  // namespace
}  // namespace pith
