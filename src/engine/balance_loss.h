// balance_loss: keeps the experts evenly used.  Fedus et al. 2022, arXiv:2101.03961, eq. 4-6.
//
// Per layer and group of tokens: E * sum_i f_i * p_i, f_i the share of the group's (token, slot)
// pairs that chose expert i (without gradient), p_i its mean router probability; 1 is balance. The
// training loss adds coefficient * the sum over layers of the mean over groups, weighted by their
// tokens. A group is a micro-batch or a sequence, over cp; for GlobalBatch f is that of the
// previous step's global batch (1/E at step 0).
#pragma once
#include "ops/ops.h"

namespace pith {

// As router.balance_loss names them: "none", "micro-batch", "sequence", "global-batch".
enum class BalanceKind : uint8_t { None, MicroBatch, Sequence, GlobalBatch };

// What a rank keeps of routing during a step, and of the step before.
struct BalanceState {
  BalanceKind kind = BalanceKind::None;
  double coefficient = 0;
  int num_experts = 0, num_layers = 0;
  double token_share = 0;   // 1 / tokens of the global batch
  vector<double> counts;    // [layers * E]: pairs that chose each expert this step, here
  vector<double> previous;  // [layers * E]: of the whole previous global batch; empty: none
  vector<double> loss;      // [layers]: this rank's share of each layer's unscaled loss
};
void begin_step(BalanceState& state, int64_t global_tokens);

// Counts a layer's routing, adds its share of the loss, and records the gradient on routing.probs.
// `rows` sequences in the micro-batch.
void add_balance_loss(Rank& rank, BalanceState& state, int layer, const Routing& routing,
                      int64_t rows, At at = At::here());

}  // namespace pith
