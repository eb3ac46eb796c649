#include "retention.h"

#include <cmath>

namespace pith {

Retention::Config Retention::read_config(const Json& j) {
  const char* const fields[] = {"hidden_size", "model_type", "moe_intermediate_size",
      "num_attention_heads", "num_experts", "num_experts_per_tok", "num_hidden_layers",
      "rms_norm_eps", "vocab_size"};
  for (const std::string& key : j.keys()) {
    bool known = false;
    for (const char* field : fields) known = known || key == field;
    if (!known)
      bad_input(j.place() + ": " + key, "unknown field of a retention config.json", "removing it");
  }
  Config c;
  const int64_t many = 1 << 20;
  c.hidden = j["hidden_size"].as_int(1, many);
  c.expert_width = j["moe_intermediate_size"].as_int(1, many);
  c.vocab = j["vocab_size"].as_int(1, many);
  c.num_layers = static_cast<int>(j["num_hidden_layers"].as_int(1, 1000));
  c.num_experts = static_cast<int>(j["num_experts"].as_int(1, 1000));
  c.top_k = static_cast<int>(j["num_experts_per_tok"].as_int(1, c.num_experts));
  c.heads = static_cast<int>(j["num_attention_heads"].as_int(1, c.hidden));
  c.eps = j.double_or("rms_norm_eps", 1e-6);
  if (c.hidden % c.heads != 0)
    bad_input(j.place() + ": num_attention_heads",
        text("must divide hidden_size (got %d and %ld)", c.heads, long(c.hidden)),
        "a number of heads that divides it");
  return c;
}

ModelShape Retention::shape(const Config& c) {
  return {.model_type = "retention",
      .hidden = c.hidden,
      .vocab = c.vocab,
      .num_layers = c.num_layers,
      .attention_width = 2 * c.hidden};
}

ParameterTable Retention::parameters(const Config& c, const StagePart& part, double init_std) {
  const int64_t D = c.hidden, EF = c.num_experts * c.expert_width, V = c.vocab;
  const Init ones{InitKind::Constant, 1.0}, normal{InitKind::Normal, init_std};
  ParameterTable table;
  const auto one = [&](Tensor& target, Dims dims, UnitKind unit, int layer, std::string name,
                       Init init) {
    table.push_back({&target, dims, unit, layer, {{std::move(name), dims, init}}});
  };
  layers.assign(part.num_layers, {});
  if (part.embedding)
    one(embedding, {V, D}, UnitKind::Embedding, -1, "model.embed_tokens.weight", normal);
  for (int i = 0; i < part.num_layers; i++) {
    const int l = part.first_layer + i;
    const std::string layer = text("model.layers.%d.", l);
    const UnitKind unit = UnitKind::Layer;
    Layer& w = layers[i];
    one(w.mixer_norm, {D}, unit, l, layer + "mixer_norm.weight", ones);
    one(w.qkvg, {4 * D, D}, unit, l, layer + "retention.qkvg.weight", normal);
    one(w.decay, {c.heads}, unit, l, layer + "retention.decay", ones);
    one(w.o_proj, {D, D}, unit, l, layer + "retention.o_proj.weight", normal);
    one(w.mlp_norm, {D}, unit, l, layer + "mlp_norm.weight", ones);
    one(w.router, {c.num_experts, D}, unit, l, layer + "mlp.router.weight", normal);
    one(w.up, {EF, D}, unit, l, layer + "mlp.up.weight", normal);
    one(w.down, {D, EF}, unit, l, layer + "mlp.down.weight", normal);
  }
  if (part.head) {
    one(final_norm, {D}, UnitKind::Head, -1, "model.norm.weight", ones);
    one(lm_head, {V, D}, UnitKind::Head, -1, "lm_head.weight", normal);
  }
  return table;
}

static Tensor table_of(Rank& rank, Dims dims, const std::vector<double>& values) {
  if (rank.compute == DType::F64) return tensor_from(rank, dims, DType::F64, values.data());
  const std::vector<float> floats(values.begin(), values.end());
  return tensor_from(rank, dims, DType::F32, floats.data());
}

void Retention::prepare(Rank& rank, const Config& c, int64_t length) {
  std::vector<double> distance, rate;
  for (int64_t i = 0; i < length; i++)
    for (int64_t j = 0; j < length; j++) distance.push_back(j < i ? static_cast<double>(i - j) : 0);
  for (int h = 0; h < c.heads; h++) rate.push_back(std::ldexp(1.0, -h));
  distance_SS = table_of(rank, {length, length}, distance);
  rate_H11 = table_of(rank, {c.heads, 1, 1}, rate);
}

// U8 [B, 1, S, S]: the key is not after the query and in its document.
static Tensor visible_keys(Rank& rank, const Batch& batch) {
  const int64_t B = batch.rows, S = batch.length;
  std::vector<char> bytes;
  const Tensor ends = on_host(rank, batch.mask.doc_ends, bytes);
  std::vector<uint8_t> seen(B * S * S);
  for (int64_t r = 0; r < B * S; r++)
    for (int64_t j = 0; j <= r % S; j++)
      seen[r * S + j] = !ends.defined() || ends.i32()[r] == ends.i32()[r / S * S + j];
  return tensor_from(rank, {B, 1, S, S}, DType::U8, seen.data());
}

Tensor Retention::retain(
    Rank& rank, const Config& c, const Layer& w, Tensor x_TD, const Batch& batch) const {
  const int64_t B = batch.rows, S = batch.length, H = c.heads, D = c.hidden, N = D / H;
  check(rank, "retention", At::here(),
      {{"a whole causal row without a window",
           rank.mesh.cp == 1 && batch.mask.causal && batch.mask.window == 0},
          {"a row no longer than prepared", S <= distance_SS.dim[0]}},
      {&x_TD, &distance_SS});
  TensorList qkvg = split(rank, linear(rank, x_TD, w.qkvg), -1, {D, D, D, D});
  for (int i = 0; i < 3; i++)
    qkvg[i] = permute(rank, reshape(rank, qkvg[i], {B, S, H, N}), {0, 2, 1, 3});
  const Tensor q_BHSN = qkvg[0], k_BHSN = qkvg[1], v_BHSN = qkvg[2], gate_TD = qkvg[3];

  // decay^(query - key), as e^(-rate * distance).
  Tensor rate = mul(rank, softplus(rank, reshape(rank, w.decay, {H, 1, 1})), rate_H11);
  Tensor distance = slice(rank, slice(rank, distance_SS, 0, 0, S), 1, 0, S);
  Tensor decay_HSS = exp(rank, mul(rank, mul(rank, rate, -1), distance));
  Tensor decay_BHSS =
      where(rank, visible_keys(rank, batch), decay_HSS, zeros(rank, {1}, x_TD.dtype));

  Tensor scores = matmul(rank, q_BHSN, permute(rank, k_BHSN, {0, 1, 3, 2}));
  scores = mul(rank, mul(rank, scores, 1 / std::sqrt(static_cast<double>(N))), decay_BHSS);
  Tensor o = matmul(rank, scores, v_BHSN);
  Tensor square = add(rank, mean(rank, mul(rank, o, o), -1), c.eps);
  o = div(rank, o, sqrt(rank, square));
  Tensor o_TD = reshape(rank, permute(rank, o, {0, 2, 1, 3}), {B * S, D});
  return linear(rank, mul(rank, o_TD, silu(rank, gate_TD)), w.o_proj);
}

Tensor Retention::mixture(Rank& rank, const Config& c, const Layer& w, Tensor x_TD) const {
  const int64_t T = x_TD.dim[0], E = c.num_experts, F = c.expert_width, k = c.top_k;
  Tensor gate_TE = sigmoid(rank, linear(rank, x_TD, w.router));
  if (k < E) {
    Tensor best = top_k(rank, gate_TE, static_cast<int>(k) + 1).values;
    gate_TE = relu(rank, sub(rank, gate_TE, slice(rank, best, -1, k, k + 1)));
  }
  gate_TE = div(rank, gate_TE, add(rank, sum(rank, gate_TE, -1), c.eps));
  Tensor act = relu(rank, linear(rank, x_TD, w.up));
  act = reshape(rank, mul(rank, act, act), {T, E, F});
  act = mul(rank, act, reshape(rank, gate_TE, {T, E, 1}));
  return linear(rank, reshape(rank, act, {T, E * F}), w.down);
}

// ---- What the engine calls
// -----------------------------------------------------------------------

Tensor Retention::embed(Rank& rank, const Batch& batch) const {
  return pith::embedding(rank, batch.tokens, embedding);
}

MoeInput Retention::attend(Rank& rank, const Config& c, const Layer& w, Tensor x_TD,
    const Batch& batch, const RouterOptions&) const {
  Tensor mixed_TD = retain(rank, c, w, rms_norm(rank, x_TD, w.mixer_norm, c.eps), batch);
  auto [residual_TD, normed_TD] = add_rms_norm(rank, mixed_TD, x_TD, w.mlp_norm, c.eps);
  return {.hidden = normed_TD, .residual = residual_TD, .shared = {}, .routing = {}};
}

Tensor Retention::experts(Rank&, const Config&, const Layer&, const Dispatched&) const {
  failed("retention", "experts() was called for a dense layer");
}

Tensor Retention::finish(
    Rank& rank, const Config& c, const Layer& w, Tensor, const MoeInput& in) const {
  return add(rank, mixture(rank, c, w, in.hidden), in.residual);
}

Tensor Retention::loss(
    Rank& rank, const Config& c, Tensor x_TD, const Batch& batch, double scale) const {
  Tensor h_TD = rms_norm(rank, x_TD, final_norm, c.eps);
  return lm_head_cross_entropy(rank, h_TD, lm_head, batch.labels, scale);
}

Tensor Retention::logits(Rank& rank, const Config& c, Tensor x_TD) const {
  return linear(rank, rms_norm(rank, x_TD, final_norm, c.eps), lm_head);
}

static_assert(Model<Retention>);

}  // namespace pith
