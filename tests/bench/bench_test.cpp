// `pith bench` without a GPU: what it refuses, what it counts, and that each op it measures runs
// and has the parts it is said to have.
#include <gtest/gtest.h>

#include "bench/bench.h"
#include "comm/launch.h"
#include "helpers.h"

namespace pith {
namespace {

int bench(vector<string> words) {
  words.insert(words.begin(), "bench");
  vector<char*> argv;
  for (string& word : words) argv.push_back(word.data());
  return run_bench(int(argv.size()), argv.data());
}
string refusal(const vector<string>& words) {
  return error_of([&] { bench(words); });
}

const string kQ1 = SOURCE_DIR "/bench/configs/q1.toml";

// Two layers, small enough to count by hand.
RunPlan small_plan(const string& folder, vector<string> more = {}) {
  put(folder + "/config.json", R"({"model_type": "qwen3_moe", "hidden_size": 16,
    "moe_intermediate_size": 8, "vocab_size": 40, "num_hidden_layers": 2, "num_experts": 4,
    "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "norm_topk_prob": true})");
  put(folder + "/run.toml", R"(
    [model]
    config = "config.json"
    [data]
    path = "random.bin"
    sequence_length = 8
    [train]
    steps = 5
    global_batch_size = 6
    micro_batch_size = 3
    [optimizer]
    lr = 1e-3
    [router]
    force = "balanced")");
  return plan_run(load_run_config(folder + "/run.toml", more), Device::CPU, 1);
}

void on_a_rank(auto&& f) { run_ranks(make_mesh(1, 1, 1, 1), Device::CPU, {}, f); }

}

TEST(Bench, RefusesWhatItDoesNotKnow) {
  expect_error(refusal({"speed"}), {"pith bench", "unknown part (got \"speed\")"});
  expect_error(refusal({"ops", "no-such-op"}), {"no op has this in its name", "swiglu"});
  expect_error(refusal({"ops", "--micro-batch", "0"}), {"pith bench ops"});
  expect_error(refusal({"floor", "/no/such.toml"}), {"/no/such.toml"});
  expect_error(refusal({"floor", kQ1, "--micro-batch", "3"}), {"train.global_batch_size"});
  expect_error(refusal({"train", kQ1, "--micro-batch", "1,x"}), {"--micro-batch", "got \"x\""});
  expect_error(refusal({"train", kQ1, "--weight-grad-batch", "0"}), {"--weight-grad-batch"});
  expect_error(refusal({"train", kQ1, "--steps", "4"}), {"pith bench train"});
  expect_error(refusal({"train", kQ1, "--set", "train.sped=1"}), {"unknown key"});
  EXPECT_EQ(bench({}), kExitBadInput);
  EXPECT_EQ(bench({"--help"}), kExitDone);
  if (kCuda) return;  // there may be a GPU
  for (const vector<string>& words :
      {vector<string>{"ops"}, {"ops", "swiglu"}, {"floor", kQ1}, {"train", kQ1, "--layers", "6"}})
    expect_error(refusal(words), {"pith bench", "this build has no CUDA"});
}

TEST(Bench, CountsASmallModelByHand) {
  const RunPlan plan = small_plan(fresh_folder("bench_counts"));
  const Sizes s = sizes_of(plan);
  EXPECT_EQ(s.parameters(), plan.parameters);
  EXPECT_EQ(s.tokens(), 24);
  EXPECT_EQ(s.pairs(), 48);
  EXPECT_EQ(s.element, 4);
  vector<double> flops;
  double step = 0;
  for (const Product& p : products(s)) {
    flops.push_back(p.flops());
    step += 3 * p.flops() * times_a_step(p.each, 2, plan.schedule.micro_batches);
  }
  EXPECT_EQ(flops, (vector<double>{
                       2. * 24 * 16 * 64,  // 4 + 2 * 2 heads of 8
                       2. * 24 * 32 * 16,
                       2. * 24 * 16 * 4,
                       2. * 48 * 16 * 16,
                       2. * 48 * 8 * 16,
                       2. * 24 * 16 * 40,
                   }));
  // Half of 8 * 8 scores in each of 3 rows and 4 heads, of 8 numbers, in two products.
  EXPECT_EQ(attention_flops(s, false), 2. * 2 * 32 * 3 * 4 * 8);
  EXPECT_EQ(attention_flops(s, true), 2.5 * attention_flops(s, false));
  // What MFU counts: attention as three times its forward.
  step += 3 * attention_flops(s, false) * times_a_step(Each::Layer, 2, plan.schedule.micro_batches);
  EXPECT_DOUBLE_EQ(step, plan.flops_per_token * double(plan.step_tokens()));

  const vector<Pass> all = passes(s);
  const double x = 24 * 16 * 4;  // bytes of the hidden states
  EXPECT_EQ(pass_of(all, "rms_norm").forward, 2 * x + 4 * 24);
  EXPECT_EQ(pass_of(all, "rms_norm").backward, 3 * x + 4 * 24);
  EXPECT_EQ(pass_of(all, "expand").forward, x + 2 * x + 4 * 48);
  EXPECT_EQ(pass_of(all, "reduce").backward, 2 * x + x + 4 * 48);
  EXPECT_EQ(pass_of(all, "swiglu").forward, 48 * 24 * 4 + 4 * 48);
  EXPECT_EQ(pass_of(all, "cross entropy").forward, 2 * 24 * 40 * 4 + 4 * 24);
  EXPECT_EQ(pass_of(all, "AdamW").forward, 28. * double(plan.parameters));
  EXPECT_EQ(pass_of(all, "cast weights").forward, 0);  // masters are used as they are
  EXPECT_EQ(times_a_step(Each::Layer, 2, 5), 10);
  EXPECT_EQ(times_a_step(Each::MicroBatch, 2, 5), 5);
  EXPECT_EQ(times_a_step(Each::Step, 2, 5), 1);
}

TEST(Bench, EachOpHasThePartsItIsSaidToHave) {
  if (kCuda) GTEST_SKIP() << "some of its ops run on a GPU alone";
  Sizes s = q1(1);
  s.length = 8;
  s.element = 4;
  s.model.hidden = 16;
  s.model.expert_width = 8;
  s.model.vocab = 40;
  on_a_rank([&](Rank& rank) {
    for (const OpCase& c : op_cases(s)) {
      Inputs in{rank};
      c.make(in, s);
      const Phases t = time_op(in, c.call);
      const auto said = [](const Cost& cost) { return cost.flops + cost.bytes > 0; };
      EXPECT_TRUE(said(c.forward) && t.forward > 0) << c.name;
      EXPECT_EQ(said(c.backward), t.backward > 0) << c.name;
      EXPECT_EQ(said(c.weights), t.weights > 0) << c.name;
    }
  });
}

TEST(Bench, FloorHoldsEveryProductOfAStep) {
  for (const char* batch : {"1", "2"}) {
    const RunPlan plan =
        small_plan(fresh_folder("bench_floor"), {string("parallel.weight_grad_batch=") + batch});
    on_a_rank([&](Rank& rank) {
      double flops = 0, bytes = 0;
      for (const FloorLine& l : floor_lines(rank, plan, 1e9)) {
        EXPECT_GT(l.seconds, 0) << l.item;
        EXPECT_GT(l.count, 0) << l.item;
        if (l.bytes) {
          EXPECT_DOUBLE_EQ(l.seconds, l.amount / 1e9) << l.item;
        }
        // MFU counts two of the five products of attention's backward twice, instead of all.
        double share = l.item == "attention, backward" ? 2 / 2.5 : 1;
        (l.bytes ? bytes : flops) += l.count * l.amount * share;
      }
      EXPECT_NEAR(flops / (plan.flops_per_token * double(plan.step_tokens())), 1, 1e-12);
      EXPECT_GT(bytes, 28. * double(plan.parameters));
    });
  }
}

TEST(Bench, TrainsOnRandomTokens) {
  const string folder = fresh_folder("bench_train");
  const RunPlan plan = small_plan(folder, {"data.path=" + folder + "/random.bin"});
  write_random_tokens(plan);
  const Json row = Json::parse(train_row(plan, 0), "row");
  EXPECT_GT(row["tokens_per_second"].as_double(), 0);
  EXPECT_GT(row["peak_bytes"].as_double(), 16. * double(plan.parameters));
  EXPECT_GE(row["slowest_step_s"].as_double(), row["step_s"].as_double());
  EXPECT_NEAR(row["mfu"].as_double(),
      plan.flops_per_token * row["tokens_per_second"].as_double() / 989e12, 1e-15);
}

}
