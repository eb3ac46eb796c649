// What does not fit is refused before anything is allocated, saying what to change.
#include "engine/run_plan.h"

#include "engine/small_run.h"

namespace pith {
namespace {

TEST(PlanRun, RefusesWhatDoesNotFit) {
  const struct {
    const char* name;
    int ranks;
    void (*change)(RunConfig&);
    std::vector<const char*> parts;
  } cases[] = {
      {"ranks and mesh", 6, [](RunConfig& c) { c.parallel.pp = 4; },
          {"ranks do not split over pp * cp * ep", "6 ranks", "Try: 4 or 8 ranks", "smaller pp"}},
      {"replicas", 6, [](RunConfig& c) { c.parallel.dp_replicate = 4; },
          {"dp_replicate does not divide dp", "got 4", "Try: dp_replicate = 1"}},
      {"micro-batches of the schedule", 4,
          [](RunConfig& c) {
            c.parallel.pp = 4;
            c.train.global_batch_size = 6;
          },
          {"train.global_batch_size", "too few micro-batches", "dualpipev at pp = 4", "= 6",
              "need at least 8", "Try: train.global_batch_size = 8",
              "parallel.schedule = \"1f1b\""}},
      {"experts and ep", 3,
          [](RunConfig& c) {
            c.parallel.ep = 3;
            c.train.global_batch_size = 60;
          },
          {"parallel.ep", "does not divide the experts", "ep = 3 and 8 experts",
              "Try: parallel.ep"}},
      {"layers and stages", 8, [](RunConfig& c) { c.parallel.pp = 8; },
          {"layers", "8 layers and 16 stages", "Try: a smaller parallel.pp"}},
      {"layers and 1F1B's stages", 16,
          [](RunConfig& c) {
            c.parallel.pp = 16;
            c.parallel.schedule = "1f1b";
          },
          {"layers", "8 layers and 16 stages", "Try: a smaller parallel.pp"}},
      {"global batch and mesh", 3, [](RunConfig&) {},
          {"train.global_batch_size", "got 64 sequences",
              "need a multiple of micro-batch 1 * dp 3 * ep 1 = 3", "Try: 66"}},
      {"global batch and micro-batch", 1, [](RunConfig& c) { c.train.micro_batch_size = 5; },
          {"train.global_batch_size", "got 64 sequences",
              "need a multiple of micro-batch 5 * dp 1 * ep 1 = 5", "Try: 65"}},
      {"global batch, micro-batch and mesh", 4,
          [](RunConfig& c) {
            c.parallel.ep = 2;
            c.train.micro_batch_size = 32;
          },
          {"got 64 sequences", "micro-batch 32 * dp 2 * ep 2 = 128", "Try: 128"}},
      {"sequence and cp", 3, [](RunConfig& c) { c.parallel.cp = 3; },
          {"data.sequence_length", "got 32 and cp = 3", "multiple of 6",
              "Try: data.sequence_length = 36"}},
      {"sequence and positions", 1, [](RunConfig& c) { c.data.sequence_length = 8192; },
          {"data.sequence_length", "got 8192", "max_position_embeddings = 4096", "Try: "}},
  };
  for (const auto& c : cases) {
    SCOPED_TRACE(c.name);
    RunConfig config = small_run();
    c.change(config);
    try {
      plan_run(config, Device::CPU, c.ranks);
      ADD_FAILURE() << "was accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.exit_code, kExitBadInput);
      for (const char* part : c.parts)
        EXPECT_NE(std::string(e.what()).find(part), std::string::npos)
            << e.what() << "\nneed: " << part;
    }
  }
}

// The sizes that messages propose are accepted.
// 6 operations a parameter that a token meets in a matrix product (q|k|v, o, router, 2 experts; the
// head), and 3 * S * heads * (8 + 8) a layer for causal attention.
TEST(PlanRun, CountsOperations) {
  const double layer = (64 + 32) * 32 + 8 * 32 + 2 * 3 * 16 * 32, attention = 3 * 32 * 4 * 16;
  const double need = 6 * (8 * layer + 64 * 32) + 8 * attention;
  EXPECT_EQ(plan_run(small_run(), Device::CPU, 1).flops_per_token, need);
}

TEST(PlanRun, AcceptsTheSmallestThatFits) {
  const struct {
    int ranks, pp, cp, ep;
    int64_t batch, length;
  } cases[] = {{4, 4, 1, 1, 8, 32}, {3, 1, 1, 1, 66, 32}, {3, 1, 3, 1, 64, 36},
      {8, 4, 1, 2, 16, 32}, {1, 1, 1, 1, 1, 31}};
  for (const auto& c : cases) {
    RunConfig config = small_run();
    config.parallel.pp = c.pp;
    config.parallel.cp = c.cp;
    config.parallel.ep = c.ep;
    config.train.global_batch_size = c.batch;
    config.data.sequence_length = c.length;
    EXPECT_EQ(plan_run(config, Device::CPU, c.ranks).mesh.world(), c.ranks);
  }
}

}  // namespace
}  // namespace pith
