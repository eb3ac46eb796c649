#include "ops/gradcheck.h"
#include "ops/ops.h"

namespace pith {
namespace {

struct Sizes {
  int64_t B, S, Z;
  int H, K, N, M;
};
struct Rules {
  bool causal = true;
  int window = 0;
  std::vector<int32_t> ends;  // [B, S]
};

AttentionMask mask_of(Rank& r, const Rules& rules, int64_t batch) {
  AttentionMask mask{rules.causal, rules.window, {}};
  const int64_t S = rules.ends.size() / std::max<int64_t>(1, batch);
  if (!rules.ends.empty())
    mask.doc_ends = tensor_from(r, {batch, S}, DType::I32, rules.ends.data());
  return mask;
}

bool sees(const Sizes& z, const Rules& rules, int64_t b, int64_t i, int64_t j) {
  const int64_t query = i + z.Z - z.S, key = j;
  if (rules.causal && key > query) return false;
  if (rules.window > 0 && query - key >= rules.window) return false;
  return rules.ends.empty() || rules.ends[b * z.S + i] == rules.ends[b * z.S + j];
}

// The definition, one query at a time. `at(x, b, s, h, n)` reads an input.
template <class At4, class Score>
std::vector<double> reference(
    const Sizes& z, const Rules& rules, double scale, At4 q, At4 k, At4 v, Score extra) {
  std::vector<double> out;
  for (int64_t b = 0; b < z.B; b++)
    for (int64_t i = 0; i < z.S; i++)
      for (int h = 0; h < z.H; h++) {
        std::vector<double> y(z.M);
        double total = 0;
        for (int64_t j = 0; j < z.Z; j++) {
          if (!sees(z, rules, b, i, j)) continue;
          double score = extra(b, h, i, j);
          const int kv = h / (z.H / z.K);
          for (int n = 0; n < z.N; n++) score += scale * q(b, i, h, n) * k(b, j, kv, n);
          total += std::exp(score);
          for (int m = 0; m < z.M; m++) y[m] += std::exp(score) * v(b, j, kv, m);
        }
        for (double x : y) out.push_back(total > 0 ? x / total : 0);
      }
  return out;
}

const double kHidden = -std::numeric_limits<double>::infinity();

// Row 0 has documents of 3, 1 and the rest; row b > 0 one that ends at b + 1 more.
std::vector<int32_t> documents(int64_t batch, int32_t length) {
  std::vector<int32_t> ends;
  for (int64_t b = 0; b < batch; b++)
    for (int32_t i = 0; i < length; i++) {
      const int32_t cut = b == 0 ? (i < 3 ? 3 : i < 4 ? 4 : length) : (i <= b ? b + 1 : length);
      ends.push_back(std::min(cut, length));
    }
  return ends;
}

struct PackedCase {
  const char* name;
  int64_t B, S;
  Heads heads;
  Rules rules;
};
std::vector<PackedCase> packed_cases() {
  return {
      {"one token", 1, 1, {1, 1, 2}, {}},
      {"odd", 2, 7, {3, 1, 5}, {}},
      {"grouped", 2, 9, {4, 2, 4}, {}},
      {"real", 2, 70, {4, 2, 16}, {}},
      {"several blocks, window", 1, 200, {2, 1, 8}, {.window = 33}},
      {"not causal", 2, 6, {2, 2, 3}, {.causal = false}},
      {"window", 1, 9, {2, 1, 3}, {.window = 3}},
      {"window of one", 1, 5, {2, 1, 3}, {.window = 1}},
      {"window, not causal", 1, 9, {2, 1, 3}, {.causal = false, .window = 3}},
      {"documents", 2, 9, {2, 1, 4}, {.ends = documents(2, 9)}},
      {"documents, blocks", 1, 150, {2, 1, 4}, {.ends = documents(1, 150)}},
      {"documents and window", 3, 9, {2, 1, 4}, {.window = 2, .ends = documents(3, 9)}},
      {"documents, not causal", 2, 9, {2, 2, 4}, {.causal = false, .ends = documents(2, 9)}},
  };
}

TEST(Attention, PackedValues) {
  for (const PackedCase& c : packed_cases()) {
    TestRank t;
    const int N = c.heads.size, width = N * (c.heads.query + 2 * c.heads.kv);
    const Sizes z{c.B, c.S, c.S, c.heads.query, c.heads.kv, N, N};
    Tensor qkv = t.random({c.B * c.S, width});
    auto part = [&](int first) {
      return [&, first](int64_t b, int64_t s, int h, int n) {
        return qkv.as<double>()[(b * c.S + s) * width + first + h * N + n];
      };
    };
    const int k = c.heads.query * N, v = k + c.heads.kv * N;
    const auto want = reference(
        z, c.rules, 1 / std::sqrt(N), part(0), part(k), part(v), [](auto...) { return 0.0; });
    Tensor got = attention(t.rank, qkv, c.heads, c.B, mask_of(t.rank, c.rules, c.B));
    EXPECT_EQ(got.dim, (Dims{c.B * c.S, c.heads.query * N})) << c.name;
    EXPECT_LT(relative_error(values_of(got), want), 1e-13) << c.name;
    Tensor f32 =
        attention(t.rank, t.cast(qkv, DType::F32), c.heads, c.B, mask_of(t.rank, c.rules, c.B));
    EXPECT_LT(relative_error(values_of(f32), want), 2e-6) << c.name;
  }
}

TEST(Attention, PackedGradients) {
  for (const PackedCase& c : packed_cases()) {
    TestRank t;
    const int width = c.heads.size * (c.heads.query + 2 * c.heads.kv);
    gradcheck(std::string("attention, ") + c.name, {t.random({c.B * c.S, width})},
        [&](Rank& r, TensorList x) {
          return attention(r, x[0], c.heads, c.B, mask_of(r, c.rules, c.B));
        },
        {.max_elements = c.S > 20 ? 20 : 100});
  }
}

enum Extra { kNone, kBias, kVisible, kBoth };
struct GeneralCase {
  const char* name;
  Sizes sizes;
  Rules rules;
  Extra extra = kNone;
  Dims scores = {};  // of bias and visible
};
std::vector<GeneralCase> general_cases() {
  return {
      {"one token", {1, 1, 1, 1, 1, 1, 1}, {}},
      {"odd, unequal heads", {2, 5, 5, 3, 1, 5, 3}, {}},
      {"grouped", {2, 6, 6, 4, 2, 3, 4}, {}},
      {"more keys", {1, 3, 7, 2, 1, 3, 2}, {}},
      {"more queries: the first see nothing", {1, 7, 3, 2, 1, 3, 2}, {}},
      {"more keys, window", {1, 3, 7, 2, 1, 3, 2}, {.window = 2}},
      {"not causal", {2, 4, 6, 2, 2, 3, 3}, {.causal = false}},
      {"documents", {1, 4, 4, 2, 1, 3, 3}, {.ends = {2, 2, 4, 4}}},
      {"blocks, unequal", {1, 80, 130, 2, 1, 4, 6}, {}},
      {"bias", {2, 4, 5, 4, 2, 3, 2}, {}, kBias, {2, 4, 4, 5}},
      {"bias of all rows", {3, 4, 4, 4, 2, 3, 2}, {}, kBias, {1, 4, 4, 4}},
      {"bias of all heads", {3, 4, 4, 4, 2, 3, 2}, {.causal = false}, kBias, {3, 1, 4, 4}},
      {"one bias", {3, 70, 70, 4, 2, 3, 2}, {.window = 40}, kBias, {1, 1, 70, 70}},
      {"visible", {2, 4, 5, 4, 2, 3, 2}, {.causal = false}, kVisible, {2, 4, 4, 5}},
      {"visible, causal", {2, 6, 6, 4, 2, 3, 2}, {}, kVisible, {1, 1, 6, 6}},
      {"both", {2, 6, 6, 4, 2, 3, 2}, {}, kBoth, {2, 1, 6, 6}},
  };
}

// Hides about a third, and all from query 1.
std::vector<uint8_t> some_visible(const Dims& dims) {
  std::vector<uint8_t> v(dims.numel());
  for (int64_t i = 0; i < dims.numel(); i++)
    v[i] = i / dims[3] % dims[2] != 1 && uniform_at(5, i) > 0.35;
  return v;
}

std::vector<Tensor> general_inputs(TestRank& t, const GeneralCase& c) {
  const Sizes& z = c.sizes;
  std::vector<Tensor> x = {t.random({z.B, z.S, z.H, z.N}, 1), t.random({z.B, z.Z, z.K, z.N}, 2),
      t.random({z.B, z.Z, z.K, z.M}, 3)};
  x.push_back(c.extra & kBias ? t.random(c.scores, 4) : Tensor{});
  x.push_back(c.extra & kVisible ? t.mask(c.scores, some_visible(c.scores)) : Tensor{});
  return x;
}

constexpr double kScale = 0.7;

TEST(Attention, GeneralValues) {
  for (const GeneralCase& c : general_cases()) {
    TestRank t;
    const auto x = general_inputs(t, c);
    auto part = [&](int i) {
      return [&, i](int64_t b, int64_t s, int h, int n) {
        const Dims& d = x[i].dim;
        return x[i].as<double>()[((b * d[1] + s) * d[2] + h) * d[3] + n];
      };
    };
    auto extra = [&](int64_t b, int h, int64_t i, int64_t j) {
      const Dims& d = c.scores;
      if (c.extra == kNone) return 0.0;
      const int64_t at =
          ((d[0] > 1 ? b : 0) * d[1] + (d[1] > 1 ? h : 0)) * d[2] * d[3] + i * d[3] + j;
      if (c.extra & kVisible && !x[4].as<uint8_t>()[at]) return kHidden;
      return c.extra & kBias ? x[3].as<double>()[at] : 0.0;
    };
    const auto want = reference(c.sizes, c.rules, kScale, part(0), part(1), part(2), extra);
    Tensor got = attention(
        t.rank, x[0], x[1], x[2], kScale, mask_of(t.rank, c.rules, c.sizes.B), {x[3], x[4]});
    EXPECT_LT(relative_error(values_of(got), want), 1e-13) << c.name;
  }
}

TEST(Attention, GeneralGradients) {
  for (const GeneralCase& c : general_cases()) {
    TestRank t;
    gradcheck(std::string("attention, general, ") + c.name, general_inputs(t, c),
        [&](Rank& r, TensorList x) {
          return attention(
              r, x[0], x[1], x[2], kScale, mask_of(r, c.rules, c.sizes.B), {x[3], x[4]});
        },
        // Rows have two numbers or so: where they cancel, that of the output's rounding shows.
        {.bf16_tolerance = 1e-2, .bf16_row = 3e-2, .max_elements = c.sizes.S > 20 ? 20 : 60});
  }
}

// Sizes of zero give empty results and gradients, or zeros where there are queries without keys.
TEST(Attention, Empty) {
  TestRank t;
  const Heads heads{4, 2, 3};
  for (const int64_t batch : {0, 3}) {
    Tensor qkv = t.random({0, 24});
    make_leaf(t.rank, qkv);
    Tensor y = attention(t.rank, qkv, heads, batch, {});
    EXPECT_EQ(y.dim, (Dims{0, 12}));
    add_grad(t.rank, y, t.floats({0, 12}, {}));
    backward(t.rank, 0, t.tape.size());
    EXPECT_EQ(grad_of(t.tape, qkv).dim, qkv.dim);
  }
  Tensor q = t.random({2, 3, 4, 5}), k = t.random({2, 0, 2, 5}), v = t.random({2, 0, 2, 6});
  make_leaf(t.rank, q);
  Tensor y = attention(t.rank, q, k, v, 1, {});
  EXPECT_EQ(values_of(y), std::vector<double>(2 * 3 * 4 * 6, 0.0));
  add_grad(t.rank, y, t.random(y.dim));
  backward(t.rank, 0, t.tape.size());
  EXPECT_EQ(values_of(grad_of(t.tape, q)), std::vector<double>(2 * 3 * 4 * 5, 0.0));
}

// Changing document A leaves document B's outputs and gradients as they are, bit for bit.
TEST(Attention, DocumentsDoNotLeak) {
  const int64_t B = 2, S = 150;
  const Heads heads{4, 2, 8};
  const int width = heads.size * (heads.query + 2 * heads.kv);
  std::vector<int32_t> ends(B * S);
  for (int64_t i = 0; i < B * S; i++) ends[i] = i % S < 37 ? 37 : i % S < 100 ? 100 : 150;
  auto run = [&](int64_t changed, bool causal) {  // a document; -1: none
    TestRank t;
    Tensor qkv = t.random({B * S, width}, 1, 1, 0, DType::F32);
    const Tensor other = t.random({B * S, width}, 2, 30, 0, DType::F32);
    for (int64_t i = 0; i < B * S; i++)
      if (i < S && ends[i] == changed)
        std::memcpy(qkv.f32() + i * width, other.f32() + i * width, width * 4);
    make_leaf(t.rank, qkv);
    Tensor y = attention(t.rank, qkv, heads, B, {causal, 0, t.ints({B, S}, ends)});
    const auto values = values_of(y);
    add_grad(t.rank, y, t.random(y.dim, 3, 1, 0, DType::F32));
    backward(t.rank, 0, t.tape.size());
    return std::pair{values, values_of(grad_of(t.tape, qkv))};
  };
  for (const bool causal : {true, false}) {
    const auto before = run(-1, causal);
    for (const int64_t document : {37, 100, 150}) {
      const auto after = run(document, causal);
      int64_t same = 0, leaks = 0, moved = 0;
      auto compare = [&](const auto& a, const auto& b) {
        const int64_t row = a.size() / (B * S);
        for (int64_t i = 0; i < B * S; i++) {
          const bool equal = std::equal(&a[i * row], &a[i * row] + row, &b[i * row]);
          if (i < S && ends[i] == document)
            moved += !equal;
          else
            (equal ? same : leaks)++;
        }
      };
      compare(before.first, after.first);
      compare(before.second, after.second);
      EXPECT_EQ(leaks, 0) << "document that ends at " << document;
      EXPECT_GT(moved, 0);
      EXPECT_GT(same, 0);
    }
  }
}

TEST(Attention, NamesTheCaller) {
  TestRank t;
  const Heads heads{4, 2, 3};
  Tensor qkv = t.random({8, 24}), q = t.random({1, 4, 2, 3}), k = t.random({1, 5, 1, 3});
  Tensor ends = t.ints({2, 4}, {2, 2, 4, 4, 4, 4, 2, 2});
  auto packed = [&](int64_t batch, Heads h, AttentionMask mask) {
    return [&, batch, h, mask] { attention(t.rank, qkv, h, batch, mask, {"model.cpp", 7}); };
  };
  expect_error(packed(2, {4, 3, 3}, {}), {"model.cpp:7: attention", "heads.query a multiple"});
  expect_error(packed(2, {4, 2, 4}, {}), {"model.cpp:7: attention", "qkv [B*S, (H+2K)*N]"});
  expect_error(packed(3, heads, {}), {"model.cpp:7: attention", "batch that divides"});
  expect_error(packed(2, heads, {true, -1, {}}), {"model.cpp:7", "mask.window >= 0"});
  expect_error(packed(2, heads, {true, 0, ends}), {"model.cpp:7", "doc_ends that ascend"});
  expect_error(packed(4, heads, {true, 0, ends}), {"model.cpp:7", "mask.doc_ends i32 [B, S]"});
  auto general = [&](Tensor key, Tensor v, AttentionMask mask, AttentionBias bias) {
    return [=, &t] { attention(t.rank, q, key, v, 1, mask, bias, {"model.cpp", 9}); };
  };
  expect_error(general(t.random({1, 5, 1, 2}), k, {}, {}), {"model.cpp:9: attention", "[B,Z,K,N]"});
  expect_error(general(k, t.random({1, 4, 1, 3}), {}, {}), {"model.cpp:9: attention", "[B,Z,K,M]"});
  expect_error(general(k, t.cast(k, DType::F32), {}, {}), {"model.cpp:9", "equal dtypes"});
  expect_error(general(k, k, {true, 0, t.ints({1, 4}, {2, 2, 4, 4})}, {}),
      {"model.cpp:9", "S == Z where mask.doc_ends"});
  expect_error(general(k, k, {}, {t.random({1, 2, 5, 4}), {}}), {"model.cpp:9", "bias [1|B, 1|H"});
  expect_error(general(k, k, {}, {{}, t.random({1, 2, 4, 5})}), {"model.cpp:9", "visible u8"});
}

// A NaN that reaches attention is neither hidden by the mask's zeros nor passed on in debug mode.
TEST(Attention, ReportsNaN) {
  TestRank t;
  Tensor qkv = t.random({2, 8}, 1, 1, 0, DType::F32);
  qkv.f32()[0] = NAN;
  EXPECT_TRUE(std::isnan(attention(t.rank, qkv, {2, 1, 2}, 1, {}).f32()[0]));
  t.rank.debug = true;
  expect_error(
      [&] {
        attention(t.rank, qkv, {2, 1, 2}, 1, {}, {"model.cpp", 3});
      },
      {"model.cpp:3: attention", "non-finite"});
}

}  // namespace
}  // namespace pith
