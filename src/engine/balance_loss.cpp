#include "engine/balance_loss.h"

#include "comm/communicator.h"

namespace pith {

void begin_step(BalanceState& state, i64 global_tokens) {
  state.token_share = 1.0 / double(global_tokens);
  state.counts.assign(size_t(state.num_layers) * state.num_experts, 0.0);
  state.loss.assign(state.num_layers, 0.0);
}

// Share of pairs that chose each expert, a row a group: [groups, E].
static vector<double> shares(Rank& rank, const BalanceState& state, int layer,
                             const Routing& routing, i64 groups) {
  const i64 E = state.num_experts;
  const i64 pairs = routing.ids.numel() / groups;
  vector<double> f(groups * E, 0.0);
  double total = double(pairs * group_size(rank, Group::Cp));
  if (state.kind == BalanceKind::GlobalBatch) {
    total = 0;
    for (i64 e = 0; e < E; e++) {
      f[e] = state.previous.empty() ? 1.0 : state.previous[layer * E + e];
      total += f[e];
    }
  } else {
    for (i64 i = 0; i < pairs * groups; i++) f[i / pairs * E + routing.ids.i32()[i]] += 1;
    all_reduce(rank, Group::Cp, f.data(), int(f.size()), Reduce::Sum, "all_reduce balance counts");
  }
  for (double& x : f) x /= total;
  return f;
}

void add_balance_loss(Rank& rank, BalanceState& state, int layer, const Routing& routing, i64 rows,
                      At at) {
  const Tensor& probs = routing.probs;
  const i64 T = probs.dim[0], E = state.num_experts;
  for (i64 i = 0; i < routing.ids.numel(); i++) state.counts[layer * E + routing.ids.i32()[i]] += 1;
  if (state.kind == BalanceKind::None) return;
  const i64 groups = state.kind == BalanceKind::Sequence ? rows : 1;
  const vector<double> f = shares(rank, state, layer, routing, groups);
  const double scale = double(E) * state.token_share, factor = state.coefficient * scale;
  Tensor value = zeros(rank, {1}, DType::F32, at), grad = empty(rank, probs.dim, DType::F32, at);
  double sum = 0;
  for (i64 t = 0; t < T; t++)
    for (i64 e = 0; e < E; e++) {
      const double share = f[t * groups / T * E + e];
      sum += share * double(probs.f32()[t * E + e]);
      grad.f32()[t * E + e] = float(factor * share);
    }
  state.loss[layer] += sum * scale;
  if (Node* n = record(rank, "balance_loss", at, {probs}, {&value})) {
    n->bx_keep = {grad};
    n->bx = [](Rank& r, Node& node) { add_grad(r, node.in[0], node.bx_keep[0]); };
    add_grad(rank, value, value);  // terminal: its own gradient only says that it is wanted
  }
}

}
