// cudnn_attention: a graph for each shape and direction, built when first used.

#include "ops/cudnn_attention.h"

#include <list>

#define CUDNN_FRONTEND_SKIP_JSON_LIB
#include <cudnn_frontend.h>

#include "core/cuda.cuh"

namespace pith {

namespace fe = cudnn_frontend;
using fe::DataType_t, fe::graph::Tensor_attributes;

static void check(bool good, const string& got) {
  if (!good) failed("attention", "cuDNN failed (got " + got + ")");
}
static void check(cudnnStatus_t s) { check(s == CUDNN_STATUS_SUCCESS, cudnnGetErrorString(s)); }
static void check(fe::error_t e) { check(e.is_good(), e.get_message()); }

// What cuDNN knows the tensors by; a gradient lies as its tensor, 6 before it.
enum Port : int { kQ = 6, kK, kV, kOut, kLse, kBias, kDq, kDk, kDv, kDout, kPorts };

// [B, heads, S, size] with these steps, `first` heads into its tensor.
struct Place {
  i64 heads, size, first, row, head, position;
};
static Place place_of(const AttentionShape& s, int port) {
  i64 H = s.heads, K = s.kv_heads, N = s.size, S = s.length, width = (H + 2 * K) * N;
  const Place places[] = {{H, N, 0, S * width, N, width}, {K, N, H, S * width, N, width},
      {K, N, H + K, S * width, N, width}, {H, N, 0, S * H * N, N, H * N}, {H, 1, 0, H * S, S, 1},
      {1, S, 0, S * S, S * S, S}};
  return places[port % 6];
}

// The deterministic backward keeps S*S BF16 a head, documents as much a row: where that is large, a
// call computes a part, one row and fewer heads (if lse stays aligned).
static AttentionShape part_of(AttentionShape s, bool backward, bool documents) {
  auto large = [&] {
    i64 squares = s.batch * (backward ? s.heads : i64(documents));
    return squares * s.length * s.length > i64(1) << 29 && s.length % 4 == 0;
  };
  if (large()) s.batch = 1;
  while (large() && s.kv_heads % 2 == 0) {
    s.kv_heads /= 2;
    s.heads /= 2;
  }
  return s;
}

struct AttentionPlan {
  AttentionShape shape, part;
  bool backward, documents;
  fe::graph::Graph graph;
  i64 workspace = 0;

  void lay(Tensor_attributes& t, int port) const {
    // cuDNN wants lse packed: that of fewer heads is of one row.
    const AttentionShape& s = port == kLse || port == kBias ? part : shape;
    const Place x = place_of(s, port);
    t.set_uid(port)
        .set_data_type(port == kLse ? DataType_t::FLOAT : DataType_t::BFLOAT16)
        .set_dim({part.batch, x.heads * part.kv_heads / s.kv_heads, part.length, x.size})
        .set_stride({x.row, x.head, x.position, 1});
  }
  auto input(int port) {
    Tensor_attributes t;
    lay(t, port);
    return graph.tensor(t);
  }
  void outputs(int port, const auto& made) const {
    for (const auto& t : made) lay(t->set_output(true), port++);
  }
  auto masked(auto options) {
    options.set_attn_scale(float(shape.scale));
    options.set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT);
    if (shape.causal) options.set_diagonal_band_right_bound(0);
    if (shape.window) options.set_diagonal_band_left_bound(int(shape.window));
    if (documents) options.set_bias(input(kBias));
    return options;
  }
  AttentionPlan(cudnnHandle_t cudnn, const AttentionShape& s, bool back, bool docs)
      : shape(s), part(part_of(s, back, docs)), backward(back), documents(docs) {
    graph.set_intermediate_data_type(DataType_t::FLOAT).set_compute_data_type(DataType_t::FLOAT);
    auto q = input(kQ), k = input(kK), v = input(kV);
    if (backward) {
      auto options = fe::graph::SDPA_backward_attributes().set_deterministic_algorithm(true);
      outputs(kDq,
          graph.sdpa_backward(q, k, v, input(kOut), input(kDout), input(kLse), masked(options)));
    } else {
      auto options = fe::graph::SDPA_attributes().set_generate_stats(true);
      outputs(kOut, graph.sdpa(q, k, v, masked(options)));
    }
    check(graph.build(cudnn, {fe::HeurMode_t::A}));
    check(graph.get_workspace_size(workspace));
  }
};

struct AttentionPlans {
  cudnnHandle_t cudnn = nullptr;
  std::list<AttentionPlan> list;
  explicit AttentionPlans(cudaStream_t stream) {
    check(cudnnCreate(&cudnn));
    check(cudnnSetStream(cudnn, stream));
  }
  ~AttentionPlans() {
    list.clear();
    cudnnDestroy(cudnn);
  }
};

static void run(Rank& rank, const AttentionShape& s, const AttentionTensors& t, bool backward) {
  auto& plans = cuda_of(rank).attention;
  if (!plans) plans = std::make_shared<AttentionPlans>(cuda_of(rank).stream);
  bool documents = t.doc_ends.defined();
  auto plan = plans->list.begin(), end = plans->list.end();
  while (plan != end &&
         !(plan->shape == s && plan->backward == backward && plan->documents == documents))
    plan++;
  if (plan == end) plan = plans->list.emplace(end, plans->cudnn, s, backward, documents);
  const AttentionShape& part = plan->part;
  Tensor workspace = empty(rank, {plan->workspace}, DType::U8);
  Tensor bias = empty(rank, {documents ? part.batch : 0, s.length, s.length}, DType::BF16);
  const Tensor* tensors[] = {
      &t.qkv, &t.qkv, &t.qkv, &t.out, &t.lse, &bias, &t.dqkv, &t.dqkv, &t.dqkv, &t.dout};
  for (i64 b = 0; b < s.batch; b += part.batch) {
    if (documents) document_bias(rank, t.doc_ends.slice_rows(b, b + part.batch), bias);
    for (i64 k = 0; k < s.kv_heads; k += part.kv_heads) {
      std::unordered_map<i64, void*> data;
      for (int port = kQ; port < kPorts; port++) {
        const Tensor& x = *tensors[port - kQ];
        const Place at = place_of(s, port);
        i64 first = b * at.row + (at.first + at.heads / s.kv_heads * k) * at.head;
        data[port] = x.data + (port == kBias ? 0 : first * size_of(x.dtype));
      }
      check(plan->graph.execute(plans->cudnn, data, workspace.data));
    }
  }
}

// A window without causality is wrong in cuDNN 9.14, and a length of 1 has no backward.
bool cudnn_attention_fits(const AttentionShape& s, bool documents) {
  return s.batch > 0 && s.length > 1 && s.size % 8 == 0 && s.size <= 128 &&
         (s.causal || !s.window) && (!documents || s.length % 128 == 0);
}

void cudnn_attention_forward(Rank& rank, const AttentionShape& s, const AttentionTensors& t) {
  run(rank, s, t, false);
}
void cudnn_attention_backward(Rank& rank, const AttentionShape& s, const AttentionTensors& t) {
  run(rank, s, t, true);
}

}
