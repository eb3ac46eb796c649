#include "engine/routing_slot.h"

#include <gtest/gtest.h>

#include "ops/gradcheck.h"

namespace pith {

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
  } parts[] = {{0, 0, {5, 1}, {0.5, 0.25}, DType::F32},
               {0, 1, {7, 2}, {0.75, 0.125}, DType::F64},
               {1, 0, {3, 4, 6, 0}, {1, 2, 3, 4}, DType::F32}};
  for (const auto& p : parts) {
    const int64_t T = static_cast<int64_t>(p.ids.size()) / 2;
    const Routing routing{t.ints({T, 2}, p.ids), t.floats({T, 2}, p.weights, p.dtype),
                          t.random({T, 8}, 1, 0, 0.125, p.dtype)};
    trace_routing(slots[p.rank], 1, p.micro_batch, routing);
    EXPECT_FALSE(forced_ids(t.rank, slots[p.rank], 1, p.micro_batch).defined());
  }
  trace_routing(slots[0], 0, 0, {});  // a layer without experts
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
  step.traced = false;
  trace_routing(slots[0], 1, 0, {t.ints({1, 2}, {0, 0}), t.floats({1, 2}, {}, DType::F32), {}});
  EXPECT_EQ(step.ids[8], 5);
}

TEST(RoutingSlot, AnotherShapeIsAnError) {
  TestRank t;
  RoutingStep step;
  begin_trace(step, 1, 2, 2);
  const RoutingSlot slot{&step, {{0, 1}}};
  EXPECT_THROW(trace_routing(slot, 0, 0, {t.ints({1, 2}, {0, 1}), t.floats({1, 2}, {}), {}}),
               Error);
}

}  // namespace pith
