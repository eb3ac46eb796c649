#include <set>

#include "ops/gradcheck.h"
#include "ops/ops.h"

namespace pith {
namespace {

// ---- Router -----------------------------------------------------------------------------------

struct RouterCase {
  int64_t T, D, E;
  int k;
};
const RouterCase kRouterCases[] = {
    {5, 3, 4, 2}, {1, 1, 1, 1}, {0, 4, 6, 2}, {7, 5, 6, 6}, {9, 4, 5, 3}, {11, 33, 130, 8}};

std::vector<int32_t> some_ids(const RouterCase& c) {
  std::vector<int32_t> ids;
  for (int64_t t = 0; t < c.T; t++)
    for (int j = 0; j < c.k; j++) ids.push_back(static_cast<int32_t>((t * 3 + j) % c.E));
  return ids;
}

TEST(Router, Gradients) {
  for (const RouterCase& c : kRouterCases)
    for (const bool normalize : {false, true})
      for (const int forcing : {0, 1, 2}) {
        TestRank t;
        const std::string name =
            text("router %ld tokens, %d of %ld experts, normalize %d, forcing %d", long(c.T), c.k,
                long(c.E), normalize, forcing);
        const Tensor ids = t.ints({c.T, c.k}, some_ids(c));
        gradcheck(name, {t.random({c.T, c.D}), t.random({c.E, c.D}, 2), ids},
            [&](Rank& r, TensorList v) {
              RouterOptions o{.top_k = c.k, .normalize = normalize};
              if (forcing == 1) o.force_balanced = true;
              if (forcing == 2) o.forced_ids = v[2];
              const Routing out = router(r, v[0], v[1], o);
              return TensorList{out.weights, out.probs};
            },
            {.max_elements = 20});
      }
}

TEST(Router, IsTheFormula) {
  for (const RouterCase& c : kRouterCases)
    for (const bool normalize : {false, true}) {
      TestRank t;
      const Tensor x = t.random({c.T, c.D}), w = t.random({c.E, c.D}, 2);
      const Routing got = router(t.rank, x, w, {.top_k = c.k, .normalize = normalize});
      ASSERT_TRUE((got.ids.dim == Dims{c.T, c.k}) && (got.weights.dim == Dims{c.T, c.k}));
      ASSERT_TRUE((got.probs.dim == Dims{c.T, c.E}) && got.ids.dtype == DType::I32);
      for (int64_t s = 0; s < c.T; s++) {
        std::vector<std::pair<double, int>> order;
        std::vector<double> p(c.E);
        double all = 0, chosen = 0;
        for (int64_t e = 0; e < c.E; e++) {
          double logit = 0;
          for (int64_t d = 0; d < c.D; d++)
            logit += x.as<double>()[s * c.D + d] * w.as<double>()[e * c.D + d];
          all += p[e] = std::exp(logit);
          order.push_back({-logit, static_cast<int>(e)});
        }
        std::sort(order.begin(), order.end());
        for (int j = 0; j < c.k; j++) chosen += p[order[j].second] / all;
        for (int64_t e = 0; e < c.E; e++)
          EXPECT_NEAR(got.probs.as<double>()[s * c.E + e], p[e] / all, 1e-14);
        for (int j = 0; j < c.k; j++) {
          const int e = order[j].second;
          EXPECT_EQ(got.ids.i32()[s * c.k + j], e) << "token " << s << ", slot " << j;
          EXPECT_NEAR(
              got.weights.as<double>()[s * c.k + j], p[e] / all / (normalize ? chosen : 1), 1e-14);
        }
      }
    }
}

TEST(Router, TiesAndNaNs) {
  TestRank t;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  // Logits are w's column times x: experts 1, 3 and 4 tie above 0, 2 and 5.
  const Tensor w = t.floats({6, 1}, {0, 2, 0, 2, 2, 0}), x = t.floats({3, 1}, {1, 0, nan});
  for (const DType dtype : {DType::F32, DType::F64}) {
    const Routing got = router(t.rank, t.cast(x, dtype), t.cast(w, dtype), {.top_k = 4});
    const std::vector<double> ids = values_of(got.ids);
    EXPECT_EQ(std::vector<double>(ids.begin(), ids.begin() + 8),
        (std::vector<double>{1, 3, 4, 0, 0, 1, 2, 3}));
    EXPECT_EQ(std::set<double>(ids.begin() + 8, ids.end()).size(), 4u);
    for (int j = 8; j < 12; j++) EXPECT_TRUE(ids[j] >= 0 && ids[j] < 6);
    EXPECT_TRUE(std::isnan(values_of(got.weights)[8])) << "a NaN must not vanish";
  }
}

TEST(Router, ForcedChoices) {
  TestRank t;
  const Tensor x = t.random({7, 3}), w = t.random({5, 3}, 2);
  const Routing balanced = router(t.rank, x, w, {.top_k = 2, .force_balanced = true});
  const Routing forced = router(t.rank, x, w,
      {.top_k = 2, .normalize = true, .forced_ids = t.ints({7, 2}, some_ids({7, 3, 5, 2}))});
  const auto p = [&](const Routing& r, int i) {
    return r.probs.as<double>()[i / 2 * 5 + r.ids.i32()[i]];
  };
  for (int i = 0; i < 14; i++) {
    EXPECT_EQ(balanced.ids.i32()[i], (i / 2 + i % 2 * (5 / 2)) % 5);
    EXPECT_EQ(balanced.weights.as<double>()[i], p(balanced, i));
    EXPECT_EQ(forced.ids.i32()[i], (i / 2 * 3 + i % 2) % 5);
    EXPECT_NEAR(
        forced.weights.as<double>()[i], p(forced, i) / (p(forced, i) + p(forced, i ^ 1)), 1e-15);
  }
}

// ---- Experts ----------------------------------------------------------------------------------

// The experts of each row, for E experts.
struct Pairs {
  int E;
  std::vector<std::vector<int>> experts;
};
// Experts without rows, rows without experts, one expert, nothing at all, more than a tile.
std::vector<Pairs> pair_cases() {
  Pairs many{3, {}};
  for (int r = 0; r < 230; r++) many.experts.push_back(r % 9 ? std::vector{2, 0} : std::vector{2});
  return {{4, {{2, 0}, {}, {0, 2}, {2}, {3}}}, {1, {{0}, {0}, {0}}}, {3, {}}, {2, {{}, {}}}, many};
}

struct Indices {
  std::vector<int32_t> row_of, offsets, pair_of, row_begin;
  explicit Indices(const Pairs& p) : offsets{0}, row_begin{0} {
    std::vector<std::vector<int32_t>> pairs_of(p.experts.size());
    for (int e = 0; e < p.E; e++) {
      for (size_t r = 0; r < p.experts.size(); r++)
        for (const int chosen : p.experts[r]) {
          if (chosen != e) continue;
          pairs_of[r].push_back(static_cast<int32_t>(row_of.size()));
          row_of.push_back(static_cast<int32_t>(r));
        }
      offsets.push_back(static_cast<int32_t>(row_of.size()));
    }
    for (const auto& of : pairs_of) {
      pair_of.insert(pair_of.end(), of.begin(), of.end());
      row_begin.push_back(static_cast<int32_t>(pair_of.size()));
    }
  }
  int64_t rows() const { return static_cast<int64_t>(row_begin.size()) - 1; }
  int64_t pairs() const { return static_cast<int64_t>(row_of.size()); }
  Dispatched make(Rank& r, Tensor rows, Tensor weights) const {
    const auto ints = [&](const std::vector<int32_t>& v) {
      return tensor_from(r, {static_cast<int64_t>(v.size())}, DType::I32, v.data());
    };
    return {rows, weights, ints(row_of), ints(offsets), ints(pair_of), ints(row_begin)};
  }
};

TEST(Experts, Gradients) {
  for (const Pairs& p : pair_cases()) {
    TestRank t;
    const Indices at(p);
    const int64_t R = at.rows(), P = at.pairs(), D = 5, F = 3, E = p.E;
    const std::string name = text(" of %ld pairs, %ld rows", long(P), long(R));
    const GradcheckOptions few{.max_elements = P > 100 ? 8 : 40};
    gradcheck(
        "grouped_linear" + name, {t.random({P, D}), t.random({E, F, D}, 2)},
        [&](Rank& r, TensorList v) {
          return grouped_linear(r, v[0], v[1], at.make(r, {}, {}).offsets);
        },
        few);
    gradcheck(
        "expand_linear" + name, {t.random({R, D}), t.random({E, F, D}, 2)},
        [&](Rank& r, TensorList v) { return expand_linear(r, at.make(r, v[0], {}), v[1]); }, few);
    gradcheck(
        "linear_reduce" + name, {t.random({P, D}), t.random({E, F, D}, 2)},
        [&](Rank& r, TensorList v) { return linear_reduce(r, v[0], v[1], at.make(r, {}, {})); },
        few);
    // Routing weights are F32 beside BF16; a layer rounds four times.
    GradcheckOptions weighted = few;
    weighted.wide = 0b10;
    GradcheckOptions layer = weighted;
    layer.bf16_tolerance = 1e-2;
    gradcheck(
        "swiglu" + name, {t.random({P, 2 * F})},
        [](Rank& r, TensorList v) { return swiglu(r, v[0]); }, few);
    gradcheck(
        "swiglu, weighted" + name, {t.random({P, 2 * F}, 1, 3), t.random({P}, 2)},
        [](Rank& r, TensorList v) { return swiglu(r, v[0], v[1]); }, weighted);
    gradcheck(
        "expert layer" + name,
        {t.random({R, D}), t.random({P}, 2), t.random({E, 2 * F, D}, 3), t.random({E, D, F}, 4)},
        [&](Rank& r, TensorList v) {
          const Dispatched d = at.make(r, v[0], v[1]);
          return linear_reduce(r, swiglu(r, expand_linear(r, d, v[2]), d.weights), v[3], d);
        },
        layer);
  }
}

TEST(Experts, AreTheFormula) {
  for (const Pairs& p : pair_cases()) {
    TestRank t;
    const Indices at(p);
    const int64_t R = at.rows(), P = at.pairs(), D = 67, F = 200;
    const Tensor x = t.random({R, D}), weights = t.random({P}, 2);
    const Tensor gate_up = t.random({p.E, 2 * F, D}, 3, 0.2), down = t.random({p.E, D, F}, 4);
    const Dispatched d = at.make(t.rank, x, weights);
    const Tensor h =
        grouped_linear(t.rank, index_select(t.rank, d.rows, d.row_of), gate_up, d.offsets);
    const Tensor act = swiglu(t.rank, h, d.weights);
    const Tensor pairs = grouped_linear(t.rank, act, down, d.offsets);
    const Tensor got = scatter_add(t.rank, pairs, d.row_of, R);
    EXPECT_EQ(values_of(expand_linear(t.rank, d, gate_up)), values_of(h));
    EXPECT_EQ(values_of(linear_reduce(t.rank, act, down, d)), values_of(got));
    std::vector<double> want(R * D);
    for (int e = 0; e < p.E; e++)
      for (int q = at.offsets[e]; q < at.offsets[e + 1]; q++)
        for (int64_t f = 0; f < F; f++) {
          const double* row = x.as<double>() + at.row_of[q] * D;
          const double* gate = gate_up.as<double>() + (e * 2 * F + f) * D;
          double g = 0, u = 0;
          for (int64_t i = 0; i < D; i++) {
            g += row[i] * gate[i];
            u += row[i] * gate[F * D + i];
          }
          const double a = g / (1 + std::exp(-g)) * u * weights.as<double>()[q];
          for (int64_t i = 0; i < D; i++)
            want[at.row_of[q] * D + i] += a * down.as<double>()[(e * D + i) * F + f];
        }
    EXPECT_LE(relative_error(values_of(got), want), 1e-13) << P << " pairs";
  }
}

// Micro-batches whose tokens go to other experts, as one product of their weights' gradients.
std::vector<std::vector<double>> gradients_of_several(Device device, DType dtype, bool together) {
  constexpr int E = 8;
  constexpr int64_t D = 64, F = 24;
  TestRank t(device);
  const auto values = [&](Dims dims, uint64_t seed) {
    TestRank host;
    return t.cast(host.random(dims, seed), dtype, true);
  };
  Tensor up = values({E, F, D}, 1), down = values({E, D, F}, 2);
  const Tensor dup = t.floats(up.dim, {}, wide(dtype)), ddown = t.floats(down.dim, {}, wide(dtype));
  up.grad = dup.data;
  down.grad = ddown.data;
  std::vector<Tape> tapes(11);  // more than are joined at once
  std::vector<NodeRange> ranges;
  for (size_t i = 0; i < tapes.size(); i++) {
    Pairs pairs{E, {}};
    for (size_t row = 0; row < i * 7 % 40; row++)
      pairs.experts.push_back({int(row * (i + 1) % 4), 4 + int(row % 3)});
    const Indices at(pairs);
    t.rank.tape = &tapes[i];
    const Dispatched d = at.make(t.rank, values({at.rows(), D}, 10 + i), {});
    const Tensor y = linear_reduce(t.rank, expand_linear(t.rank, d, up), down, d);
    add_grad(t.rank, y, values(y.dim, 100 + i));
    backward(t.rank, 0, tapes[i].size(), true);
    ranges.push_back({&tapes[i], 0, tapes[i].size()});
    if (!together) weight_grads(t.rank, {ranges.back()});
  }
  if (together) weight_grads(t.rank, ranges);
  std::vector<std::vector<double>> grads = {values_of(dup), values_of(ddown)};
  tapes.clear();
  return grads;
}

TEST(Experts, GradientsOfSeveralMicroBatches) {
  const auto want = gradients_of_several(Device::CPU, DType::F64, false);
  EXPECT_EQ(gradients_of_several(Device::CPU, DType::F64, true), want);
  if (!no_gpu().empty()) return;
  for (const bool together : {false, true}) {
    const auto got = gradients_of_several(Device::CUDA, DType::BF16, together);
    EXPECT_EQ(got, gradients_of_several(Device::CUDA, DType::BF16, together));
    for (int i : {0, 1}) EXPECT_LE(relative_error(got[i], want[i]), 5e-3) << together;
  }
}

TEST(Experts, SwigluFarFromZero) {
  TestRank t;
  const Tensor x = t.floats({1, 8}, {200, -200, 1e30, -1e30, 2, 3, 1, 1}, DType::F32);
  const std::vector<double> y = values_of(swiglu(t.rank, x));
  EXPECT_EQ(y[0], 400);
  EXPECT_EQ(y[1], 0);
  EXPECT_FLOAT_EQ(static_cast<float>(y[2]), 1e30f);
  EXPECT_EQ(y[3], 0);
}

// ---- Errors -----------------------------------------------------------------------------------

TEST(MoeErrors, NameTheCallersLine) {
  TestRank t;
  Rank& r = t.rank;
  const Tensor x = t.random({2, 3}), w = t.random({4, 3});
  const auto ids = [&](std::vector<int32_t> v) { return t.ints({2, 1}, v); };
  const Tensor w5 = t.random({4, 5});
  const int line = __LINE__ + 1;
  const auto wrong = [&] { router(r, x, w5, {}); };
  expect_error(wrong, {text("moe_ops_test.cpp:%d: router: need x", line).c_str(), "[4,5] f64"});
  expect_error([&] { router(r, x, w, {.top_k = 5}); }, {"router: need top_k in [1, E]"});
  expect_error(
      [&] {
        router(r, x, w, {.forced_ids = ids({0, 4})});
      },
      {"router: need forced_ids in [0,4), not 4 at element 1"});
  expect_error(
      [&] {
        router(r, x, w, {.top_k = 2, .forced_ids = ids({0, 1})});
      },
      {"router: need forced_ids I32 [T, k]"});
  expect_error(
      [&] {
        router(r, x, w, {.force_balanced = true, .forced_ids = ids({0, 1})});
      },
      {"router: need forced_ids or force_balanced, not both"});

  Indices at({2, {{0, 1}, {1}}});
  const Tensor y = t.random({3, 3});
  expect_error(
      [&] {
        expand_linear(r, at.make(r, t.random({3, 3}), {}), t.random({2, 5, 3}));
      },
      {"moe_ops_test.cpp:", "expand_linear: need rows [R, D]"});
  expect_error(
      [&] {
        linear_reduce(r, t.random({2, 3}), t.random({2, 5, 3}), at.make(r, x, {}));
      },
      {"linear_reduce: need x [P, in]"});
  const Tensor w3 = t.random({2, 5, 3});
  const auto offsets = [&](std::vector<int32_t> v) { return t.ints({3}, v); };
  expect_error(
      [&] {
        grouped_linear(r, y, w3, offsets({0, 3, 2}));
      },
      {"moe_ops_test.cpp:", "grouped_linear: need offsets ascending from 0 to P"});
  expect_error([&] { grouped_linear(r, y, w3, offsets({0, 1, 2})); }, {"need offsets ascending"});
  expect_error([&] { grouped_linear(r, y, w3, t.ints({2}, {0, 3})); }, {"need offsets I32 [E+1]"});
  expect_error([&] { grouped_linear(r, y, w, offsets({0, 1, 3})); }, {"need x [P, in] and w"});
  expect_error([&] { swiglu(r, y); }, {"moe_ops_test.cpp:", "swiglu: need gate_up [P, 2F]"});
  expect_error([&] { swiglu(r, t.random({3, 4}), t.random({2})); }, {"need weights [P]"});
  at.row_of[0] = 2;
  expect_error([&] { expand_linear(r, at.make(r, x, {}), w3); },
      {"need row_of in [0,2), not 2 at element 0"});
  at.row_of[0] = 0;
  at.row_begin[1] = 4;
  expect_error([&] { expand_linear(r, at.make(r, x, {}), w3); }, {"need row_begin ascending"});
}

}  // namespace
}  // namespace pith
