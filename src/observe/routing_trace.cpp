#include "observe/routing_trace.h"

#include <algorithm>
#include <cstring>

#include "core/check.h"
#include "data/npy.h"

namespace pith {

static std::string file_of(const std::string& folder, int64_t step, const char* what) {
    return folder + text("/step-%08lld.%s.npy", static_cast<long long>(step), what);
}

void begin_trace(RoutingStep& routing, int64_t layers, int64_t tokens, int64_t top_k) {
    routing = {layers, tokens, top_k};
    routing.ids.assign(static_cast<size_t>(layers * tokens * top_k), -1);
    routing.weights.assign(routing.ids.size(), 0);
    routing.gaps.assign(static_cast<size_t>(layers * tokens), 0);
    routing.traced = true;
}

void write_routing(const std::string& folder, int64_t step, const RoutingStep& routing) {
    const std::vector<int64_t> shape = {routing.layers, routing.tokens, routing.top_k};
    const size_t pairs = static_cast<size_t>(shape[0] * shape[1] * shape[2]);
    if (routing.ids.size() != pairs || routing.weights.size() != pairs)
        failed("write_routing", text("need ids and weights [layers, tokens, k] (got %zu and %zu "
                                     "values, need %zu)",
                                     routing.ids.size(), routing.weights.size(), pairs));
    make_folders(folder);
    write_npy(file_of(folder, step, "ids"), NpyType::I4, shape, routing.ids.data());
    write_npy(file_of(folder, step, "weights"), NpyType::F4, shape, routing.weights.data());
}

static std::string shape_text(const std::vector<int64_t>& shape) {
    std::string out;
    for (const int64_t n : shape) out += (out.empty() ? "[" : ", ") + std::to_string(n);
    return out.empty() ? "[]" : out + "]";
}

// Each token's k ids are distinct experts, or all -1 throughout a layer without experts.
static void check_ids(const std::string& path, const RoutingStep& r, int num_experts) {
    const int64_t k = r.top_k, per_layer = r.tokens * k;
    for (int64_t i = 0; i < r.layers * per_layer; i++) {
        const int32_t* slot = &r.ids[static_cast<size_t>(i)];
        const int32_t id = *slot, *first = slot - i % k;
        const bool dense = *(slot - i % per_layer) == -1;
        const bool known = dense ? id == -1 : id >= 0 && id < num_experts;
        const bool twice = !dense && std::find(first, slot, id) != slot;
        if (known && !twice) continue;
        bad_input(path,
                  text("layer %lld, token %lld, slot %lld %s (got expert %d, need one of 0 to %d)",
                       static_cast<long long>(i / per_layer),
                       static_cast<long long>(i % per_layer / k), static_cast<long long>(i % k),
                       known ? "names an expert twice" : "names no expert of this model", id,
                       num_experts - 1),
                  "a trace of the same model");
    }
}

void read_routing(const std::string& folder, int64_t step, int num_experts, RoutingStep& routing) {
    const std::string path = file_of(folder, step, "ids");
    const NpyArray array = read_npy(path);
    const std::vector<int64_t> need = {routing.layers, routing.tokens, routing.top_k};
    if (array.header.type != NpyType::I4 || array.header.shape != need)
        bad_input(path,
                  "is not this run's routing (got " + std::string(name_of(array.header.type)) +
                      " " + shape_text(array.header.shape) + ", need <i4 " + shape_text(need) +
                      ": layers, tokens a step, experts a token)",
                  "a trace of the same model and global batch");
    routing.ids.resize(static_cast<size_t>(array.header.numel()));
    memcpy(routing.ids.data(), array.data, routing.ids.size() * sizeof(int32_t));
    check_ids(path, routing, num_experts);
    routing.forced = true;
}

}  // namespace pith
