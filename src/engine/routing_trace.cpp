#include "engine/routing_trace.h"

#include <algorithm>

#include "data/array_files.h"

namespace pith {

static string file_of(const string& folder, i64 step, const char* what) {
  return folder + text("/step-%08ld.%s.npy", step, what);
}

void begin_trace(RoutingStep& routing, i64 layers, i64 tokens, i64 top_k) {
  routing = {.layers = layers, .tokens = tokens, .top_k = top_k};
  routing.ids.assign(layers * tokens * top_k, -1);
  routing.weights.resize(routing.ids.size());
  routing.gaps.resize(layers * tokens);
}

void write_routing(const string& folder, i64 step, const RoutingStep& routing) {
  vector<i64> shape = {routing.layers, routing.tokens, routing.top_k};
  make_folders(folder);
  write_npy(file_of(folder, step, "ids"), FileDType::I32, shape, routing.ids.data());
  write_npy(file_of(folder, step, "weights"), FileDType::F32, shape, routing.weights.data());
}

// A token's k ids are distinct experts, or -1 throughout a layer without.
static void check_ids(const string& path, const RoutingStep& r, int num_experts) {
  i64 k = r.top_k, per_layer = r.tokens * k;
  for (i64 i = 0; i < r.layers * per_layer; i++) {
    const int* id = &r.ids[i];
    bool dense = id[-(i % per_layer)] == -1;
    bool expert = *id >= 0 && *id < num_experts && std::find(id - i % k, id, *id) == id;
    if (dense ? *id == -1 : expert) continue;
    bad_input(path,
        text("names a wrong expert for layer %ld, token %ld, slot %ld (got %d, need "
             "distinct ones of 0 to %d)",
            i / per_layer, i % per_layer / k, i % k, *id, num_experts - 1),
        "a trace of the same model");
  }
}

void read_routing(const string& folder, i64 step, int num_experts, RoutingStep& routing) {
  string path = file_of(folder, step, "ids");
  const NpyArray array = read_npy(path);
  vector<i64> need = {routing.layers, routing.tokens, routing.top_k};
  if (array.header.dtype != FileDType::I32 || array.header.shape != need)
    bad_input(path,
        text("is not this run's routing (need <i4 [%ld, %ld, %ld]: layers, tokens, k)", need[0],
            need[1], need[2]),
        "a trace of the same model and global batch");
  routing.ids.resize(array.header.numel());
  memcpy(routing.ids.data(), array.data, array.header.bytes());
  check_ids(path, routing, num_experts);
  routing.forced = true;
}

Tensor forced_ids(Rank& rank, const RoutingSlot& slot, int layer, int micro_batch) {
  const RoutingStep& step = *slot.step;
  vector<int> ids;
  if (!step.forced) return {};
  for (const i64 token : slot.tokens[micro_batch]) {
    const int* first = &step.ids[(layer * step.tokens + token) * step.top_k];
    ids.insert(ids.end(), first, first + step.top_k);
  }
  if (ids.empty() || ids[0] < 0) return {};
  return tensor_from(rank, {i64(ids.size()) / step.top_k, step.top_k}, DType::I32, ids.data());
}

void trace_routing(
    Rank& rank, const RoutingSlot& slot, int layer, int micro_batch, Routing routing) {
  RoutingStep& step = *slot.step;
  if (!routing.ids.defined()) return;
  const vector<i64>& tokens = slot.tokens[micro_batch];
  i64 k = step.top_k, T = i64(tokens.size());
  check(rank, "trace_routing", At::here(), {{"ids of all tokens", routing.ids.numel() == T * k}},
      {&routing.ids});
  i64 E = routing.probs.cols();
  vector<char> bytes[3];
  for (int i = 0; Tensor * t : {&routing.ids, &routing.weights, &routing.probs})
    *t = on_host(rank, *t, bytes[i++]);
  for (i64 t = 0; t < T; t++) {
    const int* ids = routing.ids.i32() + t * k;
    const float* probs = routing.probs.f32() + t * E;
    vector<float> others(probs, probs + E);
    i64 place = layer * step.tokens + tokens[t];
    std::copy_n(ids, k, &step.ids[place * k]);
    std::copy_n(routing.weights.f32() + t * k, k, &step.weights[place * k]);
    float least = 1;
    for (i64 i = 0; i < k; i++) least = min(least, std::exchange(others[ids[i]], 0));
    step.gaps[place] = std::log(least) - std::log(*std::ranges::max_element(others));
  }
}

}
