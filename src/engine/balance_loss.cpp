#include "engine/balance_loss.h"

#include <algorithm>
#include <numeric>

#include "comm/communicator.h"
#include "ops/cuda.h"

namespace pith {

void begin_step(Rank& rank, BalanceState& state, i64 global_tokens) {
  state.token_share = 1.0 / double(global_tokens);
  state.counts.assign(size_t(state.num_layers) * state.num_experts, 0.0);
  state.loss.assign(state.num_layers, 0.0);
  if (rank.device == Device::CPU) return;
  state.gpu_counts = zeros(rank, {state.num_layers, state.num_experts}, DType::F64);
  state.gpu_loss = zeros(rank, {state.num_layers, 1}, DType::F32);
}

void end_step(Rank& rank, BalanceState& state) {
  if (rank.device == Device::CPU) return;
  vector<char> counts, loss;
  const double* count = on_host(rank, state.gpu_counts, counts).as<double>();
  const float* sum = on_host(rank, state.gpu_loss, loss).f32();
  std::copy_n(count, state.counts.size(), state.counts.begin());
  std::copy_n(sum, state.loss.size(), state.loss.begin());
  double scale = state.num_experts * state.token_share;
  for (double& x : state.loss) x *= scale;
}

// Share of pairs that chose each expert, a row a group: [groups, E].
static vector<double> shares(Rank& rank, const BalanceState& state, int layer,
                             const Routing& routing, i64 groups) {
  i64 E = state.num_experts;
  i64 pairs = routing.ids.numel() / groups;
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

static void record_balance(Rank& rank, const Tensor& probs, const Tensor& grad, At at) {
  Tensor value = zeros(rank, {1}, DType::F32, at);
  if (Node* n = record(rank, "balance_loss", at, {probs}, {&value})) {
    n->bx_keep = {grad};
    n->bx = [](Rank& r, Node& node) { add_grad(r, node.in[0], node.bx_keep[0]); };
    add_grad(rank, value, value);  // terminal: its own gradient only says that it is wanted
  }
}

// The same of what stays on a GPU, in the general vocabulary.
static void add_on_gpu(Rank& rank, BalanceState& state, int layer, const Routing& routing,
                       i64 groups, At at) {
  i64 E = state.num_experts, T = routing.probs.dim[0];
  if constexpr (kCuda) cuda_count(rank, routing.ids, state.gpu_counts.slice_rows(layer, layer + 1));
  if (state.kind == BalanceKind::None || T == 0) return;
  Tape* tape = std::exchange(rank.tape, nullptr);
  Tensor counts = zeros(rank, {groups, E}, DType::F64, at);
  double total = double(routing.ids.numel() / groups);
  if (state.kind == BalanceKind::GlobalBatch) {
    vector<double> before(E, 1.0);
    if (!state.previous.empty())
      before.assign(&state.previous[layer * E], &state.previous[layer * E] + E);
    total = std::accumulate(before.begin(), before.end(), 0.0);
    counts = tensor_from(rank, {1, E}, DType::F64, before.data(), at);
  } else if constexpr (kCuda) {
    cuda_count(rank, routing.ids, counts);
  }
  Tensor share = empty(rank, counts.dim, DType::F32, at);
  cast(rank, mul(rank, counts, 1 / total, at), share, at);
  share = reshape(rank, share, {groups, 1, E}, at);
  Tensor ones = empty(rank, {1, T / groups, 1}, DType::F32, at);
  fill_constant(rank, ones, 1, at);
  Tensor each = reshape(rank, mul(rank, share, ones, at), {T, E}, at);
  Tensor weighted = reshape(rank, mul(rank, each, routing.probs, at), {T * E}, at);
  add_into(rank, state.gpu_loss.slice_rows(layer, layer + 1), sum(rank, weighted, 0, at), at);
  Tensor grad = mul(rank, each, state.coefficient * double(E) * state.token_share, at);
  rank.tape = tape;
  record_balance(rank, routing.probs, grad, at);
}

void add_balance_loss(Rank& rank, BalanceState& state, int layer, const Routing& routing, i64 rows,
                      At at) {
  if (rank.device == Device::CUDA)
    return add_on_gpu(rank, state, layer, routing, state.kind == BalanceKind::Sequence ? rows : 1,
                      at);
  const Tensor& probs = routing.probs;
  i64 T = probs.dim[0], E = state.num_experts;
  for (i64 i = 0; i < routing.ids.numel(); i++) state.counts[layer * E + routing.ids.i32()[i]] += 1;
  if (state.kind == BalanceKind::None) return;
  i64 groups = state.kind == BalanceKind::Sequence ? rows : 1;
  vector<double> f = shares(rank, state, layer, routing, groups);
  double scale = double(E) * state.token_share, factor = state.coefficient * scale;
  Tensor grad = empty(rank, probs.dim, DType::F32, at);
  double sum = 0;
  for (i64 t = 0; t < T; t++)
    for (i64 e = 0; e < E; e++) {
      double share = f[t * groups / T * E + e];
      sum += share * double(probs.f32()[t * E + e]);
      grad.f32()[t * E + e] = float(factor * share);
    }
  state.loss[layer] += sum * scale;
  record_balance(rank, probs, grad, at);
}

}
