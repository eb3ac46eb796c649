#include "engine/parameters.h"

#include <algorithm>

#include "comm/communicator.h"
#include "core/rng.h"

namespace pith {

constexpr i64 kAlign = 128;  // elements: 256 bytes of BF16

static bool is_shared(const FlatUnit& unit) {
  return unit.weights.defined() && unit.weights.data == unit.master.data;
}

Parameters make_parameters(
    const vector<ParameterTable>& chunks, bool gather_layer, const Mesh& mesh, int id, Rank* rank) {
  Parameters p{.gather_layer = gather_layer};
  for (int chunk = 0; chunk < int(chunks.size()); chunk++)
    for (const Parameter& entry : chunks[chunk]) {
      auto unit = std::ranges::find_if(p.units, [&](const FlatUnit& u) {
        return u.kind == entry.unit && u.layer == entry.layer && u.chunk == chunk;
      });
      if (unit == p.units.end())
        unit = p.units.insert(unit, {.kind = entry.unit, .layer = entry.layer, .chunk = chunk});
      unit->entries.push_back(int(p.table.size()));
      unit->offsets.push_back(unit->numel);
      unit->numel += (entry.dims.numel() + kAlign - 1) / kAlign * kAlign;
      p.table.push_back(entry);
    }
  for (FlatUnit& unit : p.units) {
    if (unit.kind == UnitKind::Experts) unit.group = Group::ExpertShard;
    vector<int> members = group_members(mesh, unit.group, id);
    auto n = i64(members.size()), blocks = unit.numel / kAlign;
    for (i64 i = 0; i < n; i++) {
      i64 begin = blocks * i / n * kAlign, end = blocks * (i + 1) / n * kAlign;
      unit.cuts.push_back(end - begin);
      if (members[i] != id) continue;
      unit.shard_begin = begin;
      unit.shard_count = end - begin;
    }
    if (!rank) continue;
    for (Tensor* t : {&unit.master, &unit.m, &unit.v}) {
      bool weight = t == &unit.master;
      const AllocatesFor use(*rank, weight ? MemoryUse::Weights : MemoryUse::Optimizer);
      *t = zeros(*rank, {unit.shard_count}, DType::F32);
    }
  }
  return p;
}

vector<Fragment> fragments(const Parameters& p) {
  vector<Fragment> list;
  for (size_t u = 0; u < p.units.size(); u++) {
    const FlatUnit& unit = p.units[u];
    for (size_t i = 0; i < unit.entries.size(); i++) {
      i64 at = unit.offsets[i] - unit.shard_begin;
      for (const Piece& piece : p.table[unit.entries[i]].pieces) {
        i64 n = piece.dims.numel();
        i64 from = max<i64>(at, 0), to = min(at + n, unit.shard_count);
        if (from < to) list.push_back({&piece, from - at, to - from, int(u), from});
        at += n;
      }
    }
  }
  return list;
}

void initialize(Rank& rank, Parameters& p, u64 seed) {
  for (const Fragment& f : fragments(p)) {
    Tensor part = p.units[f.unit].master.slice_rows(f.offset, f.offset + f.count);
    if (f.piece->init.kind == InitKind::Constant)
      fill_constant(rank, part, f.piece->init.value);
    else
      fill_normal(rank, part, stream_key(seed, f.piece->name), f.begin, f.piece->init.value);
  }
}

void zero_grads(Rank& rank, Parameters& p) {
  for (FlatUnit& unit : p.units) {
    fill_zero(rank, unit.grads);
    fill_zero(rank, unit.grad_shard);
  }
}

void gather(Rank& rank, Parameters& p, FlatUnit& unit, bool with_grads) {
  bool whole = unit.cuts.size() == 1;
  AllocatesFor use(rank, MemoryUse::Weights);
  if (!unit.weights.defined())
    unit.weights =
        whole && rank.compute == DType::F32 ? unit.master : empty(rank, {unit.numel}, rank.compute);
  if (unit.weights.dtype != unit.master.dtype)
    cast(rank, unit.master, unit.weights);
  else if (!is_shared(unit))
    all_gather(rank, unit.group, unit.master, unit.weights, "all_gather weights", unit.cuts.data());
  rank.allocator->use = MemoryUse::Gradients;
  if (with_grads && !unit.grads.defined()) unit.grads = zeros(rank, {unit.numel}, DType::F32);
  if (with_grads && !unit.grad_shard.defined())
    unit.grad_shard = whole ? unit.grads : zeros(rank, {unit.shard_count}, DType::F32);
  // No reference: a tape node that keeps a weight does not keep the buffer.
  for (size_t i = 0; i < unit.entries.size(); i++) {
    const Parameter& entry = p.table[unit.entries[i]];
    Tensor& t = *entry.target;
    t = unit.weights.meta();
    t.dim = entry.dims;
    t.name = entry.pieces[0].name.c_str();
    t.home = &t;
    t.home_offset = 0;
    t.data = unit.weights.data + unit.offsets[i] * size_of(unit.weights.dtype);
    t.grad = unit.grads.defined() ? unit.grads.data + unit.offsets[i] * 4 : nullptr;
  }
}

void release_unit(Parameters& p, FlatUnit& unit) {
  if (is_shared(unit)) return;
  unit.weights = {};
  if (unit.grads.data != unit.grad_shard.data) unit.grads = {};
  for (const int entry : unit.entries) {
    Tensor& t = *p.table[entry].target;
    t.data = t.grad = nullptr;
  }
}

void reduce(Rank& rank, Parameters& p, FlatUnit& unit) {
  if (unit.grads.data == unit.grad_shard.data) return;
  Tensor part = p.gather_layer ? empty(rank, {unit.shard_count}, DType::F32) : unit.grad_shard;
  reduce_scatter(rank, unit.group, unit.grads, part, "reduce_scatter gradients", unit.cuts.data());
  if (!p.gather_layer) return;
  add_into(rank, unit.grad_shard, part);
  fill_zero(rank, unit.grads);
}

void reduce_replicas(Rank& rank, Parameters& p) {
  for (FlatUnit& unit : p.units)
    all_reduce(rank, Group::Replicate, unit.grad_shard, Reduce::Sum, "all_reduce replicas");
}

double gradient_norm(Rank& rank, const Parameters& p) {
  double sum = 0;
  for (const FlatUnit& unit : p.units) sum += sum_squares(rank, unit.grad_shard);
  all_reduce(rank, Group::World, &sum, 1, Reduce::Sum, "all_reduce gradient norm");
  return std::sqrt(sum / group_size(rank, Group::Replicate));
}

}
