// Qwen3-MoE against Hugging Face transformers: logits, loss, gradients, routing, packed documents,
// and training with each balance loss. tests/oracle/README.md describes the goldens.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "comm/launch.h"
#include "data/array_files.h"
#include "engine/checkpoint.h"
#include "engine/instance.h"
#include "engine/routing_trace.h"
#include "layouts/layouts.h"
#include "ops/gradcheck.h"

namespace pith {
namespace {

std::string golden(const std::string& name) {
  return std::string(SOURCE_DIR "/tests/golden/qwen3_moe/") + name;
}

// A golden file's tensors as numbers.
struct Golden {
  Safetensors file;
  explicit Golden(const std::string& path) : file(open_safetensors(path)) {}
  std::vector<double> floats(const std::string& name) const {
    const TensorEntry& t = file.tensors.at(name);
    std::vector<double> out(t.numel());
    if (t.dtype == FileDType::F64) {
      std::memcpy(out.data(), t.data, out.size() * 8);
    } else {
      std::vector<float> narrow(out.size());
      to_f32(t.dtype, t.data, narrow.data(), t.numel());
      std::copy(narrow.begin(), narrow.end(), out.begin());
    }
    return out;
  }
  std::vector<int32_t> ints(const std::string& name) const {
    const TensorEntry& t = file.tensors.at(name);
    std::vector<int32_t> out(t.numel());
    std::memcpy(out.data(), t.data, out.size() * 4);
    return out;
  }
};

double error_of(const float* got, const std::vector<double>& want) {
  double diff = 0, norm = 0;
  for (size_t i = 0; i < want.size(); i++) {
    diff += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(norm > 0 ? diff / norm : diff);
}

// Relative error of every checkpoint tensor's slice of `value(unit)`.
template <class Value>
void expect_tensors(Rank& rank, const Parameters& p, const Golden& want, const std::string& prefix,
    double limit, Value value) {
  int compared = 0;
  for (const Fragment& f : fragments(p)) {
    ASSERT_EQ(f.count, f.piece->dims.numel());
    vector<char> bytes;
    const float* got = on_host(rank, value(p.units[f.unit]), bytes).f32() + f.offset;
    EXPECT_LE(error_of(got, want.floats(prefix + f.piece->name)), limit) << prefix << f.piece->name;
    compared++;
  }
  EXPECT_GT(compared, 20);
}

// `rows` rows of tokens, labels and, if not empty, document ends, as one micro-batch.
Batch make_batch(Rank& rank, int64_t rows, int64_t length, const int32_t* tokens,
    const int32_t* labels, const int32_t* ends) {
  const int64_t T = rows * length;
  Batch b{.rows = rows, .length = length};
  b.tokens = tensor_from(rank, {T}, DType::I32, tokens);
  b.labels = tensor_from(rank, {T}, DType::I32, labels);
  std::vector<int32_t> positions(T);
  for (int64_t r = 0; r < rows; r++) {
    if (ends) positions_from_ends(ends + r * length, length, positions.data() + r * length);
    for (int64_t i = 0; !ends && i < length; i++) positions[r * length + i] = int32_t(i);
  }
  b.positions = tensor_from(rank, {T}, DType::I32, positions.data());
  if (ends) b.mask.doc_ends = tensor_from(rank, {rows, length}, DType::I32, ends);
  return b;
}

// On the CPU and, where there is one, in F32 on a GPU.
template <class F>
void on_one_rank(F f) {
  run_ranks(Mesh{}, Device::CPU, {}, f);
  if (no_gpu().empty()) run_ranks(Mesh{}, Device::CUDA, {}, f);
}
double limit_on(const Rank& rank, double on_cpu) {
  return rank.device == Device::CPU ? on_cpu : 1e-4;
}

// A model folder's weights on one rank, gathered for steps of one micro-batch list.
struct Loaded {
  Json config;
  Instance model;
  ScheduleOptions schedule{.kind = ScheduleKind::OneF1B, .gather_step = true};
  Loaded(Rank& rank, const std::string& folder, int64_t length, int micro_batches = 1)
      : config(Json::parse_file(folder + "/config.json")) {
    schedule.micro_batches = micro_batches;
    model = make_instance(rank, config, {.length = length});
    const Checkpoint weights = open_weights(folder);
    check_weights(weights, whole_table(config));
    load_state(rank, *model.parameters, weights, false);
  }
  void run(Rank& rank, StepIo& io) {
    zero_grads(rank, *model.parameters);
    run_actions(rank, model, io, schedule, make_schedule(schedule, 0));
  }
};

int64_t count_labels(const std::vector<int32_t>& labels) {
  return std::count_if(labels.begin(), labels.end(), [](int32_t l) { return l != kIgnoreLabel; });
}

void check_model(const std::string& name, bool documents) {
  on_one_rank([&](Rank& rank) {
    const Golden want(golden(name + "/golden.safetensors"));
    const std::string prefix = documents ? "documents." : "";
    const auto& shape = want.file.tensors.at("tokens").shape;
    const std::vector<int32_t> tokens = want.ints("tokens"), labels = want.ints("labels"),
                               ends = want.ints("doc_ends");
    Loaded m(rank, golden(name), shape[1]);
    StepIo io;
    io.batches = {make_batch(
        rank, shape[0], shape[1], tokens.data(), labels.data(), documents ? ends.data() : nullptr)};
    io.loss_scale = 1.0 / double(count_labels(labels));
    io.logits.resize(1);
    RoutingStep routing;
    begin_trace(routing, m.model.shape.num_layers, int64_t(tokens.size()), m.model.shape.top_k);
    RoutingSlot slot{&routing, {{}}};
    for (size_t i = 0; i < tokens.size(); i++) slot.tokens[0].push_back(int64_t(i));
    io.routing = &slot;
    m.run(rank, io);
    vector<char> bytes;
    EXPECT_LE(
        error_of(on_host(rank, io.logits[0], bytes).f32(), want.floats(prefix + "logits")), 1e-4);
    EXPECT_NEAR(io.loss[0] * io.loss_scale / want.floats(prefix + "loss")[0], 1, 1e-4);
    if (!documents)
      for (int l = 0; l < m.model.shape.num_layers; l++) {
        const auto ids = want.ints("router_ids." + std::to_string(l));
        const size_t first = size_t(l) * ids.size();
        EXPECT_TRUE(std::equal(ids.begin(), ids.end(), routing.ids.begin() + first));
        EXPECT_LE(error_of(routing.weights.data() + first,
                      want.floats("router_weights." + std::to_string(l))),
            1e-4);
      }
    expect_tensors(rank, *m.model.parameters, want, prefix + "grad.", 1e-4,
        [](const FlatUnit& u) { return u.grad_shard; });
  });
}

TEST(Golden, NormalisedWeights) { check_model("normed", false); }
TEST(Golden, RawWeights) { check_model("raw", false); }
TEST(Golden, PackedDocuments) { check_model("normed", true); }

// ---- Training ---------------------------------------------------------------------------------

constexpr int64_t kRows = 8, kLength = 32, kMicro = 2;
const LrSchedule kShort{.kind = "wsd", .warmup_ratio = 0.25, .decay_ratio = 0.5, .final_lr = 1e-4};

void check_training(const std::string& name, BalanceKind kind) {
  on_one_rank([&](Rank& rank) {
    const Golden want(golden("train/" + name + ".safetensors"));
    const std::vector<int32_t> tokens = want.ints("tokens"), labels = want.ints("labels");
    Loaded m(rank, golden("train/init"), kLength, kRows / kMicro);
    BalanceState balance{.kind = kind,
        .coefficient = kind == BalanceKind::None ? 0 : 0.3,
        .num_experts = m.model.shape.num_experts,
        .num_layers = m.model.shape.num_layers};
    for (int64_t step = 0; step < 8; step++) {
      const int64_t first = step * kRows * kLength;
      StepIo io;
      for (int64_t row = 0; row < kRows; row += kMicro)
        io.batches.push_back(make_batch(rank, kMicro, kLength,
            tokens.data() + first + row * kLength, labels.data() + first + row * kLength, nullptr));
      const double n =
          double(count_labels({labels.begin() + first, labels.begin() + first + kRows * kLength}));
      io.loss_scale = 1 / n;
      io.balance = &balance;
      begin_step(rank, balance, kRows * kLength);
      m.run(rank, io);
      end_step(rank, balance);
      double loss = 0, balance_loss = 0;
      for (const double l : io.loss) loss += l / n;
      for (const double l : balance.loss) balance_loss += l / double(balance.loss.size());
      EXPECT_NEAR(loss / want.floats("loss")[step], 1, limit_on(rank, 2e-6)) << "step " << step;
      if (kind != BalanceKind::None) {
        EXPECT_NEAR(balance_loss / want.floats("balance_loss")[step], 1, limit_on(rank, 1e-5))
            << "step " << step;
      }
      const auto counts = want.ints("counts");
      for (size_t i = 0; i < balance.counts.size(); i++)
        EXPECT_EQ(balance.counts[i], counts[step * balance.counts.size() + i]);
      Parameters& p = *m.model.parameters;
      const double norm = gradient_norm(rank, p);
      EXPECT_NEAR(norm / want.floats("grad_norm")[step], 1, limit_on(rank, 1e-5))
          << "step " << step;
      if (step == 0)
        expect_tensors(rank, p, want, "first_grad.", limit_on(rank, 2e-5),
            [](const FlatUnit& u) { return u.grad_shard; });
      const double lr = learning_rate(kShort, 1e-3, step, 8);
      EXPECT_NEAR(lr, want.floats("lr")[step], 1e-12);
      optimizer_pass(
          rank, p, {.lr = lr, .grad_scale = std::min(1.0, 1 / norm), .step = step + 1}, nullptr);
      balance.previous = balance.counts;
    }
    expect_tensors(rank, *m.model.parameters, want, "final.", limit_on(rank, 2e-5),
        [](const FlatUnit& u) { return u.master; });
  });
}

TEST(Golden, TrainingWithoutBalanceLoss) { check_training("none", BalanceKind::None); }
TEST(Golden, TrainingMicroBatch) { check_training("micro_batch", BalanceKind::MicroBatch); }
TEST(Golden, TrainingSequence) { check_training("sequence", BalanceKind::Sequence); }
TEST(Golden, TrainingGlobalBatch) { check_training("global_batch", BalanceKind::GlobalBatch); }
TEST(Golden, TrainingMaskedLabels) { check_training("masked", BalanceKind::None); }

// The same through the trainer: token file, configuration, schedule.
RunConfig golden_config() {
  RunConfig c;
  c.model.config = golden("train/init/config.json");
  c.model.init_from = golden("train/init");
  c.data.path = golden("train/corpus.bin");
  c.data.sequence_length = kLength;
  c.data.shuffle = false;
  c.train.global_batch_size = kRows;
  c.train.micro_batch_size = kMicro;
  c.optimizer.lr = 1e-3;
  return c;
}

TEST(Golden, TrainerGivesTheOraclesSteps) {
  const Golden want(golden("train/micro_batch.safetensors"));
  RunConfig c = golden_config();
  c.train.steps = 8;
  c.lr_schedule = kShort;
  c.router.balance_loss = "micro-batch";
  c.router.balance_coefficient = 0.3;
  Probe probe;
  run_probe(plan_run(c, Device::CPU, 1), probe);
  for (int step = 0; step < 8; step++) {
    EXPECT_NEAR(probe.loss[step] / want.floats("loss")[step], 1, 2e-6);
    EXPECT_NEAR(probe.norm[step] / want.floats("grad_norm")[step], 1, 1e-5);
    EXPECT_NEAR(probe.balance[step] / want.floats("balance_loss")[step], 1, 1e-5);
  }
  for (const auto& [name, values] : probe.weights)
    EXPECT_LE(error_of(values.data(), want.floats("final." + name)), 2e-5) << name;
}

TEST(Golden, LossCurveOf200Steps) {
  const Golden want(golden("train/curve.safetensors"));
  RunConfig c = golden_config();
  c.train.steps = 200;
  c.lr_schedule = {.kind = "wsd", .warmup_ratio = 0.1, .decay_ratio = 0.2};
  c.router.balance_loss = "micro-batch";
  c.router.balance_coefficient = 0.01;
  Probe probe;
  probe.steps = 200;
  run_probe(plan_run(c, Device::CPU, 1), probe);
  double window = 0;
  for (int step = 180; step < 200; step++) window += probe.loss[step] / 20;
  EXPECT_NEAR(window / want.floats("window_180_200")[0], 1, 1e-2);
}

}  // namespace
}  // namespace pith
