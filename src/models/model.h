#pragma once
#include <concepts>

#include "core/json.h"
#include "ops/ops.h"

namespace pith {

enum class InitKind : u8 { Normal, Constant };
struct Init {
  InitKind kind = InitKind::Constant;
  double value = 0;  // the constant, or the standard deviation
};

// Tensors that are gathered, reduced and updated together.
enum class UnitKind : u8 { Embedding, Layer, Experts, Head };

// Of a Hugging Face checkpoint.
struct Piece {
  string name;
  Dims dims;
  Init init;
  bool muon = false;  // a matrix that Muon orthogonalises
};

// Pieces one after another in memory, so that weights that share an input are one product.
struct Parameter {
  Tensor* target = nullptr;  // bound by the engine
  Dims dims;
  UnitKind unit = UnitKind::Layer;
  int layer = -1;        // -1: outside the layers
  vector<Piece> pieces;  // sizes sum to dims.numel()
};
using ParameterTable = vector<Parameter>;

struct StagePart {
  int first_layer = 0, num_layers = 0;
  bool embedding = true, head = true;
  int first_expert = 0, num_experts = 0;
};

// One micro-batch as a rank sees it: T = rows * length tokens.
struct Batch {
  i64 rows = 0, length = 0;
  Tensor tokens, labels;  // I32 [T]; a label may be kIgnoreLabel
  Tensor positions;       // I32 [T]: within the document under a document mask
  AttentionMask mask;
};

// What stage 1 hands on, each [T, D].
struct MoeInput {
  Tensor hidden;  // the rows to dispatch
  Tensor residual;
  Tensor shared;    // of shared experts, if any
  Routing routing;  // ids undefined in a dense layer, which has no stages 2 and 4
};

struct ModelShape {
  string model_type;
  i64 hidden = 0, vocab = 0;
  int num_layers = 0, num_experts = 0, top_k = 0;
  i64 attention_width = 0;  // H * (sizes of a query and of a value head)
  i64 max_positions = 0;    // 0: unbounded
};

// A model M is the weights of one pipeline stage, with a vector<M::Layer> `layers`, and these
// functions. Between stages 1, 3 and 5 of a layer the engine dispatches and combines.
template <class M>
concept Model = requires(Rank& rank, const Json& json, const typename M::Config& config, M& model,
    const M& stage, const StagePart& part, const typename M::Layer& layer, Tensor x,
    const Batch& batch, const RouterOptions& routing, const MoeInput& in, const Dispatched& d,
    double scale) {
  // Refuses by name what it does not implement.
  { M::read_config(json) } -> std::same_as<typename M::Config>;
  { M::shape(config) } -> std::same_as<ModelShape>;
  // Sizes model.layers; scale: model.init_std.
  { model.parameters(config, part, scale) } -> std::same_as<ParameterTable>;
  { model.prepare(rank, config, i64{}) } -> std::same_as<void>;  // for a sequence length
  { stage.embed(rank, batch) } -> std::same_as<Tensor>;          // [T, D]
  { stage.attend(rank, config, layer, x, batch, routing) } -> std::same_as<MoeInput>;  // 1
  { stage.experts(rank, config, layer, d) } -> std::same_as<Tensor>;                   // 3: [R, D]
  { stage.finish(rank, config, layer, x, in) } -> std::same_as<Tensor>;                // 5: [T, D]
  { stage.loss(rank, config, x, batch, scale) } -> std::same_as<Tensor>;               // [1], a sum
  { stage.logits(rank, config, x) } -> std::same_as<Tensor>;                           // [T, V]
};

}
