// parameters: where a rank's weights, gradients and optimiser state live.
//
// Tensors of one unit (the embedding, a layer's experts, the rest of a layer, the head) lie in one
// flat buffer, each at a multiple of 128 elements. The buffer is cut over the unit's shard group at
// multiples of 128 elements, anywhere in a tensor; a rank's shard may be empty. In a group of one
// with F32 compute, full weights and the master are the same memory.
#pragma once
#include "comm/mesh.h"
#include "models/model.h"

namespace pith {

struct FlatUnit {
  UnitKind kind = UnitKind::Layer;
  int layer = -1, chunk = 0;
  vector<int> entries;      // indices into Parameters::table
  vector<int64_t> offsets;  // of each entry, in elements
  int64_t numel = 0;        // padded to 128
  Group group = Group::DenseShard;
  vector<int64_t> cuts;  // elements of each member's shard
  int64_t shard_begin = 0, shard_count = 0;
  Tensor master, m, v;  // F32 [shard_count]; m and v: Adam's moments
  Tensor weights;       // compute dtype [numel]; undefined while released
  Tensor grads;         // F32 [numel]; undefined while released
  Tensor grad_shard;    // F32 [shard_count]: the reduced gradient
};

struct Parameters {
  ParameterTable table;
  vector<FlatUnit> units;     // in forward order
  bool gather_layer = false;  // free weights and gradients of a unit after each use
};

// Part of a tensor of the checkpoint that a rank's shard holds.
struct Fragment {
  const Piece* piece = nullptr;
  int64_t begin = 0, count = 0;  // elements of the piece
  int unit = 0;
  int64_t offset = 0;  // in the unit's shard
};

// Lays out `table` (of one or two chunks; `chunk_sizes` entries each) for rank `id` of the mesh,
// without memory.
Parameters layout_parameters(ParameterTable table, const vector<int>& chunk_sizes,
                             bool gather_layer, const Mesh& mesh, int id);
// The same for this rank, with its master and moment shards, all zero.
Parameters make_parameters(Rank& rank, ParameterTable table, const vector<int>& chunk_sizes,
                           bool gather_layer);
// Every piece's fragment in this rank's shards, in unit order.
vector<Fragment> fragments(const Parameters& parameters);
// Draws each element of the masters from (seed, Hugging Face name, element index).
void initialize(Rank& rank, Parameters& parameters, uint64_t seed);

// Zeroes the gradients of a step that begins.
void zero_grads(Rank& rank, Parameters& parameters);
// Makes a unit's full weights (and, if `with_grads`, its full gradients) available and binds the
// table's tensors to them.
void gather(Rank& rank, Parameters& parameters, FlatUnit& unit, bool with_grads);
// Frees a unit's full weights and gradients (nothing where they are the master itself).
void release_unit(Parameters& parameters, FlatUnit& unit);
// Sums the unit's full gradients over the shard group into grad_shard. With gather_layer, adds to
// what earlier calls of the step left there, and zeroes the full gradients.
void reduce(Rank& rank, Parameters& parameters, FlatUnit& unit);
// Sums grad_shard over the replicas (hsdp), once a step.
void reduce_replicas(Rank& rank, Parameters& parameters);
// L2 norm of all reduced gradients of all ranks, each element counted once.
double gradient_norm(Rank& rank, const Parameters& parameters);

int64_t total_numel(const ParameterTable& table);

}  // namespace pith
