#include "observe/metrics.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <filesystem>
#include <fstream>

#include "core/json.h"

namespace pith {

namespace fs = std::filesystem;

static std::string fresh_file(const char* name) {
  const std::string folder = testing::TempDir() + "pith_" + name + "_" + std::to_string(getpid());
  fs::remove_all(folder);
  fs::create_directories(folder);
  return folder + "/metrics.jsonl";
}

static StepMetrics sample(int64_t step) {
  StepMetrics m;
  m.step = step;
  m.steps = 100;
  m.loss = 4.12345 + static_cast<double>(step);
  m.learning_rate = 1e-3 / 3;
  m.gradient_norm = 0.5;
  m.tokens = 8192;
  m.seconds = 0.25;
  return m;
}

static StepMetrics full_sample(int64_t step) {
  StepMetrics m = sample(step);
  m.balance_loss = {1.5, 1.25};
  m.clipped = m.skipped = true;
  m.router_forced = "balanced";
  m.mfu = 0.412;
  m.peak_memory_bytes = 1.25 * (1 << 30);
  m.checkpoint_stall_s = 0.125;
  m.left_s = 200;
  m.eval_loss = 4.5;
  m.load = {{1.5, 2}, {0.125, 0}, {0.75, 0.5}};
  return m;
}

TEST(ExpertLoad, HandCounted) {
  const double ln2 = std::log(2.0), ln4 = std::log(4.0);
  struct {
    std::vector<double> counts;
    int experts;
    ExpertLoad want;
  } cases[] = {
      {{5, 5, 5, 5}, 4, {{1}, {0}, {1}}},            // balance
      {{0, 8, 0, 0}, 4, {{4}, {0.75}, {0}}},         // one expert
      {{4, 0, 4, 0}, 4, {{2}, {0.5}, {ln2 / ln4}}},  // two of four
      {{7}, 1, {{1}, {0}, {1}}},                     // one there is
      {{0, 0}, 2, {{0}, {0}, {0}}},                  // no tokens
      {{1, 1, 3, 1, 0, 2}, 2,
          {{1, 1.5, 2}, {0, 0, 0.5},
              {1, -(0.75 * std::log(0.75) + 0.25 * std::log(0.25)) / ln2, 0}}},
      {{}, 3, {}},
  };
  for (const auto& c : cases) {
    const ExpertLoad got = expert_load(c.counts, c.experts);
    EXPECT_EQ(got.max_over_mean, c.want.max_over_mean);
    EXPECT_EQ(got.dead_share, c.want.dead_share);
    ASSERT_EQ(got.entropy.size(), c.want.entropy.size());
    for (size_t l = 0; l < got.entropy.size(); l++)
      EXPECT_NEAR(got.entropy[l], c.want.entropy[l], 1e-15);
  }
}

TEST(Metrics, StepLine) {
  StepMetrics infinite = sample(3);
  infinite.loss = INFINITY;
  infinite.gradient_norm = NAN;
  infinite.seconds = 0;
  struct {
    StepMetrics metrics;
    const char* line;
  } cases[] = {
      {sample(1),
          "step 00000001/00000100 | step-time 0.250 sec | cross-entropy-loss 5.1235 | "
          "learning-rate 3.333333e-04 | gradient-norm 0.5000 | tokens-per-second 32,768"},
      {full_sample(2),
          "step 00000002/00000100 | step-time 0.250 sec | cross-entropy-loss 6.1235 | "
          "load-balance-loss 1.375000 | learning-rate 3.333333e-04 | gradient-norm 0.5000 | "
          "tokens-per-second 32,768 | peak-memory 1.25 GiB | mfu 41.2% | eval-loss 4.5000 | "
          "checkpoint-stall 0.125 sec | left 3 min 20 s | UPDATE SKIPPED: not finite | "
          "ROUTER FORCED: balanced"},
      {infinite,
          "step 00000003/00000100 | step-time 0.000 sec | cross-entropy-loss inf | "
          "learning-rate 3.333333e-04 | gradient-norm nan | tokens-per-second 0"},
  };
  for (const auto& c : cases) EXPECT_EQ(step_line(c.metrics), c.line);
}

TEST(Metrics, JsonFields) {
  EXPECT_EQ(step_json(full_sample(2)),
      R"({"step": 2, "steps": 100, "cross_entropy_loss": 6.12345, )"
      R"("learning_rate": 0.0003333333333333333, "gradient_norm": 0.5, )"
      R"("step_time": 0.25, "peak_memory": 1342177280.0, "checkpoint_stall": 0.125, )"
      R"("clipped": true, "skipped": true, "tokens": 8192, )"
      R"("tokens_per_second": 32768.0, "mfu": 0.412, "eval_loss": 4.5, )"
      R"("router_forced": "balanced", )"
      R"("load_balance_loss": 1.375, "load_balance_loss_per_layer": [1.5, 1.25], )"
      R"("expert_load_max": [1.5, 2.0], )"
      R"("expert_load_dead": [0.125, 0.0], "expert_load_entropy": [0.75, 0.5]})");
  const Json plain = Json::parse(step_json(sample(1)), "line");
  for (const char* key :
      {"load_balance_loss", "mfu", "eval_loss", "router_forced", "expert_load_max"})
    EXPECT_FALSE(plain.has(key)) << key;
}

TEST(MetricsFile, ReadsBackWhatWasWritten) {
  const std::string path = fresh_file("metrics");
  StepMetrics bad = sample(2);
  bad.loss = NAN;
  bad.eval_loss = INFINITY;
  {
    begin_metrics(path, 0);
    for (const StepMetrics& m : {full_sample(1), bad, sample(3)})
      append_step(path, path + ".events", m, 0);
  }
  const std::vector<Json> got = read_metrics(path);
  ASSERT_EQ(got.size(), 3u);
  EXPECT_TRUE(got[1]["cross_entropy_loss"].is_null() && got[1]["eval_loss"].is_null());
  EXPECT_FALSE(got[2].has("eval_loss"));
  EXPECT_EQ(got[0].dump(), Json::parse(step_json(full_sample(1)), "line").dump());
  EXPECT_EQ(got[2].dump(), Json::parse(step_json(sample(3)), "line").dump());
}

TEST(MetricsFile, ContinuesBehindAStep) {
  const auto line = [](int64_t step) { return step_json(sample(step)) + "\n"; };
  const std::string three = line(1) + line(2) + line(3), torn = line(4);
  struct {
    const char* what;
    std::string before;
    int64_t last_step;
    std::string kept;
  } cases[] = {
      {"no file", "", 0, ""},
      {"a new run", three, 0, ""},
      {"cut back", three, 2, line(1) + line(2)},
      {"nothing to cut", three, 3, three},
      {"behind the end", three, 9, three},
      {"torn last line", three + torn.substr(0, torn.size() / 2), 9, three},
      {"without its newline", three + torn.substr(0, torn.size() - 1), 9, three},
      {"zeroed tail", three + std::string(100, '\0'), 9, three},
      {"torn and cut", three + torn.substr(0, 30), 1, line(1)},
      {"damage in the middle", line(1) + "{\"step\":2,\"lo\n" + line(3), 9, line(1)},
      {"not metrics", "hello\n" + three, 9, ""},
  };
  for (const auto& c : cases) {
    const std::string path = fresh_file("metrics_cut");
    if (!c.before.empty()) std::ofstream(path, std::ios::binary) << c.before;
    {
      begin_metrics(path, c.last_step);
      EXPECT_EQ(read_text_file(path), c.kept) << c.what;
      append_step(path, path + ".events", sample(50), 0);
    }
    EXPECT_EQ(read_text_file(path), c.kept + line(50)) << c.what;
  }
}

// The limit on a file's size stands for a full disk: the line that does not fit is taken back.
TEST(MetricsFile, FullDiskKeepsWholeLines) {
  const std::string path = fresh_file("metrics_full");
  begin_metrics(path, 0);
  append_step(path, path + ".events", sample(1), 0);
  const std::string before = read_text_file(path);
  rlimit old;
  getrlimit(RLIMIT_FSIZE, &old);
  const rlimit tight{before.size() + 20, old.rlim_max};
  const auto handler = signal(SIGXFSZ, SIG_IGN);
  setrlimit(RLIMIT_FSIZE, &tight);
  append_step(path, path + ".events", sample(2), 0);
  setrlimit(RLIMIT_FSIZE, &old);
  signal(SIGXFSZ, handler);
  EXPECT_EQ(read_text_file(path), before);
  append_step(path, path + ".events", sample(3), 0);
  EXPECT_EQ(read_metrics(path).size(), 2u);
}

TEST(MetricsFile, DamageIsRefusedByLine) {
  const std::string whole = step_json(sample(1)) + "\n";
  struct {
    std::string bytes;
    const char* error;
  } cases[] = {
      {whole + "{\"step\":2,\n" + whole, "metrics.jsonl: line 2: "},
      {whole + "{\"step\":2}\n", "metrics.jsonl: line 2: "},
      {"{\"step\":\"x\"}\n", "metrics.jsonl: line 1: step"},
  };
  for (const auto& c : cases) {
    const std::string path = fresh_file("metrics_bad");
    std::ofstream(path, std::ios::binary) << c.bytes;
    try {
      for (const Json& line : read_metrics(path)) line["cross_entropy_loss"].as_double();
      ADD_FAILURE() << c.bytes;
    } catch (const Error& error) {
      EXPECT_EQ(error.exit_code, kExitBadInput);
      EXPECT_NE(std::string(error.what()).find(c.error), std::string::npos) << error.what();
    }
  }
  EXPECT_THROW(read_metrics("/no/such/metrics.jsonl"), Error);
  EXPECT_THROW(begin_metrics("/no/such/metrics.jsonl", 0), Error);
}

}  // namespace pith
