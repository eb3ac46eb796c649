// Per layer and group of tokens E * sum_i f_i * p_i: f_i the share of pairs that chose expert i,
// p_i its mean probability (Fedus et al. 2022, arXiv:2101.03961, eq. 4-6). A group is a micro-batch
// or a sequence, over cp; GlobalBatch takes f from the step before.
#pragma once
#include "ops/ops.h"

namespace pith {

enum class BalanceKind : u8 { None, MicroBatch, Sequence, GlobalBatch };

struct BalanceState {
  BalanceKind kind = BalanceKind::None;
  double coefficient = 0;
  int num_experts = 0, num_layers = 0;
  double token_share = 0;         // 1 / tokens of the global batch
  vector<double> counts;          // [layers * E]: pairs of this step and rank
  vector<double> previous;        // of the last step and all ranks; empty: 1/E each
  vector<double> loss;            // [layers], unscaled: this rank's share
  Tensor step_counts, step_loss;  // F64 [layers, E], F32 [layers, 1]: until end_step
  Tensor step_shares;             // F32 [layers, E]: of `previous`, for GlobalBatch
};
void begin_step(Rank& rank, BalanceState& state, i64 global_tokens);
void end_step(Rank& rank, BalanceState& state);

// Of `rows` sequences; the gradient goes to routing.probs.
void add_balance_loss(Rank& rank, BalanceState& state, int layer, const Routing& routing, i64 rows,
    At at = At::here());

}
