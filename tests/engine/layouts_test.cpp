// Every parallel layout trains the same model: the promise of the whole engine.
#include "engine/layouts.h"

#include "engine/small_run.h"

namespace pith {
namespace {

std::string reason(const Layout& layout, const LayoutResult& r) {
    return layout_text(layout) + text(": gradient %.1e (%s), norm %.1e, loss %.1e, balance %.1e, "
                                      "weights %.1e (%s), %lld routed otherwise (gap %.1e): ",
                                      r.gradient, r.gradient_of.c_str(), r.norm, r.loss, r.balance,
                                      r.weights, r.weights_of.c_str(),
                                      static_cast<long long>(r.routed_otherwise), r.logit_gap) +
           r.why;
}

void expect_equal(const RunConfig& config, const std::vector<Layout>& layouts,
                  int64_t reference_micro_batch = 1) {
    Probe reference;
    run_layout(config, {.micro_batch = reference_micro_batch}, reference);
    ASSERT_EQ(reference.loss.size(), 8u);
    ASSERT_GT(reference.gradients.size(), 50u);
    for (const Layout& layout : layouts) {
        Probe probe;
        run_layout(config, layout, probe);
        const LayoutResult result = compare_layouts(reference, probe);
        EXPECT_TRUE(result.pass) << reason(layout, result);
        EXPECT_EQ(result.routed_otherwise, 0) << reason(layout, result);
    }
}

TEST(SlowLayouts, Try) { expect_equal(small_run(), all_layouts(16)); }

}  // namespace
}  // namespace pith
