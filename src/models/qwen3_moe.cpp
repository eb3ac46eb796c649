#include "models/qwen3_moe.h"

#include <cmath>

namespace pith {

// ---- Configuration ----------------------------------------------------------------------------

// Fields that do not change the mathematics of training.
static const char* const kIgnoredFields[] = {"architectures",
                                             "attention_dropout",
                                             "bos_token_id",
                                             "decoder_sparse_step",
                                             "dtype",
                                             "eos_token_id",
                                             "hidden_act",
                                             "initializer_range",
                                             "intermediate_size",
                                             "layer_types",
                                             "max_window_layers",
                                             "mlp_only_layers",
                                             "output_router_logits",
                                             "pad_token_id",
                                             "quantization_config",
                                             "rope_scaling",
                                             "router_aux_loss_coef",
                                             "sliding_window",
                                             "tie_word_embeddings",
                                             "torch_dtype",
                                             "transformers_version",
                                             "use_cache",
                                             "use_sliding_window",
                                             "attention_bias",
                                             "partial_rotary_factor",
                                             "rope_parameters"};
static const char* const kReadFields[] = {"head_dim",
                                          "hidden_size",
                                          "max_position_embeddings",
                                          "model_type",
                                          "moe_intermediate_size",
                                          "norm_topk_prob",
                                          "num_attention_heads",
                                          "num_experts",
                                          "num_experts_per_tok",
                                          "num_hidden_layers",
                                          "num_key_value_heads",
                                          "num_local_experts",
                                          "rms_norm_eps",
                                          "rope_theta",
                                          "vocab_size"};

[[noreturn]] static void refuse(const Json& json, const string& field, const char* need) {
  bad_input(
      json.place() + ": " + field,
      text("is not implemented for qwen3_moe (got %s, need %s)", json[field].dump().c_str(), need),
      "a model without it; see docs/models.md for what is implemented");
}

// Refuses by name each field whose value would change the mathematics.
static void refuse_unimplemented(const Json& j) {
  for (const string& key : j.keys()) {
    bool known = key[0] == '_';
    for (const char* k : kIgnoredFields) known |= key == k;
    for (const char* k : kReadFields) known |= key == k;
    if (!known)
      bad_input(j.place() + ": " + key, "unknown field of a qwen3_moe config.json",
                "removing it, if it does not change the model's mathematics");
  }
  if (j.bool_or("tie_word_embeddings", false)) refuse(j, "tie_word_embeddings", "false");
  if (j.bool_or("attention_bias", false)) refuse(j, "attention_bias", "false");
  if (j.bool_or("use_sliding_window", false)) refuse(j, "use_sliding_window", "false");
  if (j.int_or("decoder_sparse_step", 1) != 1) refuse(j, "decoder_sparse_step", "1");
  if (j.double_or("attention_dropout", 0) != 0) refuse(j, "attention_dropout", "0");
  if (j.double_or("partial_rotary_factor", 1) != 1) refuse(j, "partial_rotary_factor", "1");
  if (j.string_or("hidden_act", "silu") != "silu") refuse(j, "hidden_act", "\"silu\"");
  if (j.has("quantization_config") && !j["quantization_config"].is_null())
    refuse(j, "quantization_config", "none");
  if (j.has("mlp_only_layers") && !j["mlp_only_layers"].is_null() &&
      j["mlp_only_layers"].size() > 0)
    refuse(j, "mlp_only_layers", "[]");
  if (j.has("layer_types") && !j["layer_types"].is_null())
    for (int64_t i = 0; i < j["layer_types"].size(); i++)
      if (j["layer_types"][i].as_string() != "full_attention")
        refuse(j, "layer_types", "\"full_attention\" throughout");
}

// transformers 5 writes rope_parameters {rope_theta, rope_type}; earlier ones rope_theta beside
// rope_scaling {rope_type | type}.
static double read_rope_theta(const Json& j) {
  double theta = j.double_or("rope_theta", 0);
  for (const char* field : {"rope_scaling", "rope_parameters"}) {
    if (!j.has(field) || j[field].is_null()) continue;
    const Json rope = j[field];
    const string type = rope.string_or("rope_type", rope.string_or("type", "default"));
    if (type != "default" || rope.double_or("partial_rotary_factor", 1) != 1)
      refuse(j, field, "rope_type \"default\"");
    theta = rope.double_or("rope_theta", theta);
  }
  return theta ? theta : 10000.0;
}

Qwen3Moe::Config Qwen3Moe::read_config(const Json& j) {
  refuse_unimplemented(j);
  const int64_t many = 1 << 30;
  Config c;
  c.hidden = j["hidden_size"].as_int(1, many);
  c.expert_width = j["moe_intermediate_size"].as_int(1, many);
  c.vocab = j["vocab_size"].as_int(1, many);
  c.max_positions = j.int_or("max_position_embeddings", 0);
  c.num_layers = int(j["num_hidden_layers"].as_int(1, 100000));
  // Published files say num_experts, transformers 5 writes num_local_experts.
  const char* experts = j.has("num_local_experts") ? "num_local_experts" : "num_experts";
  c.num_experts = int(j[experts].as_int(1, 100000));
  c.top_k = int(j["num_experts_per_tok"].as_int(1, c.num_experts));
  c.heads.query = int(j["num_attention_heads"].as_int(1, 100000));
  c.heads.kv = int(j["num_key_value_heads"].as_int(1, c.heads.query));
  c.heads.size = int(j.int_or("head_dim", c.hidden / c.heads.query));
  c.norm_topk_prob = j.bool_or("norm_topk_prob", false);
  c.rms_eps = j.double_or("rms_norm_eps", 1e-6);
  c.rope_theta = read_rope_theta(j);
  if (c.heads.query % c.heads.kv != 0)
    bad_input(j.place(),
              text("num_attention_heads must be a multiple of num_key_value_heads (got %d and "
                   "%d)",
                   c.heads.query, c.heads.kv),
              "head counts that divide");
  if (c.heads.size < 2 || c.heads.size % 2 != 0)
    bad_input(j.place(), text("head_dim must be even (got %d)", c.heads.size), "an even head_dim");
  return c;
}

ModelShape Qwen3Moe::shape(const Config& c) {
  return {.model_type = "qwen3_moe",
          .hidden = c.hidden,
          .vocab = c.vocab,
          .num_layers = c.num_layers,
          .num_experts = c.num_experts,
          .top_k = c.top_k,
          .attention_width = int64_t{2} * c.heads.query * c.heads.size,
          .max_positions = c.max_positions};
}

// ---- Parameters -------------------------------------------------------------------------------

ParameterTable Qwen3Moe::parameters(const Config& c, const StagePart& part, double init_std) {
  const int64_t D = c.hidden, F = c.expert_width, V = c.vocab, N = c.heads.size;
  const int64_t q = c.heads.query * N, kv = c.heads.kv * N;
  const Init ones{InitKind::Constant, 1.0}, normal{InitKind::Normal, init_std};
  // Projections that write to the residual stream begin smaller, by 1/sqrt(2 * layers).
  const Init output{InitKind::Normal, init_std / std::sqrt(2.0 * c.num_layers)};
  ParameterTable table;
  layers.assign(part.num_layers, {});
  if (part.embedding)
    table.push_back({&embedding,
                     {V, D},
                     UnitKind::Embedding,
                     -1,
                     {{"model.embed_tokens.weight", {V, D}, normal}}});
  for (int i = 0; i < part.num_layers; i++) {
    const int l = part.first_layer + i;
    const string layer = text("model.layers.%d.", l), attn = layer + "self_attn.";
    const UnitKind unit = UnitKind::Layer;
    Layer& w = layers[i];
    table.push_back({&w.attn_norm, {D}, unit, l, {{layer + "input_layernorm.weight", {D}, ones}}});
    table.push_back({&w.qkv,
                     {q + 2 * kv, D},
                     unit,
                     l,
                     {{attn + "q_proj.weight", {q, D}, normal, true},
                      {attn + "k_proj.weight", {kv, D}, normal, true},
                      {attn + "v_proj.weight", {kv, D}, normal, true}}});
    table.push_back({&w.q_norm, {N}, unit, l, {{attn + "q_norm.weight", {N}, ones}}});
    table.push_back({&w.k_norm, {N}, unit, l, {{attn + "k_norm.weight", {N}, ones}}});
    table.push_back({&w.o_proj, {D, q}, unit, l, {{attn + "o_proj.weight", {D, q}, output, true}}});
    table.push_back(
        {&w.moe_norm, {D}, unit, l, {{layer + "post_attention_layernorm.weight", {D}, ones}}});
    table.push_back({&w.router,
                     {c.num_experts, D},
                     unit,
                     l,
                     {{layer + "mlp.gate.weight", {c.num_experts, D}, normal}}});
    Parameter gate_up{&w.gate_up, {part.num_experts, 2 * F, D}, UnitKind::Experts, l, {}};
    Parameter down{&w.down, {part.num_experts, D, F}, UnitKind::Experts, l, {}};
    for (int e = part.first_expert; e < part.first_expert + part.num_experts; e++) {
      const string expert = text("%smlp.experts.%d.", layer.c_str(), e);
      gate_up.pieces.push_back({expert + "gate_proj.weight", {F, D}, normal, true});
      gate_up.pieces.push_back({expert + "up_proj.weight", {F, D}, normal, true});
      down.pieces.push_back({expert + "down_proj.weight", {D, F}, output, true});
    }
    table.push_back(std::move(gate_up));
    table.push_back(std::move(down));
  }
  if (part.head) {
    table.push_back({&final_norm, {D}, UnitKind::Head, -1, {{"model.norm.weight", {D}, ones}}});
    table.push_back({&lm_head, {V, D}, UnitKind::Head, -1, {{"lm_head.weight", {V, D}, normal}}});
  }
  return table;
}

void Qwen3Moe::prepare(Rank& rank, const Config& c, int64_t length) {
  rope = rope_tables(rank, length, c.heads.size, c.rope_theta);
}

// ---- Forward ----------------------------------------------------------------------------------

Tensor Qwen3Moe::embed(Rank& rank, const Batch& batch) const {
  return pith::embedding(rank, batch.tokens, embedding);
}

MoeInput Qwen3Moe::attend(Rank& rank, const Config& c, const Layer& w, Tensor x_TD,
                          const Batch& batch, const RouterOptions& routing) const {
  Tensor h_TD = rms_norm(rank, x_TD, w.attn_norm, c.rms_eps);
  Tensor qkv = linear(rank, h_TD, w.qkv);
  qkv = qk_norm_rope(rank, qkv, c.heads, w.q_norm, w.k_norm, c.rms_eps, rope, batch.positions);
  Tensor o_THN = attention(rank, qkv, c.heads, batch.rows, batch.mask);
  Tensor a_TD = linear(rank, o_THN, w.o_proj);
  auto [residual_TD, normed_TD] = add_rms_norm(rank, a_TD, x_TD, w.moe_norm, c.rms_eps);
  RouterOptions options = routing;
  options.top_k = c.top_k;
  options.normalize = c.norm_topk_prob;
  Routing chosen = router(rank, normed_TD, w.router, options);
  return {.hidden = normed_TD, .residual = residual_TD, .shared = {}, .routing = chosen};
}

Tensor Qwen3Moe::experts(Rank& rank, const Config&, const Layer& w, const Dispatched& d) const {
  Tensor x_PD = expand_rows(rank, d);
  Tensor gate_up = grouped_linear(rank, x_PD, w.gate_up, d.offsets);
  Tensor act_PF = swiglu(rank, gate_up, d.weights);
  Tensor y_PD = grouped_linear(rank, act_PF, w.down, d.offsets);
  return reduce_pairs(rank, y_PD, d);
}

Tensor Qwen3Moe::finish(Rank& rank, const Config&, const Layer&, Tensor combined_TD,
                        const MoeInput& in) const {
  return add(rank, combined_TD, in.residual);
}

Tensor Qwen3Moe::loss(Rank& rank, const Config& c, Tensor x_TD, const Batch& batch,
                      double scale) const {
  Tensor h_TD = rms_norm(rank, x_TD, final_norm, c.rms_eps);
  return lm_head_cross_entropy(rank, h_TD, lm_head, batch.labels, scale);
}

Tensor Qwen3Moe::logits(Rank& rank, const Config& c, Tensor x_TD) const {
  return linear(rank, rms_norm(rank, x_TD, final_norm, c.rms_eps), lm_head);
}

static_assert(Model<Qwen3Moe>);

}  // namespace pith
