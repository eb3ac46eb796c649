// qwen3_moe: Qwen3-MoE (Qwen3-30B-A3B and kin).  Yang et al. 2025, arXiv:2505.09388; matches
// Qwen3MoeForCausalLM of Hugging Face transformers.
#pragma once
#include "models/model.h"

namespace pith {

struct Qwen3Moe {
  struct Config {
    i64 hidden = 0, expert_width = 0, vocab = 0, max_positions = 0;
    int num_layers = 0, num_experts = 0, top_k = 0;
    Heads heads;
    bool norm_topk_prob = false;
    double rms_eps = 1e-6, rope_theta = 1e4;
  };
  struct Layer {
    Tensor attn_norm;       // [D]
    Tensor qkv;             // [(H+2K)*N, D]: q_proj | k_proj | v_proj
    Tensor q_norm, k_norm;  // [N]
    Tensor o_proj;          // [D, H*N]
    Tensor moe_norm;        // [D]
    Tensor router;          // [E, D]
    Tensor gate_up;         // [e, 2F, D]: gate_proj | up_proj of each local expert
    Tensor down;            // [e, D, F]
  };

  Tensor embedding;  // [V, D]
  vector<Layer> layers;
  Tensor final_norm;  // [D]
  Tensor lm_head;     // [V, D]
  Rope rope;

  static Config read_config(const Json& json);
  static ModelShape shape(const Config& c);
  ParameterTable parameters(const Config& c, const StagePart& part, double init_std);
  void prepare(Rank& rank, const Config& c, i64 length);

  Tensor embed(Rank& rank, const Batch& batch) const;
  MoeInput attend(Rank& rank, const Config& c, const Layer& w, Tensor x_TD, const Batch& batch,
      const RouterOptions& routing) const;
  Tensor experts(Rank& rank, const Config& c, const Layer& w, const Dispatched& d) const;
  Tensor finish(
      Rank& rank, const Config& c, const Layer& w, Tensor combined_TD, const MoeInput& in) const;
  Tensor loss(Rank& rank, const Config& c, Tensor x_TD, const Batch& batch, double scale) const;
  Tensor logits(Rank& rank, const Config& c, Tensor x_TD) const;
};

}
