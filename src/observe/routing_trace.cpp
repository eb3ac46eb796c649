#include "observe/routing_trace.h"

#include <algorithm>
#include <cstring>

#include "core/check.h"
#include "data/npy.h"

namespace pith {

static string file_of(const string& folder, int64_t step, const char* what) {
  return folder + text("/step-%08ld.%s.npy", step, what);
}

void begin_trace(RoutingStep& routing, int64_t layers, int64_t tokens, int64_t top_k) {
  routing = {layers, tokens, top_k};
  routing.ids.assign(size_t(layers * tokens * top_k), -1);
  routing.weights.assign(routing.ids.size(), 0);
  routing.gaps.assign(size_t(layers * tokens), 0);
  routing.traced = true;
}

void write_routing(const string& folder, int64_t step, const RoutingStep& routing) {
  const vector<int64_t> shape = {routing.layers, routing.tokens, routing.top_k};
  make_folders(folder);
  write_npy(file_of(folder, step, "ids"), NpyType::I4, shape, routing.ids.data());
  write_npy(file_of(folder, step, "weights"), NpyType::F4, shape, routing.weights.data());
}

// Each token's k ids are distinct experts, or all -1 throughout a layer without experts.
static void check_ids(const string& path, const RoutingStep& r, int num_experts) {
  const int64_t k = r.top_k, per_layer = r.tokens * k;
  for (int64_t i = 0; i < r.layers * per_layer; i++) {
    const int32_t* slot = &r.ids[size_t(i)];
    const bool dense = *(slot - i % per_layer) == -1;
    const bool known = dense ? *slot == -1 : *slot >= 0 && *slot < num_experts;
    if (known && (dense || std::find(slot - i % k, slot, *slot) == slot)) continue;
    bad_input(path,
              text("names a wrong expert for layer %ld, token %ld, slot %ld (got %d, need "
                   "distinct ones of 0 to %d)",
                   i / per_layer, i % per_layer / k, i % k, *slot, num_experts - 1),
              "a trace of the same model");
  }
}

void read_routing(const string& folder, int64_t step, int num_experts, RoutingStep& routing) {
  const string path = file_of(folder, step, "ids");
  const NpyArray array = read_npy(path);
  const vector<int64_t> need = {routing.layers, routing.tokens, routing.top_k};
  if (array.header.type != NpyType::I4 || array.header.shape != need)
    bad_input(path,
              text("is not this run's routing (need <i4 [%ld, %ld, %ld]: layers, tokens a "
                   "step, experts a token)",
                   need[0], need[1], need[2]),
              "a trace of the same model and global batch");
  routing.ids.resize(size_t(array.header.numel()));
  memcpy(routing.ids.data(), array.data, routing.ids.size() * sizeof(int32_t));
  check_ids(path, routing, num_experts);
  routing.forced = true;
}

}  // namespace pith
