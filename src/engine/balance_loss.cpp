#include "engine/balance_loss.h"

#include <algorithm>
#include <numeric>

#include "comm/communicator.h"
#include "ops/cuda.h"

namespace pith {

void begin_step(Rank& rank, BalanceState& state, i64 global_tokens) {
  state.token_share = 1.0 / double(global_tokens);
  state.step_counts = zeros(rank, {state.num_layers, state.num_experts}, DType::F64);
  state.step_loss = zeros(rank, {state.num_layers, 1}, DType::F32);
  if (state.kind != BalanceKind::GlobalBatch) return;
  const i64 E = state.num_experts;
  vector<double> before = state.previous;
  before.resize(state.num_layers * E, 1.0);  // those of no step: all alike
  vector<float> share(before.size());
  for (size_t i = 0; i < share.size(); i++) {
    const double* layer = &before[i / E * E];
    share[i] = float(before[i] * (1 / std::accumulate(layer, layer + E, 0.0)));
  }
  state.step_shares = tensor_from(rank, {state.num_layers, E}, DType::F32, share.data());
}

void end_step(Rank& rank, BalanceState& state) {
  vector<char> counts, loss;
  const double* count = on_host(rank, state.step_counts, counts).as<double>();
  const float* sum = on_host(rank, state.step_loss, loss).f32();
  state.counts.assign(count, count + state.step_counts.numel());
  state.loss.assign(sum, sum + state.num_layers);
  for (double& x : state.loss) x *= state.num_experts * state.token_share;
}

// counts[g, e] += the pairs of row group g that chose e.
static void add_counts(Rank& rank, const Tensor& ids, const Tensor& counts) {
  if constexpr (kCuda)
    if (ids.on_gpu()) return cuda_count(rank, ids, counts);
  const i64 E = counts.dim[1], n = ids.numel(), groups = counts.dim[0];
  for (i64 i = 0; i < n; i++) counts.as<double>()[i * groups / n * E + ids.i32()[i]] += 1;
}

// Share of pairs that chose each expert, a row a group: F32 [groups, 1, E].
static Tensor shares(
    Rank& rank, const BalanceState& state, int layer, const Tensor& ids, i64 groups) {
  const i64 E = state.num_experts;
  if (state.kind == BalanceKind::GlobalBatch)
    return state.step_shares.slice_rows(layer, layer + 1).view({1, 1, E});
  Tensor f = zeros(rank, {groups, E}, DType::F64);
  double total = double(ids.numel() / groups * group_size(rank, Group::Cp));
  add_counts(rank, ids, f);
  if (!f.on_gpu())
    all_reduce(
        rank, Group::Cp, f.as<double>(), int(f.numel()), Reduce::Sum, "all_reduce balance counts");
  Tensor share = empty(rank, {groups, E}, DType::F32);
  cast(rank, mul(rank, f, 1 / total), share);
  return share.view({groups, 1, E});
}

void add_balance_loss(
    Rank& rank, BalanceState& state, int layer, const Routing& routing, i64 rows, At at) {
  const Tensor& probs = routing.probs;
  const i64 T = probs.dim[0], E = state.num_experts;
  add_counts(rank, routing.ids, state.step_counts.slice_rows(layer, layer + 1));
  if (state.kind == BalanceKind::None) return;
  const i64 groups = state.kind == BalanceKind::Sequence ? rows : 1;
  Tape* tape = std::exchange(rank.tape, nullptr);
  const Tensor share = shares(rank, state, layer, routing.ids, groups);
  const Tensor ones = empty(rank, {1, T / groups, 1}, DType::F32, at);
  fill_constant(rank, ones, 1, at);
  const Tensor each = mul(rank, share, ones, at).view({T, E});
  const Tensor weighted = mul(rank, each, probs, at).view({T * E});
  add_into(rank, state.step_loss.slice_rows(layer, layer + 1), sum(rank, weighted, 0, at), at);
  const Tensor grad = mul(rank, each, state.coefficient * double(E) * state.token_share, at);
  rank.tape = tape;
  Tensor value = zeros(rank, {1}, DType::F32, at);
  if (Node* n = record(rank, "balance_loss", at, {probs}, {&value})) {
    n->bx_keep = {grad};
    n->bx = [](Rank& r, Node& node) { add_grad(r, node.in[0], node.bx_keep[0]); };
    add_grad(rank, value, value);  // terminal: its own gradient only says that it is wanted
  }
}

}
