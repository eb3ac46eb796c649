// cuda: where the GPU's form of an op has an edge that other tables do not reach. All their rows
// run on the GPU as well, where there is one (gradcheck.h); the last lines of this program say
// which ops have no CUDA form yet.
#include "ops/gradcheck.h"
#include "ops/ops.h"

namespace pith {
namespace {

// Says at the end of the program what was compared.
struct Summary : testing::Environment {
  void TearDown() override {
    if (!no_gpu().empty()) return;
    std::printf("on the GPU: %d functions as on the CPU", on_gpu().compared);
    for (const auto& [op, times] : on_gpu().refused)
      std::printf("; refused: %s, in %d", op.c_str(), times);
    std::printf("\n");
  }
};
[[maybe_unused]] const testing::Environment* const kSummary =
    testing::AddGlobalTestEnvironment(new Summary);

Tensor top(Rank& r, Tensor x, int k) { return top_k(r, x, k).values; }

// Rows, or elements, for which a grid has no block of their own; rows longer than a block.
TEST(Cuda, ManyAndLongRows) {
  struct Row {
    const char* name;
    Dims dims;
    Tensor (*op)(Rank&, Tensor);
  };
  for (const Row& row :
      {Row{"softmax", {4500, 3}, [](Rank&r, Tensor x) { return softmax(r, x, 1); }},
          Row{"cumsum", {4500, 3}, [](Rank&r, Tensor x) { return cumsum(r, x, 1); }},
          Row{"cumsum, long", {3, 1500}, [](Rank&r, Tensor x) { return cumsum(r, x, -1); }},
          Row{"top_k", {4500, 3}, [](Rank&r, Tensor x) { return top(r, x, 2); }},
          Row{"top_k, long", {3, 1500}, [](Rank&r, Tensor x) { return top(r, x, 300); }},
          Row{"sum, rows", {4500, 3}, [](Rank&r, Tensor x) { return sum(r, x, 1); }},
          Row{"sum, columns", {3, 4500}, [](Rank&r, Tensor x) { return sum(r, x, 0); }},
          Row{"sum, middle", {70, 40, 70}, [](Rank&r, Tensor x) { return sum(r, x, 1); }},
          Row{"sum, one", {1, 9000}, [](Rank&r, Tensor x) { return sum(r, x, 1); }},
          Row{"exp", {600, 1000}, [](Rank&r, Tensor x) { return exp(r, x); }},
          Row{"repeat", {700, 1, 30}, [](Rank&r, Tensor x) { return repeat(r, x, 1, 30); }}}) {
    TestRank t;
    gradcheck(row.name, {t.random(row.dims)},
        [&](Rank& r, TensorList x) { return row.op(r, x[0]); }, {.max_elements = 3});
  }
}

TEST(Cuda, FiveDimensionsAndBytes) {
  TestRank t;
  std::vector<uint8_t> bits(2 * 3 * 2);
  for (size_t i = 0; i < bits.size(); i++) bits[i] = uniform_at(7, i) < 0.5 ? 0 : 1 + i * 40;
  gradcheck("where",
      {t.mask({2, 1, 3, 1, 2}, bits), t.random({1, 5, 1, 4, 1}), t.random({5, 3, 1, 2}, 2)},
      [](Rank& r, TensorList x) { return where(r, x[0], x[1], x[2]); });
  gradcheck("permuted and cut", {t.random({2, 3, 4, 2, 5})}, [](Rank& r, TensorList x) {
    return slice(r, permute(r, x[0], {4, 1, 3, 0, 2}), 1, 1, 3);
  });
}

TEST(Cuda, EqualIds) {
  TestRank t;
  std::vector<int32_t> few(700), all(700, 1), falling(700);
  for (int i = 0; i < 700; i++) {
    few[i] = i * i % 3;
    falling[i] = 699 - i;
  }
  for (const std::vector<int32_t>& ids : {few, all, falling}) {
    gradcheck("scatter_add", {t.random({700, 5}), t.ints({700}, ids)},
        [](Rank& r, TensorList x) { return scatter_add(r, x[0], x[1], 700); },
        {.max_elements = 20});
    gradcheck("embedding", {t.ints({7, 100}, ids), t.random({700, 300})},
        [](Rank& r, TensorList x) { return embedding(r, x[0], x[1]); }, {.max_elements = 3});
  }
}

TEST(Cuda, ProductsOverNothing) {
  TestRank t;
  gradcheck("matmul", {t.random({2, 3, 0}), t.random({0, 4}, 2)},
      [](Rank& r, TensorList x) { return matmul(r, x[0], x[1]); });
  gradcheck("linear", {t.random({3, 0}), t.random({4, 0}, 2), t.random({4}, 3)},
      [](Rank& r, TensorList x) { return linear(r, x[0], x[1], x[2]); });
  gradcheck("linear, no rows", {t.random({0, 5}), t.random({4, 5}, 2), t.random({4}, 3)},
      [](Rank& r, TensorList x) { return linear(r, x[0], x[1], x[2]); });
}

TEST(Cuda, Devices) {
  if (!no_gpu().empty()) GTEST_SKIP() << no_gpu();
  std::string why;
  if constexpr (kCuda)
    for (const std::string& device : cuda_devices(why)) std::printf("%s\n", device.c_str());
}

// NaN where the CPU has NaN; else its number, to `limit`.
void expect_same(const char* what, const Tensor& got, const Tensor& want, double limit) {
  const std::vector<double> a = values_of(got), b = values_of(want);
  ASSERT_EQ(a.size(), b.size()) << what;
  for (size_t i = 0; i < a.size(); i++)
    EXPECT_TRUE(std::isnan(b[i])
                    ? std::isnan(a[i])
                    : a[i] == b[i] || std::fabs(a[i] - b[i]) <= limit * std::fabs(b[i]))
        << what << ", element " << i << ": got " << a[i] << ", want " << b[i];
}

TEST(Cuda, NotNumbersAndExtremes) {
  if (!no_gpu().empty()) GTEST_SKIP() << no_gpu();
  const double inf = INFINITY, nan = NAN;
  const std::vector<double> values = {
      nan, 1, nan, -inf, inf, 0, -0.0, 2, -inf, -inf, -inf, 3, 3, -1000, nan, 1000, -80, 88};
  for (const DType dtype : {DType::F32, DType::F64}) {
    TestRank t, g(Device::CUDA);
    for (const Dims& dims : {Dims{2, 9}, Dims{6, 3}, Dims{18, 1}}) {
      const Tensor x = t.floats(dims, values, dtype), y = g.floats(dims, values, dtype);
      const int k = int(dims[1]);
      const TopK want = top_k(t.rank, x, k), got = top_k(g.rank, y, k);
      EXPECT_EQ(values_of(got.ids), values_of(want.ids));
      expect_same("top_k", got.values, want.values, 0);
      expect_same("softmax", softmax(g.rank, y, 1), softmax(t.rank, x, 1), 1e-6);
      expect_same("sum", sum(g.rank, y, 0), sum(t.rank, x, 0), 1e-6);
      expect_same("cumsum", cumsum(g.rank, y, 1), cumsum(t.rank, x, 1), 1e-6);
      expect_same("relu", relu(g.rank, y), relu(t.rank, x), 0);
      expect_same("clamp", clamp(g.rank, y, 0, 2), clamp(t.rank, x, 0, 2), 0);
      expect_same("exp", exp(g.rank, y), exp(t.rank, x), 1e-6);
      expect_same("sigmoid", sigmoid(g.rank, y), sigmoid(t.rank, x), 1e-6);
      expect_same("softplus", softplus(g.rank, y), softplus(t.rank, x), 1e-6);
    }
  }
}

TEST(Cuda, FillsAndRefuses) {
  if (!no_gpu().empty()) GTEST_SKIP() << no_gpu();
  TestRank t(Device::CUDA), cpu;
  const Tensor x = empty(t.rank, {3, 70}, DType::F32), y = cpu.random({3, 70});
  fill_constant(t.rank, x, 0.1);
  EXPECT_EQ(values_of(x), std::vector<double>(210, 0.1f));
  expect_error([&] { add(t.rank, t.cast(y, DType::F64), y); }, {"add: need tensors on one device"});
  t.rank.debug = true;
  expect_error([&] { index_select(t.rank, x, t.ints({2}, {0, 3})); }, {"not 3 at element 1"});
  expect_error([&] { log(t.rank, add(t.rank, x, -0.1f)); }, {"log", "non-finite"});
}

}  // namespace
}  // namespace pith
