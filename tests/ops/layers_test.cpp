#include "ops/gradcheck.h"
#include "ops/ops.h"

namespace pith {
namespace {

std::string shape_of(Dims d) {
  std::string s = "[";
  for (int i = 0; i < d.rank; i++) s += text("%s%ld", i ? "," : "", long(d[i]));
  return s + "]";
}

std::vector<int32_t> cycle(int64_t n, int step, int limit) {
  std::vector<int32_t> v(n);
  for (int64_t i = 0; i < n; i++) v[i] = static_cast<int32_t>((i * step + 1) % limit);
  return v;
}

TEST(Layers, LinearGradients) {
  struct Case {
    Dims x;
    int64_t out;
  };
  for (const auto& [x, out] : {Case{{5, 3}, 4}, {{1, 1}, 1}, {{2, 3, 4}, 7}, {{6}, 3}, {{0, 4}, 3},
           {{4, 2}, 0}, {{197, 9}, 386}}) {
    TestRank t;
    for (const bool with_bias : {false, true}) {
      std::vector<Tensor> in = {t.random(x), t.random({out, x[x.rank - 1]}, 2)};
      if (with_bias) in.push_back(t.random({out}, 3));
      gradcheck(text("linear %s -> %ld, bias %d", shape_of(x).c_str(), long(out), with_bias), in,
          [&](Rank& r, TensorList v) { return linear(r, v[0], v[1], with_bias ? v[2] : Tensor{}); },
          {.max_elements = x[0] == 197 ? 6 : 200});
    }
  }
}

TEST(Layers, LinearIsTheFormula) {
  for (const auto& [T, in, out] : {std::array<int64_t, 3>{3, 5, 2}, {201, 70, 391}}) {
    TestRank t;
    const Tensor x = t.random({T, in}), w = t.random({out, in}, 2), bias = t.random({out}, 3);
    const Tensor y = linear(t.rank, x, w, bias);
    Tensor want = t.floats({T, out}, {});
    for (int64_t i = 0; i < T; i++)
      for (int64_t j = 0; j < out; j++) {
        double sum = bias.as<double>()[j];
        for (int64_t k = 0; k < in; k++)
          sum += x.as<double>()[i * in + k] * w.as<double>()[j * in + k];
        want.as<double>()[i * out + j] = sum;
      }
    EXPECT_LE(relative_error(y, want), 1e-14) << T << " " << in << " " << out;
  }
}

TEST(Layers, Embedding) {
  struct Case {
    Dims ids;
    int64_t V, D;
  };
  for (const auto& [ids, V, D] :
      {Case{{7}, 5, 3}, {{2, 9}, 4, 130}, {{1}, 1, 1}, {{0}, 5, 3}, {{3, 0}, 2, 2}}) {
    TestRank t;
    const std::vector<int32_t> id = cycle(ids.numel(), 3, static_cast<int>(V));
    const Tensor w = t.random({V, D});
    gradcheck("embedding " + shape_of(ids), {t.ints(ids, id), w},
        [](Rank& r, TensorList v) { return embedding(r, v[0], v[1]); });
    const Tensor y = embedding(t.rank, t.ints(ids, id), w);
    Dims want = ids;
    want[want.rank++] = D;
    EXPECT_TRUE(y.dim == want);
    for (int64_t i = 0; i < y.numel(); i++)
      ASSERT_EQ(y.as<double>()[i], w.as<double>()[id[i / D] * D + i % D]) << i;
  }
}

TEST(Layers, RmsNorm) {
  for (const Dims& dims : {Dims{4, 6}, {1, 1}, {2, 3, 17}, {9}, {0, 5}, {9, 130}}) {
    TestRank t;
    const int64_t D = dims[dims.rank - 1];
    const Tensor x = t.random(dims), other = t.random(dims, 5), w = t.random({D}, 2, 0.3, 1);
    const double eps = 0.1;  // smaller, the gradient of a single element is all cancellation
    gradcheck("rms_norm " + shape_of(dims), {x, w},
        [=](Rank& r, TensorList v) { return rms_norm(r, v[0], v[1], eps); }, {.max_elements = 20});
    gradcheck("add_rms_norm " + shape_of(dims), {x, other, w},
        [=](Rank& r, TensorList v) {
          const AddRmsNorm both = add_rms_norm(r, v[0], v[1], v[2], eps);
          return TensorList{both.sum, both.normed};
        },
        {.max_elements = 20});
    gradcheck("add_rms_norm, one tensor twice " + shape_of(dims), {x, w},
        [=](Rank& r, TensorList v) {
          const AddRmsNorm both = add_rms_norm(r, v[0], v[0], v[1], eps);
          return TensorList{both.sum, both.normed};
        },
        {.max_elements = 20});
    const AddRmsNorm got = add_rms_norm(t.rank, x, other, w, eps);
    std::vector<double> sum(x.numel()), normed(x.numel());
    for (int64_t i = 0; i < x.numel(); i++) sum[i] = x.as<double>()[i] + other.as<double>()[i];
    for (int64_t i = 0; i < x.numel(); i++) {
      double square = 0;
      for (int64_t j = i / D * D; j < (i / D + 1) * D; j++) square += sum[j] * sum[j];
      normed[i] = sum[i] / std::sqrt(square / D + eps) * w.as<double>()[i % D];
    }
    EXPECT_EQ(values_of(got.sum), sum);
    EXPECT_LE(relative_error(values_of(got.normed), normed), 1e-14);
    EXPECT_EQ(values_of(rms_norm(t.rank, got.sum, w, eps)), values_of(got.normed));
  }
}

TEST(Layers, RopeTables) {
  for (const DType dtype : {DType::F32, DType::F64}) {
    TestRank t;
    t.rank.compute = dtype;
    const Rope rope = rope_tables(t.rank, 70, 6, 500.0);
    ASSERT_TRUE((rope.cos.dim == Dims{70, 3}) && (rope.sin.dim == Dims{70, 3}));
    ASSERT_EQ(rope.cos.dtype, dtype);
    const auto cos = values_of(rope.cos), sin = values_of(rope.sin);
    for (int p = 0; p < 70; p++)
      for (int i = 0; i < 3; i++) {
        const double angle = p / std::pow(500.0, 2 * i / 6.0);
        const double limit = dtype == DType::F64 ? 1e-13 : 1e-7;
        EXPECT_NEAR(cos[p * 3 + i], std::cos(angle), limit) << p << " " << i;
        EXPECT_NEAR(sin[p * 3 + i], std::sin(angle), limit) << p << " " << i;
      }
  }
  TestRank t;
  EXPECT_EQ(rope_tables(t.rank, 0, 4, 10.0).cos.numel(), 0);
}

// One head of one token, by the formula: the two halves are one complex number a pair.
std::vector<double> turned(
    const double* x, const double* w, const double* cos, const double* sin, int N, double eps) {
  double square = 0;
  for (int i = 0; i < N; i++) square += x[i] * x[i];
  std::vector<double> y(x, x + N);
  for (int i = 0; w && i < N; i++) y[i] = x[i] / std::sqrt(square / N + eps) * w[i];
  for (int i = 0; i < N / 2; i++) {
    const double a = y[i], b = y[i + N / 2];
    y[i] = a * cos[i] - b * sin[i];
    y[i + N / 2] = b * cos[i] + a * sin[i];
  }
  return y;
}

TEST(Layers, QkNormRope) {
  struct Case {
    int64_t T;
    Heads heads;
  };
  const double eps = 1e-3;
  for (const auto& [T, heads] :
      {Case{3, {2, 1, 4}}, {1, {1, 1, 2}}, {0, {4, 2, 6}}, {5, {6, 2, 10}}, {131, {3, 1, 32}}})
    for (const bool normed : {true, false}) {
      TestRank t;
      t.rank.compute = DType::F64;
      const int N = heads.size, K = heads.kv, H = heads.query;
      const Tensor qkv = t.random({T, (H + 2 * K) * N});
      const Tensor q = t.random({N}, 2, 0.3, 1), k = t.random({N}, 3, 0.3, 1);
      const Rope rope = rope_tables(t.rank, 12, N, 100);
      const Tensor positions = t.ints({T}, cycle(T, 5, 12));
      const std::string name =
          text("qk_norm_rope %ld tokens, heads %d %d of %d, norms %d", long(T), H, K, N, normed);
      std::vector<Tensor> in = {qkv, rope.cos, rope.sin, positions};
      if (normed) in.insert(in.end(), {q, k});
      gradcheck(name, in,
          [&](Rank& r, TensorList v) {
            return qk_norm_rope(r, v[0], heads, normed ? v[4] : Tensor{}, normed ? v[5] : Tensor{},
                eps, {v[1], v[2]}, v[3]);
          },
          {.wide = 0b110, .max_elements = T > 100 ? 6 : 40, .constants = 0b110});
      const Tensor y = qk_norm_rope(
          t.rank, qkv, heads, normed ? q : Tensor{}, normed ? k : Tensor{}, eps, rope, positions);
      std::vector<double> want;
      for (int64_t s = 0; s < T; s++)
        for (int h = 0; h < H + 2 * K; h++) {
          const double* x = qkv.as<double>() + (s * (H + 2 * K) + h) * N;
          const int64_t row = positions.i32()[s] * N / 2;
          const double* w = (h < H ? q : k).as<double>();
          std::vector<double> head(x, x + N);
          if (h < H + K)
            head = turned(x, normed ? w : nullptr, rope.cos.as<double>() + row,
                rope.sin.as<double>() + row, N, eps);
          want.insert(want.end(), head.begin(), head.end());
        }
      EXPECT_LE(relative_error(values_of(y), want), 1e-14) << name;
    }
}

// Weight gradients of `uses` micro-batches of a layer: all nodes of a weight in one call, or one by
// one.
std::vector<std::vector<double>> deferred(int uses, bool together) {
  TestRank t;
  Rank& r = t.rank;
  std::vector<Tensor> weights, grads;
  for (const Dims& dims : {Dims{9, 8}, {8}, {12, 8}, {12}, {4}, {4}, {3, 12}, {2, 8, 12}}) {
    weights.push_back(t.random(dims, 30 + weights.size()));
    grads.push_back(t.floats(dims, {}));
    weights.back().grad = grads.back().data;
  }
  const Rope rope{t.random({6, 2}), t.random({6, 2})};
  for (int use = 0; use < uses; use++) {
    const int64_t T = 5 - use;
    const Tensor ids = t.ints({T}, cycle(T, 2 + use, 6));
    Tensor x = embedding(r, ids, weights[0]);
    x = add_rms_norm(r, x, t.random({T, 8}, use), weights[1], 0.1).normed;
    x = linear(r, x, weights[2], weights[3]);
    x = qk_norm_rope(r, x, {1, 1, 4}, weights[4], weights[5], 0.1, rope, ids);
    const Tensor probs = router(r, x, weights[6], {}).probs;
    x = grouped_linear(r, x, weights[7], t.ints({3}, {0, 2, static_cast<int32_t>(T)}));
    add_grad(r, probs, t.random(probs.dim, 40 + use));
    add_grad(r, x, t.random(x.dim, 50 + use));
  }
  backward(r, 0, t.tape.size(), true);
  const int each = t.tape.size() / uses;
  for (int i = 0; i < each; i++) {
    std::vector<Node*> nodes;
    for (int use = 0; use < uses; use++) nodes.push_back(&t.tape.nodes[use * each + i]);
    const int step = together ? uses : 1;
    for (int use = 0; use < uses; use += step) nodes[0]->bw(r, &nodes[use], step);
  }
  std::vector<std::vector<double>> all;
  for (const Tensor& g : grads) all.push_back(values_of(g));
  return all;
}

TEST(Layers, SeveralMicroBatchesOfAWeightInOneCall) {
  const auto one_by_one = deferred(3, false);
  EXPECT_EQ(deferred(3, true), one_by_one);
  EXPECT_EQ(deferred(1, true), deferred(1, false));
  for (size_t i = 0; i < one_by_one.size(); i++)
    EXPECT_GT(relative_error(deferred(2, true)[i], one_by_one[i]), 1e-3) << "weight " << i;
}

#ifdef __SANITIZE_THREAD__  // built without OpenMP: one thread
void set_threads(int) {}
#else
extern "C" void omp_set_num_threads(int);
extern "C" int omp_get_num_procs();
void set_threads(int n) { omp_set_num_threads(n ? n : omp_get_num_procs()); }
#endif

// Values and gradients of a layer with its loss, F32, on `threads` threads.
std::vector<std::vector<double>> layer_and_loss(int threads) {
  set_threads(threads);
  TestRank t;
  Rank& r = t.rank;
  const int64_t T = 700, D = 100, V = 450, E = 3;
  const DType f32 = DType::F32;
  std::vector<Tensor> grads;
  const auto weight = [&](Dims dims) {
    Tensor w = t.random(dims, 20 + grads.size(), 0.1, 0, f32);
    grads.push_back(t.floats(dims, {}, f32));
    w.grad = grads.back().data;
    return w;
  };
  std::vector<int32_t> row_of, pair_of, row_begin{0}, offsets{0};
  for (int e = 0; e < E; e++) {
    for (int i = 0; i < T; i++)
      if ((i + e) % 3 < 2 - e % 2) row_of.push_back(i);
    offsets.push_back(static_cast<int32_t>(row_of.size()));
  }
  for (int i = 0; i < T; i++) {
    for (size_t p = 0; p < row_of.size(); p++)
      if (row_of[p] == i) pair_of.push_back(static_cast<int32_t>(p));
    row_begin.push_back(static_cast<int32_t>(pair_of.size()));
  }
  const auto P = static_cast<int64_t>(row_of.size());
  Tensor x = embedding(r, t.ints({T}, cycle(T, 7, V)), weight({V, D}));
  const AddRmsNorm both = add_rms_norm(r, x, t.random({T, D}, 3, 1, 0, f32), weight({D}), 1e-3);
  x = linear(r, both.normed, weight({D, D}), weight({D}));
  x = qk_norm_rope(r, x, {3, 1, 20}, weight({20}), weight({20}), 1e-3, rope_tables(r, T, 20, 100),
      t.ints({T}, cycle(T, 1, T)));
  const Routing chosen = router(r, x, weight({E, D}), {.top_k = 2, .normalize = true});
  add_grad(r, chosen.weights, t.random({T, 2}, 4, 1, 0, f32));
  const Dispatched d{x, t.random({P}, 5, 1, 0, f32), t.ints({P}, row_of), t.ints({E + 1}, offsets),
      t.ints({P}, pair_of), t.ints({T + 1}, row_begin)};
  x = grouped_linear(r, index_select(r, x, d.row_of), weight({E, 2 * D, D}), d.offsets);
  x = scatter_add(r, swiglu(r, x, d.weights), d.row_of, T);
  const Tensor loss = lm_head_cross_entropy(
      r, rms_norm(r, x, weight({D}), 1e-3), weight({V, D}), t.ints({T}, cycle(T, 11, V)), 0.1);
  add_grad(r, loss, loss);
  backward(r, 0, t.tape.size(), true);
  weight_grads(r, {{&t.tape, 0, t.tape.size()}});
  std::vector<std::vector<double>> all = {values_of(loss), values_of(chosen.weights), values_of(x)};
  for (const Tensor& g : grads) {
    all.push_back(values_of(g));
    all.push_back({sum_squares(r, g)});
    EXPECT_GT(all.back()[0], 0) << "weight " << all.size();
  }
  return all;
}

TEST(Layers, SameBitsForAnyNumberOfThreads) {
  const auto one = layer_and_loss(1);
  EXPECT_EQ(layer_and_loss(2), one);
  EXPECT_EQ(layer_and_loss(5), one);
  set_threads(0);
}

// Deferred, their gradients must not wait: the op that made them comes next.
TEST(Layers, WeightsMadeByAnotherOp) {
  TestRank t;
  const Tensor x = t.random({3, 4}), a = t.random({4, 5}, 2), b = t.random({4, 5}, 3);
  const Tensor v = t.random({5}, 4), ids = t.ints({3}, {2, 0, 2});
  gradcheck("linear", {x, a, b},
      [](Rank& r, TensorList in) { return linear(r, in[0], linear(r, in[1], in[2])); });
  gradcheck("embedding", {ids, a, b},
      [](Rank& r, TensorList in) { return embedding(r, in[0], linear(r, in[1], in[2])); });
  gradcheck("add_rms_norm and rms_norm", {x, v, b}, [](Rank& r, TensorList in) {
    const Tensor w = linear(r, in[1], in[2]);
    const Tensor normed = add_rms_norm(r, in[0], in[0], w, 0.1).normed;
    return rms_norm(r, normed, w, 0.1);
  });
  gradcheck("router", {x, a, b}, [](Rank& r, TensorList in) {
    return router(r, in[0], linear(r, in[1], in[2]), {.top_k = 2}).weights;
  });
  gradcheck("qk_norm_rope", {t.random({3, 12}), v, b, t.random({4, 2}), ids},
      [](Rank& r, TensorList in) {
        const Tensor w = linear(r, in[1], in[2]);
        return qk_norm_rope(r, in[0], {1, 1, 4}, w, w, 0.1, {in[3], in[3]}, in[4]);
      },
      {.wide = 0b1000, .constants = 0b1000});
}

TEST(Layers, ErrorsNameTheCallersLine) {
  TestRank t;
  Rank& r = t.rank;
  const Tensor x = t.random({2, 3}), w = t.random({4, 3}), w5 = t.random({4, 5});
  const Tensor f32 = t.random({4, 3}, 1, 1, 0, DType::F32), v3 = t.random({3});
  const int line = __LINE__ + 1;
  const auto wrong = [&] { linear(r, x, w5); };
  expect_error(wrong, {text("layers_test.cpp:%d: linear: need x [..., in] and w", line).c_str(),
                          "[2,3] f64 cpu, made at", "[4,5] f64", "rank 0"});
  expect_error([&] { linear(r, x, w5, {}, {"model.cpp", 10}); }, {"model.cpp:10: linear"});
  expect_error([&] { linear(r, x, w, v3); }, {"linear: need bias [out]"});
  expect_error([&] { linear(r, x, f32); }, {"linear: need one dtype"});
  expect_error([&] { linear(r, {}, w); }, {"linear: need x", "undefined tensor"});
  expect_error(
      [&] {
        linear(r, t.ints({2, 3}, {1, 2, 3, 4, 5, 6}), t.ints({1, 3}, {1, 2, 3}));
      },
      {"linear: need dtype f32 or f64", "i32"});
  expect_error(
      [&] {
        embedding(r, t.ints({3}, {0, 3, 4}), w);
      },
      {"layers_test.cpp:", "embedding: need ids in [0,4), not 4 at element 2"});
  expect_error([&] { embedding(r, t.ints({1}, {-1}), w); }, {"not -1 at element 0"});
  expect_error([&] { embedding(r, x, w); }, {"embedding: need ids I32"});
  expect_error([&] { rms_norm(r, x, t.random({4}), 0); }, {"rms_norm: need x [..., D] and w"});
  expect_error(
      [&] {
        add_rms_norm(r, x, t.random({3, 3}), v3, 0);
      },
      {"add_rms_norm: need residual of x's shape", "[3,3]"});
  expect_error([&] { rope_tables(r, 4, 3, 10); }, {"rope_tables: need an even head size"});
  const Tensor qkv = t.random({2, 12});
  const Tensor table = t.random({5, 2}), n4 = t.random({4}), at01 = t.ints({2}, {0, 1});
  const auto call = [&](Heads heads, Tensor q, Tensor k, Tensor cos, Tensor positions) {
    qk_norm_rope(r, qkv, heads, q, k, 0, {cos, cos}, positions);
  };
  expect_error([&] { call({1, 2, 4}, n4, n4, table, at01); }, {"need qkv [T, (H+2K)*N]"});
  expect_error([&] { call({1, 1, 4}, n4, {}, table, at01); }, {"q_norm and k_norm [N], or both"});
  expect_error([&] { call({1, 1, 4}, {}, n4, table, at01); }, {"q_norm and k_norm [N], or both"});
  expect_error([&] { call({1, 1, 4}, n4, n4, t.random({5, 4}), at01); }, {"need tables"});
  expect_error(
      [&] {
        call({1, 1, 4}, n4, n4, table, t.ints({2}, {0, 5}));
      },
      {"layers_test.cpp:", "positions in [0,5), not 5 at element 1"});
}

}  // namespace
}  // namespace pith
