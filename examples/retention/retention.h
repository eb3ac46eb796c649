// retention: a small model that no release has, written with the ops of ops.h alone: an example of
// adding an architecture without writing a kernel.
//
// Token mixer: multi-scale retention with a learned decay (Sun et al. 2023, arXiv:2307.08621).
// Dense MLP: a mixture of squared-ReLU experts (So et al. 2021, arXiv:2109.08668) whose sigmoid
// router weighs a token's top k experts by how far they score above the best one left out, so that
// a weight reaches zero before another expert takes its place. All experts run on all tokens: to
// the engine the layers are dense.
#pragma once
#include "models/model.h"

namespace pith {

// Letters as in ops.h; N = D / H.
struct Retention {
  struct Config {
    int64_t hidden = 0, expert_width = 0, vocab = 0;
    int num_layers = 0, num_experts = 0, top_k = 0, heads = 0;
    double eps = 1e-6;
  };
  struct Layer {
    Tensor mixer_norm;  // [D]
    Tensor qkvg;        // [4D, D]: query | key | value | gate
    Tensor decay;       // [H]
    Tensor o_proj;      // [D, D]
    Tensor mlp_norm;    // [D]
    Tensor router;      // [E, D]
    Tensor up;          // [E*F, D]
    Tensor down;        // [D, E*F]
  };

  Tensor embedding;  // [V, D]
  std::vector<Layer> layers;
  Tensor final_norm;   // [D]
  Tensor lm_head;      // [V, D]
  Tensor distance_SS;  // max(0, query - key)
  Tensor rate_H11;     // 2^-h: each head forgets half as fast as the one before

  static Config read_config(const Json& json);
  static ModelShape shape(const Config& c);
  ParameterTable parameters(const Config& c, const StagePart& part, double init_std);
  void prepare(Rank& rank, const Config& c, int64_t length);

  Tensor embed(Rank& rank, const Batch& batch) const;
  MoeInput attend(Rank& rank, const Config& c, const Layer& w, Tensor x_TD, const Batch& batch,
      const RouterOptions& routing) const;
  // Throws: a dense layer sends no tokens to experts.
  Tensor experts(Rank& rank, const Config& c, const Layer& w, const Dispatched& d) const;
  // combined is not read.
  Tensor finish(
      Rank& rank, const Config& c, const Layer& w, Tensor combined, const MoeInput& in) const;
  Tensor loss(Rank& rank, const Config& c, Tensor x_TD, const Batch& batch, double scale) const;
  Tensor logits(Rank& rank, const Config& c, Tensor x_TD) const;

  // The two halves of a layer.
  Tensor retain(Rank& rank, const Config& c, const Layer& w, Tensor x_TD, const Batch& batch) const;
  Tensor mixture(Rank& rank, const Config& c, const Layer& w, Tensor x_TD) const;
};

}  // namespace pith
