#include "bench/counts.h"

#include <algorithm>

namespace pith {

i64 Sizes::parameters() const {
  const auto& m = model;
  i64 attention = m.hidden * (m.heads.width() + attention_width()) + 2 * m.heads.size;
  i64 experts = m.num_experts * (3 * m.expert_width + 1) * m.hidden;  // and the router
  return m.num_layers * (attention + experts + 2 * m.hidden) + (2 * m.vocab + 1) * m.hidden;
}

Sizes sizes_of(const RunPlan& plan) {
  return {.model = Qwen3Moe::read_config(plan.model),
      .length = plan.config.data.sequence_length,
      .rows = plan.batch.micro_batch,
      .element = size_of(plan.compute)};
}

double times_a_step(Each each, int layers, i64 micro_batches) {
  if (each == Each::Step) return 1;
  return double(micro_batches) * (each == Each::Layer ? layers : 1);
}

vector<Product> products(const Sizes& s) {
  const auto& m = s.model;
  i64 T = s.tokens(), P = s.pairs(), D = m.hidden, F = m.expert_width, E = m.num_experts;
  return {{"qkv", T, D, m.heads.width(), 0, Each::Layer},
      {"o", T, s.attention_width(), D, 0, Each::Layer}, {"router", T, D, E, 0, Each::Layer},
      {"gate+up", P, D, 2 * F, E, Each::Layer}, {"down", P, F, D, E, Each::Layer},
      {"head", T, D, m.vocab, 0, Each::MicroBatch}};
}

double attention_flops(const Sizes& s, bool backward) {
  double forward = 2.0 * double(s.tokens()) * double(s.length) * double(s.attention_width());
  return backward ? 2.5 * forward : forward;
}

vector<Pass> passes(const Sizes& s) {
  const auto& m = s.model;
  const double e = double(s.element), T = double(s.tokens()), P = double(s.pairs());
  const double k = m.top_k, E = m.num_experts, V = double(m.vocab), D = double(m.hidden);
  const double x = T * D * e;     // the hidden states
  const double pair = P * D * e;  // a copy of them for each pair
  const double act = P * double(m.expert_width) * e;
  const double qkv = T * double(m.heads.width()) * e;
  const double turned = T * (m.heads.query + m.heads.kv);  // heads
  const double qk = turned * m.heads.size * e;
  const double stat = 4 * T;
  const double distinct = V * -std::expm1(-T / V);  // of T random tokens
  const double n = double(s.parameters());
  return {{"embedding", 2 * x + stat, 0, x + stat + 8 * distinct * D, Each::MicroBatch},
      {"rms_norm", 2 * x + stat, 3 * x + stat, 2 * x + stat, Each::Layer},
      {"qk_norm_rope", 2 * qkv + 4 * turned, 2 * qkv + qk + 4 * turned, 2 * qk + 4 * turned,
          Each::Layer},
      {"add_rms_norm", 4 * x + stat, 4 * x + stat, 2 * x + stat, Each::Layer},
      // After the product: the logits become probabilities in place.
      {"route", 8 * T * E + 8 * T * k, (4 + e) * T * E + 8 * T * k, 0, Each::Layer},
      // Places of the pairs, there and back, and their weights.
      {"dispatch", 4 * P + 8 * P + 8 * P, 8 * P + 4 * P, 0, Each::Layer},
      {"expand", x + 4 * P + pair, pair + 4 * P + x, 0, Each::Layer},
      {"swiglu", 3 * act + 4 * P, 5 * act + 8 * P, 0, Each::Layer},
      {"reduce", pair + 4 * P + x, x + 4 * P + pair, 0, Each::Layer},
      {"residual add", 3 * x, 0, 0, Each::Layer},
      // Where a value has two uses: its second gradient is read once more.
      {"gradients of two uses", 0, 2 * x, 0, Each::Layer},
      {"final rms_norm", 2 * x + stat, 3 * x + stat, 2 * x + stat, Each::MicroBatch},
      // Of the logits, which become their gradients.
      {"cross entropy", 2 * T * V * e + stat, 0, 0, Each::MicroBatch},
      {"zero gradients", 4 * n, 0, 0, Each::Step},
      {"cast weights", e < 4 ? (4 + e) * n : 0, 0, 0, Each::Step},
      {"gradient norm", 4 * n, 0, 0, Each::Step}, {"AdamW", 28 * n, 0, 0, Each::Step}};
}

const Pass& pass_of(const vector<Pass>& all, string_view op) {
  const auto found = std::ranges::find(all, op, &Pass::op);
  if (found == all.end()) failed("bench", "no pass is called " + string(op));
  return *found;
}

}
