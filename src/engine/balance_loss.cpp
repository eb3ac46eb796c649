#include "engine/balance_loss.h"

#include "comm/communicator.h"

namespace pith {

BalanceKind balance_kind(const string& name) {
  if (name == "none") return BalanceKind::None;
  if (name == "micro-batch") return BalanceKind::MicroBatch;
  if (name == "sequence") return BalanceKind::Sequence;
  if (name == "global-batch") return BalanceKind::GlobalBatch;
  bad_input("router.balance_loss", text("is unknown (got \"%s\")", name.c_str()),
            "\"none\", \"micro-batch\", \"sequence\" or \"global-batch\"");
}

void begin_step(BalanceState& state, int64_t global_tokens) {
  const size_t n = size_t(state.num_layers) * state.num_experts;
  state.token_share = 1.0 / double(global_tokens);
  state.counts.assign(n, 0.0);
  state.loss.assign(state.num_layers, 0.0);
}

// Share of pairs that chose each expert, a row a group: [groups, E].
static vector<double> fractions(Rank& rank, const BalanceState& state, int layer,
                                const Routing& routing, int64_t groups) {
  const int64_t E = state.num_experts, T = routing.ids.dim[0], k = routing.ids.dim[1];
  vector<double> f(groups * E, 0.0);
  if (state.kind == BalanceKind::GlobalBatch) {
    double total = 0;
    const size_t first = size_t(layer) * E;
    for (int64_t e = 0; e < E; e++) {
      f[e] = state.previous.empty() ? 1.0 : state.previous[first + e];
      total += f[e];
    }
    for (double& x : f) x /= total;
    return f;
  }
  const int64_t tokens = T / groups;
  for (int64_t i = 0; i < T * k; i++) f[i / k / tokens * E + routing.ids.i32()[i]] += 1;
  all_reduce(rank, Group::Cp, f.data(), int(f.size()), Reduce::Sum, "all_reduce balance counts");
  const auto pairs = double(tokens * k * group_size(rank, Group::Cp));
  for (double& x : f) x /= pairs;
  return f;
}

// Adds coefficient * token_share * E * f to each row of the probabilities' gradient.
template <class T>
static void add_gradient(Rank& rank, Node& node) {
  const Tensor& probs = node.in[0];
  const double* f = node.bx_keep[0].as<double>();
  const int64_t tokens = probs.dim[0], E = probs.dim[1], per_group = tokens / node.i[0];
  Tensor g = empty(rank, probs.dim, probs.dtype, node.at);
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t e = 0; e < E; e++)
      g.as<T>()[t * E + e] = static_cast<T>(node.f[0] * f[t / per_group * E + e]);
  add_grad(rank, probs, g);
}

template <class T>
static double loss_share(const Tensor& probs, const vector<double>& f, int64_t groups) {
  const int64_t tokens = probs.dim[0], E = probs.dim[1], per_group = tokens / groups;
  double sum = 0;
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t e = 0; e < E; e++)
      sum += f[t / per_group * E + e] * double(probs.as<T>()[t * E + e]);
  return sum;
}

void add_balance_loss(Rank& rank, BalanceState& state, int layer, const Routing& routing,
                      int64_t rows, At at) {
  const int64_t E = state.num_experts, pairs = routing.ids.numel();
  const size_t first = size_t(layer) * E;
  for (int64_t i = 0; i < pairs; i++) state.counts[first + routing.ids.i32()[i]] += 1;
  if (state.kind == BalanceKind::None) return;
  const int64_t groups = state.kind == BalanceKind::Sequence ? rows : 1;
  const vector<double> f = fractions(rank, state, layer, routing, groups);
  const bool wide = routing.probs.dtype == DType::F64;
  const double share = wide ? loss_share<double>(routing.probs, f, groups)
                            : loss_share<float>(routing.probs, f, groups);
  state.loss[layer] += share * double(E) * state.token_share;
  Tensor value = zeros(rank, {1}, routing.probs.dtype, at);
  if (Node* n = record(rank, "balance_loss", at, {routing.probs}, {&value})) {
    n->bx_keep = {tensor_from(rank, {int64_t(f.size())}, DType::F64, f.data())};
    n->f[0] = state.coefficient * double(E) * state.token_share;
    n->i[0] = groups;
    n->bx = wide ? add_gradient<double> : add_gradient<float>;
    add_grad(rank, value, value);  // terminal: its own gradient only says that it is wanted
  }
}

}  // namespace pith
