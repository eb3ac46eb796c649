// A unit's tensors lie in one flat buffer, each at a multiple of 128 elements. The shard group cuts
// it at multiples of 128, anywhere in a tensor; a shard may be empty. In a group of one with F32
// compute, full weights and the master are the same memory.
#pragma once
#include "comm/mesh.h"
#include "models/model.h"

namespace pith {

struct FlatUnit {
  UnitKind kind = UnitKind::Layer;
  int layer = -1, chunk = 0;
  vector<int> entries;  // of Parameters::table
  vector<i64> offsets;
  i64 numel = 0;
  Group group = Group::DenseShard;
  vector<i64> cuts;  // elements of each member's shard
  i64 shard_begin = 0, shard_count = 0;
  Tensor master, m, v;    // F32 [shard_count]; m and v: Adam's moments
  Tensor weights, grads;  // compute dtype, F32 [numel]; undefined while released
  Tensor grad_shard;      // F32 [shard_count]: the reduced gradient
};

struct Parameters {
  ParameterTable table;
  vector<FlatUnit> units;
  bool gather_layer = false;
};

struct Fragment {
  const Piece* piece = nullptr;
  i64 begin = 0, count = 0;  // elements of the piece
  int unit = 0;
  i64 offset = 0;  // in the unit's shard
};

// Of the chunks of rank `id`; with `rank`, also its shards, which are zero.
Parameters make_parameters(
    const vector<ParameterTable>& chunks, bool gather_layer, const Mesh& mesh, int id, Rank* rank);
vector<Fragment> fragments(const Parameters& parameters);
// Draws each element from (seed, Hugging Face name, element index).
void initialize(Rank& rank, Parameters& parameters, u64 seed);

void zero_grads(Rank& rank, Parameters& parameters);
// Points the table's tensors to full weights and, if wanted, gradients.
void gather(Rank& rank, Parameters& parameters, FlatUnit& unit, bool with_grads);
void release_unit(Parameters& parameters, FlatUnit& unit);
// Over the shard group into grad_shard. With gather_layer, adds to what the step left there, and
// zeroes the full gradients.
void reduce(Rank& rank, Parameters& parameters, FlatUnit& unit);
void reduce_replicas(Rank& rank, Parameters& parameters);  // grad_shard, once a step
// L2, of all ranks' reduced gradients, each element counted once.
double gradient_norm(Rank& rank, const Parameters& parameters);

}
