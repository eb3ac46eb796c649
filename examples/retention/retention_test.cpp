#include "retention.h"

#include "ops/gradcheck.h"

namespace pith {
namespace {

Retention::Config small_config() {
  return Retention::read_config(Json::parse(
      R"({"model_type": "retention", "hidden_size": 16, "moe_intermediate_size": 8,
            "num_attention_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
            "num_hidden_layers": 2, "vocab_size": 11})",
      "config.json"));
}

ParameterTable whole(Retention& model, const Retention::Config& c, double std) {
  return model.parameters(c, {0, c.num_layers, true, true, 0, 0}, std);
}

Tensor hidden_states(
    Rank& rank, const Retention& model, const Retention::Config& c, const Batch& batch) {
  Tensor x = model.embed(rank, batch);
  for (const Retention::Layer& w : model.layers)
    x = model.finish(rank, c, w, {}, model.attend(rank, c, w, x, batch, {}));
  return x;
}

// `rows` rows of random tokens; the label is the token before (none at the start).
Batch recall_batch(TestRank& t, int64_t rows, int64_t length, int64_t vocab, uint64_t key) {
  std::vector<int32_t> tokens, labels;
  for (int64_t i = 0; i < rows * length; i++) {
    tokens.push_back(static_cast<int32_t>(uniform_at(key, i) * double(vocab)));
    labels.push_back(i % length ? tokens[i - 1] : kIgnoreLabel);
  }
  Batch batch{rows, length};
  batch.tokens = t.ints({rows * length}, tokens);
  batch.labels = t.ints({rows * length}, labels);
  return batch;
}

// Every weight of the model, at most 8 at a time: the others are constants.
TEST(Retention, GradientsMatchFiniteDifferences) {
  const Retention::Config c = small_config();
  TestRank t;
  Retention model;
  ParameterTable table = whole(model, c, 0.3);
  std::vector<Tensor> weights;
  for (size_t i = 0; i < table.size(); i++) {
    const bool constant = table[i].pieces[0].init.kind == InitKind::Constant;
    weights.push_back(t.random(table[i].dims, i, constant ? 0.1 : 0.4, constant ? 1 : 0));
  }
  const std::vector<int32_t> ends = {4, 4, 4, 4, 6, 6, 6, 6, 6, 6, 6, 6};
  for (size_t first = 0; first < weights.size(); first += 7) {
    const size_t last = std::min(weights.size(), first + 7);
    const std::vector<Tensor> some(weights.begin() + first, weights.begin() + last);
    const auto f = [&](Rank& rank, TensorList xs) {
      TestRank inputs;
      Retention m;
      ParameterTable own = whole(m, c, 0.3);
      rank.compute = xs[0].dtype;
      m.prepare(rank, c, 6);
      std::vector<Tensor> kept;
      for (size_t i = 0; i < own.size(); i++) {
        const bool variable = i >= first && i < last;
        const Tensor& w = weights[i];
        const DType dtype = xs[0].dtype;
        *own[i].target =
            variable ? xs[i - first] : tensor_from(rank, w.dim, dtype, inputs.cast(w, dtype).data);
      }
      Batch batch = recall_batch(inputs, 2, 6, c.vocab, 5);
      for (Tensor* ids : {&batch.tokens, &batch.labels})
        *ids = tensor_from(rank, ids->dim, DType::I32, ids->data);
      batch.mask.doc_ends = tensor_from(rank, {2, 6}, DType::I32, ends.data());
      return m.loss(rank, c, hidden_states(rank, m, c, batch), batch, 1);
    };
    gradcheck("retention, weights from " + table[first].pieces[0].name, some, f,
        {.tolerance = 1e-5, .f32_tolerance = 1e-3, .max_elements = 25, .cotangent = 1});
  }
}

// A token before it only the mixer can see: without one the loss stays at log(vocab).
TEST(Retention, LearnsToRecallTheTokenBefore) {
  const Retention::Config c = small_config();
  TestRank t;
  Rank& rank = t.rank;
  Retention model;
  ParameterTable table = whole(model, c, 0.2);
  const int64_t rows = 8, length = 16;
  struct State {
    Tensor grad, m, v;
  };
  std::vector<State> states;
  for (size_t i = 0; i < table.size(); i++) {
    Tensor& w = *table[i].target;
    const Init init = table[i].pieces[0].init;
    w = empty(rank, table[i].dims, DType::F32);
    if (init.kind == InitKind::Normal)
      fill_normal(rank, w, i + 1, 0, init.value);
    else
      fill_constant(rank, w, init.value);
    states.push_back({zeros(rank, w.dim, DType::F32), zeros(rank, w.dim, DType::F32),
        zeros(rank, w.dim, DType::F32)});
    w.grad = states.back().grad.data;
  }
  model.prepare(rank, c, length);
  const double labels = double(rows * (length - 1)), uniform = std::log(double(c.vocab));
  double first = 0, last = 0;
  const int steps = 400;
  for (int step = 1; step <= steps; step++) {
    t.tape.clear();
    for (State& s : states) fill_constant(rank, s.grad, 0);
    const Batch batch = recall_batch(t, rows, length, c.vocab, step);
    Tensor loss = model.loss(rank, c, hidden_states(rank, model, c, batch), batch, 1 / labels);
    const double mean = loss.f32()[0] / labels;
    if (step == 1) first = mean;
    if (step > steps - 10) last += mean / 10;
    add_grad(rank, loss, loss);
    backward(rank, 0, t.tape.size());
    AdamW adam;
    adam.lr = 1e-2;
    adam.weight_decay = 0;
    adam.step = step;
    for (size_t i = 0; i < table.size(); i++)
      adamw_step(rank, *table[i].target, states[i].grad, states[i].m, states[i].v, adam);
  }
  RecordProperty("loss", std::to_string(last));
  EXPECT_GT(first, 0.8 * uniform);
  EXPECT_LT(last, 0.2 * uniform);
}

TEST(Retention, DocumentsDoNotLeak) {
  const Retention::Config c = small_config();
  TestRank t;
  t.rank.tape = nullptr;
  Retention model;
  ParameterTable table = whole(model, c, 0.3);
  for (size_t i = 0; i < table.size(); i++) *table[i].target = t.random(table[i].dims, i + 1, 0.4);
  t.rank.compute = DType::F64;
  model.prepare(t.rank, c, 8);
  Batch batch = recall_batch(t, 1, 6, c.vocab, 3);
  batch.mask.doc_ends = t.ints({1, 6}, {3, 3, 3, 6, 6, 6});
  const auto logits = [&] {
    return values_of(model.logits(t.rank, c, hidden_states(t.rank, model, c, batch)));
  };
  const std::vector<double> before = logits();
  batch.tokens.i32()[1] = (batch.tokens.i32()[1] + 1) % static_cast<int32_t>(c.vocab);
  const std::vector<double> after = logits();
  const int64_t half = 3 * c.vocab;
  EXPECT_TRUE(std::equal(before.begin(), before.begin() + c.vocab, after.begin()));
  EXPECT_NE(before[half - 1], after[half - 1]);
  EXPECT_TRUE(std::equal(before.begin() + half, before.end(), after.begin() + half));
}

TEST(Retention, RefusesAConfigurationItDoesNotImplement) {
  expect_error([] { Retention::read_config(Json::parse(R"({"rope_theta": 1})", "config.json")); },
      {"config.json: rope_theta: unknown field"});
  TestRank t;
  Retention model;
  const Retention::Config c = small_config();
  model.prepare(t.rank, c, 4);
  Batch batch{1, 5};
  expect_error(
      [&] {
        model.retain(t.rank, c, {}, t.random({5, 16}), batch);
      },
      {"retention.cpp", "a row no longer than prepared", "[5,16]"});
}

}  // namespace
}  // namespace pith
