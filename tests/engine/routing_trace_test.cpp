#include "engine/routing_trace.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "core/check.h"
#include "core/json.h"
#include "data/array_files.h"
#include "ops/gradcheck.h"

namespace pith {

namespace fs = std::filesystem;

static std::string fresh_folder(const char* name) {
  const std::string path = testing::TempDir() + "pith_" + name + "_" + std::to_string(getpid());
  fs::remove_all(path);
  return path;
}

// Two layers, the first without experts, of three tokens with two experts each.
static RoutingStep sample() {
  RoutingStep r;
  begin_trace(r, 2, 3, 2);
  const int32_t ids[] = {0, 3, 2, 1, 3, 0};
  for (size_t i = 0; i < 6; i++) {
    r.ids[6 + i] = ids[i];
    r.weights[6 + i] = 0.5f + static_cast<float>(i);
  }
  return r;
}

TEST(RoutingTrace, RoundTrip) {
  const std::string folder = fresh_folder("routing") + "/made/on/the/way";
  const RoutingStep wrote = sample();
  write_routing(folder, 12, wrote);
  RoutingStep got{2, 3, 2};
  read_routing(folder, 12, 4, got);
  EXPECT_EQ(got.ids, wrote.ids);
  EXPECT_TRUE(got.forced);
  const NpyArray weights = read_npy(folder + "/step-00000012.weights.npy");
  EXPECT_EQ(weights.header.shape, (std::vector<int64_t>{2, 3, 2}));
  EXPECT_EQ(weights.header.dtype, FileDType::F32);
  EXPECT_EQ(memcmp(weights.data, wrote.weights.data(), 48), 0);
}

TEST(RoutingTrace, RefusesWhatDoesNotFit) {
  const std::string folder = fresh_folder("routing_bad");
  const std::string path = folder + "/step-00000001.ids.npy";
  const auto with = [](size_t at, int32_t id) {
    RoutingStep r = sample();
    r.ids[at] = id;
    return r;
  };
  struct {
    RoutingStep wrote;
    RoutingStep reader;
    int num_experts;
    const char* error;
  } cases[] = {
      {sample(), {1, 3, 2}, 4, "need <i4 [1, 3, 2]"},
      {sample(), {2, 4, 2}, 4, "need <i4 [2, 4, 2]"},
      {sample(), {2, 3, 1}, 4, "need <i4 [2, 3, 1]"},
      {sample(), {2, 3, 2}, 3, "layer 1, token 0, slot 1 (got 3, need distinct ones of 0 to 2)"},
      {with(9, 4), {2, 3, 2}, 4, "layer 1, token 1, slot 1 (got 4"},
      {with(8, -2), {2, 3, 2}, 4, "layer 1, token 1, slot 0 (got -2"},
      {with(9, -1), {2, 3, 2}, 4, "layer 1, token 1, slot 1 (got -1"},
      {with(3, 2), {2, 3, 2}, 4, "layer 0, token 1, slot 1 (got 2"},
      {with(11, 3), {2, 3, 2}, 4, "layer 1, token 2, slot 1 (got 3"},
  };
  for (const auto& c : cases) {
    write_routing(folder, 1, c.wrote);
    RoutingStep got = c.reader;
    try {
      read_routing(folder, 1, c.num_experts, got);
      ADD_FAILURE() << c.error;
    } catch (const Error& error) {
      EXPECT_EQ(error.exit_code, kExitBadInput);
      const std::string what = error.what();
      EXPECT_EQ(what.find(path + ": "), 0u) << what;
      EXPECT_NE(what.find(c.error), std::string::npos) << what << "\nneed: " << c.error;
    }
    EXPECT_FALSE(got.forced) << c.error;
  }
}

TEST(RoutingTrace, RefusesDamagedFiles) {
  const std::string folder = fresh_folder("routing_cut");
  const std::string path = folder + "/step-00000001.ids.npy";
  write_routing(folder, 1, sample());
  const std::string whole = read_text_file(path);
  const auto code = [&] {
    RoutingStep got{2, 3, 2};
    try {
      read_routing(folder, 1, 4, got);
    } catch (const Error& error) {
      return error.exit_code;
    }
    return 0;
  };
  for (size_t n = 0; n < whole.size(); n += 7) {
    std::ofstream(path, std::ios::binary) << whole.substr(0, n);
    EXPECT_EQ(code(), kExitBadInput) << n;
  }
  std::ofstream(path, std::ios::binary) << whole;
  EXPECT_EQ(code(), 0);
  const std::vector<float> floats(12, 1);
  write_npy(path, FileDType::F32, {2, 3, 2}, floats.data());
  EXPECT_EQ(code(), kExitBadInput);
  fs::remove(path);
  EXPECT_EQ(code(), kExitBadInput);
}

// Layer 1 of two; four tokens with two experts each, split over two ranks and two micro-batches.
TEST(RoutingSlot, RanksFillTheirTokensAndGetThemBack) {
  TestRank t;
  RoutingStep step;
  begin_trace(step, 2, 4, 2);
  const RoutingSlot slots[] = {{&step, {{0}, {3}}}, {&step, {{2, 1}, {}}}};
  struct {
    int rank, micro_batch;
    std::vector<int32_t> ids;
    std::vector<double> weights;
    DType dtype;
  } parts[] = {{0, 0, {5, 1}, {0.5, 0.25}, DType::F32}, {0, 1, {7, 2}, {0.75, 0.125}, DType::F32},
      {1, 0, {3, 4, 6, 0}, {1, 2, 3, 4}, DType::F32}};
  for (const auto& p : parts) {
    const int64_t T = static_cast<int64_t>(p.ids.size()) / 2;
    const Routing routing{t.ints({T, 2}, p.ids), t.floats({T, 2}, p.weights, p.dtype),
        t.random({T, 8}, 1, 0, 0.125, p.dtype)};
    trace_routing(t.rank, slots[p.rank], 1, p.micro_batch, routing);
    EXPECT_FALSE(forced_ids(t.rank, slots[p.rank], 1, p.micro_batch).defined());
  }
  trace_routing(t.rank, slots[0], 0, 0, {});  // a layer without experts
  EXPECT_EQ(step.ids, (std::vector<int32_t>{-1, -1, -1, -1, -1, -1, -1, -1,  //
                          5, 1, 6, 0, 3, 4, 7, 2}));
  EXPECT_EQ(std::vector<float>(step.weights.begin() + 8, step.weights.end()),
      (std::vector<float>{0.5, 0.25, 3, 4, 1, 2, 0.75, 0.125}));
  step.forced = true;
  for (const auto& p : parts) {
    const Tensor ids = forced_ids(t.rank, slots[p.rank], 1, p.micro_batch);
    EXPECT_EQ(std::vector<int32_t>(ids.i32(), ids.i32() + ids.numel()), p.ids);
    EXPECT_EQ(ids.dim[1], 2);
    EXPECT_FALSE(forced_ids(t.rank, slots[p.rank], 0, p.micro_batch).defined());
  }
  EXPECT_FALSE(forced_ids(t.rank, slots[1], 1, 1).defined());  // no tokens
}

TEST(RoutingSlot, AnotherShapeIsAnError) {
  TestRank t;
  RoutingStep step;
  begin_trace(step, 1, 2, 2);
  const RoutingSlot slot{&step, {{0, 1}}};
  EXPECT_THROW(
      trace_routing(t.rank, slot, 0, 0, {t.ints({1, 2}, {0, 1}), t.floats({1, 2}, {}), {}}), Error);
}

}  // namespace pith
