#include "models/qwen3_moe.h"

namespace pith {

// Fields that read_config takes, and those without effect on training.
static constexpr string_view kTaken =
    " architectures bos_token_id dtype eos_token_id head_dim hidden_size initializer_range "
    "intermediate_size layer_types max_position_embeddings max_window_layers model_type "
    "moe_intermediate_size norm_topk_prob num_attention_heads num_experts num_experts_per_tok "
    "num_hidden_layers num_key_value_heads num_local_experts output_router_logits pad_token_id "
    "rms_norm_eps rope_parameters rope_scaling rope_theta router_aux_loss_coef sliding_window "
    "torch_dtype transformers_version use_cache vocab_size ";

// Fields with one value (or null) that is implemented.
struct Fixed {
  const char *field, *value;
};
static constexpr Fixed kFixed[] = {{"attention_bias", "false"}, {"attention_dropout", "0"},
    {"decoder_sparse_step", "1"}, {"hidden_act", "\"silu\""}, {"mlp_only_layers", "[]"},
    {"partial_rotary_factor", "1"}, {"quantization_config", "null"},
    {"tie_word_embeddings", "false"}, {"use_sliding_window", "false"}};

[[noreturn]] static void refuse(const Json& json, const string& field, const char* need) {
  bad_input(json.place() + ": " + field,
      text("is not implemented for qwen3_moe (got %s, need %s)", json[field].dump().c_str(), need),
      "a model without it; see docs/models.md for what is implemented");
}

static void refuse_unimplemented(const Json& j) {
  for (const string& key : j.keys()) {
    bool known = key[0] == '_' || kTaken.find(" " + key + " ") != string_view::npos;
    for (const Fixed& f : kFixed) {
      if (key != f.field) continue;
      known = true;
      string got = j[key].dump(), need = f.value;
      if (got != "null" && got != need && got != need + ".0") refuse(j, key, f.value);
    }
    if (!known)
      bad_input(j.place() + ": " + key, "unknown field of a qwen3_moe config.json",
          "removing it, if it does not change the model's mathematics");
  }
  Json layers = j.has("layer_types") ? j["layer_types"] : Json{};
  for (i64 i = 0; !layers.is_null() && i < layers.size(); i++)
    if (layers[i].as_string() != "full_attention")
      refuse(j, "layer_types", "\"full_attention\" throughout");
}

// transformers 5 writes rope_parameters {rope_theta, rope_type}, older ones rope_theta and
// rope_scaling {rope_type | type}.
static double read_rope_theta(const Json& j) {
  double theta = j.double_or("rope_theta", 10000);
  for (const char* field : {"rope_scaling", "rope_parameters"}) {
    if (!j.has(field) || j[field].is_null()) continue;
    Json rope = j[field];
    string type = rope.string_or("rope_type", rope.string_or("type", "default"));
    if (type != "default" || rope.double_or("partial_rotary_factor", 1) != 1)
      refuse(j, field, "rope_type \"default\"");
    theta = rope.double_or("rope_theta", theta);
  }
  return theta;
}

Qwen3Moe::Config Qwen3Moe::read_config(const Json& j) {
  refuse_unimplemented(j);
  auto size = [&](const char* key, int most = 1 << 30) { return int(j[key].as_int(1, most)); };
  Config c;
  c.hidden = size("hidden_size");
  c.expert_width = size("moe_intermediate_size");
  c.vocab = size("vocab_size");
  c.max_positions = j.int_or("max_position_embeddings", 0);
  c.num_layers = size("num_hidden_layers");
  // Published files say num_experts, transformers 5 writes num_local_experts.
  c.num_experts = size(j.has("num_local_experts") ? "num_local_experts" : "num_experts");
  c.top_k = size("num_experts_per_tok", c.num_experts);
  c.heads.query = size("num_attention_heads", 1 << 15);
  c.heads.kv = size("num_key_value_heads", c.heads.query);
  c.heads.size = int(j.int_or("head_dim", c.hidden / c.heads.query));
  c.norm_topk_prob = j.bool_or("norm_topk_prob", false);
  c.rms_eps = j.double_or("rms_norm_eps", 1e-6);
  c.rope_theta = read_rope_theta(j);
  if (c.heads.query % c.heads.kv != 0 || c.heads.size < 2 || c.heads.size % 2 != 0)
    bad_input(j.place(),
        text("got num_attention_heads %d, num_key_value_heads %d, head_dim %d", c.heads.query,
            c.heads.kv, c.heads.size),
        "head counts that divide and an even head_dim");
  return c;
}

ModelShape Qwen3Moe::shape(const Config& c) {
  i64 attention_width = i64{2} * c.heads.query * c.heads.size;
  return {"qwen3_moe", c.hidden, c.vocab, c.num_layers, c.num_experts, c.top_k, attention_width,
      c.max_positions};
}

ParameterTable Qwen3Moe::parameters(const Config& c, const StagePart& part, double init_std) {
  i64 D = c.hidden, F = c.expert_width, V = c.vocab, N = c.heads.size;
  i64 q = c.heads.query * N, kv = c.heads.kv * N, E = c.num_experts;
  const Init ones{InitKind::Constant, 1.0}, normal{InitKind::Normal, init_std};
  // Projections to the residual stream begin smaller.
  const Init output{InitKind::Normal, init_std / std::sqrt(2.0 * c.num_layers)};
  ParameterTable table;
  UnitKind unit = UnitKind::Embedding;
  int layer = -1;
  auto add = [&](Tensor& target, Dims dims, vector<Piece> pieces) {
    table.push_back({&target, dims, unit, layer, std::move(pieces)});
  };
  auto one = [&](Tensor& target, const string& name, Dims dims, Init init, bool muon = false) {
    add(target, dims, {{name + ".weight", dims, init, muon}});
  };
  layers.assign(part.num_layers, {});
  if (part.embedding) one(embedding, "model.embed_tokens", {V, D}, normal);
  for (int i = 0; i < part.num_layers; i++) {
    layer = part.first_layer + i;
    unit = UnitKind::Layer;
    string l = text("model.layers.%d.", layer), attn = l + "self_attn.";
    Layer& w = layers[i];
    one(w.attn_norm, l + "input_layernorm", {D}, ones);
    add(w.qkv, {q + 2 * kv, D},
        {{attn + "q_proj.weight", {q, D}, normal, true},
            {attn + "k_proj.weight", {kv, D}, normal, true},
            {attn + "v_proj.weight", {kv, D}, normal, true}});
    one(w.q_norm, attn + "q_norm", {N}, ones);
    one(w.k_norm, attn + "k_norm", {N}, ones);
    one(w.o_proj, attn + "o_proj", {D, q}, output, true);
    one(w.moe_norm, l + "post_attention_layernorm", {D}, ones);
    one(w.router, l + "mlp.gate", {E, D}, normal);
    vector<Piece> gate_up, down;
    for (int e = part.first_expert; e < part.first_expert + part.num_experts; e++) {
      string expert = text("%smlp.experts.%d.", l.c_str(), e);
      gate_up.push_back({expert + "gate_proj.weight", {F, D}, normal, true});
      gate_up.push_back({expert + "up_proj.weight", {F, D}, normal, true});
      down.push_back({expert + "down_proj.weight", {D, F}, output, true});
    }
    unit = UnitKind::Experts;
    add(w.gate_up, {part.num_experts, 2 * F, D}, std::move(gate_up));
    add(w.down, {part.num_experts, D, F}, std::move(down));
  }
  layer = -1;
  unit = UnitKind::Head;
  if (part.head) {
    one(final_norm, "model.norm", {D}, ones);
    one(lm_head, "lm_head", {V, D}, normal);
  }
  return table;
}

void Qwen3Moe::prepare(Rank& rank, const Config& c, i64 length) {
  rope = rope_tables(rank, length, c.heads.size, c.rope_theta);
}

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
  Tensor gate_up = expand_linear(rank, d, w.gate_up);
  Tensor act_PF = swiglu(rank, gate_up, d.weights);
  return linear_reduce(rank, act_PF, w.down, d);
}

Tensor Qwen3Moe::finish(
    Rank& rank, const Config&, const Layer&, Tensor combined_TD, const MoeInput& in) const {
  return add(rank, combined_TD, in.residual);
}

Tensor Qwen3Moe::loss(
    Rank& rank, const Config& c, Tensor x_TD, const Batch& batch, double scale) const {
  Tensor h_TD = rms_norm(rank, x_TD, final_norm, c.rms_eps);
  return lm_head_cross_entropy(rank, h_TD, lm_head, batch.labels, scale);
}

Tensor Qwen3Moe::logits(Rank& rank, const Config& c, Tensor x_TD) const {
  return linear(rank, rms_norm(rank, x_TD, final_norm, c.rms_eps), lm_head);
}

static_assert(Model<Qwen3Moe>);

}
