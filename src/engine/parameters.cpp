#include "engine/parameters.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "comm/communicator.h"
#include "core/rng.h"

namespace pith {

constexpr int64_t kAlign = 128;  // elements: 256 bytes of BF16

static int64_t align_up(int64_t n) { return (n + kAlign - 1) / kAlign * kAlign; }

int64_t total_numel(const ParameterTable& table) {
  int64_t n = 0;
  for (const Parameter& p : table) n += p.dims.numel();
  return n;
}

static bool is_shared(const FlatUnit& unit) {
  return unit.cuts.size() == 1 && unit.weights.defined() && unit.weights.data == unit.master.data;
}

// Elements of each member's shard: blocks of 128, as equal as can be.
static vector<int64_t> cut(int64_t numel, int members) {
  const int64_t blocks = numel / kAlign;
  vector<int64_t> cuts;
  for (int64_t i = 0; i < members; i++)
    cuts.push_back((blocks * (i + 1) / members - blocks * i / members) * kAlign);
  return cuts;
}

Parameters layout_parameters(ParameterTable table, const vector<int>& chunk_sizes,
                             bool gather_layer, ShardPlace dense, ShardPlace experts) {
  Parameters p;
  p.table = std::move(table);
  p.gather_layer = gather_layer;
  int index = 0;
  for (size_t chunk = 0; chunk < chunk_sizes.size(); chunk++) {
    const size_t first_unit = p.units.size();
    for (const int end = index + chunk_sizes[chunk]; index < end; index++) {
      const Parameter& entry = p.table[index];
      FlatUnit* unit = nullptr;
      for (size_t u = first_unit; u < p.units.size(); u++)
        if (p.units[u].kind == entry.unit && p.units[u].layer == entry.layer) unit = &p.units[u];
      if (!unit) {
        unit = &p.units.emplace_back();
        unit->kind = entry.unit;
        unit->layer = entry.layer;
        unit->chunk = int(chunk);
      }
      unit->entries.push_back(index);
      unit->offsets.push_back(unit->numel);
      unit->numel += align_up(entry.dims.numel());
    }
  }
  for (FlatUnit& unit : p.units) {
    const bool expert = unit.kind == UnitKind::Experts;
    const ShardPlace place = expert ? experts : dense;
    unit.group = expert ? Group::ExpertShard : Group::DenseShard;
    unit.cuts = cut(unit.numel, place.members);
    for (int i = 0; i < place.me; i++) unit.shard_begin += unit.cuts[i];
    unit.shard_count = unit.cuts[place.me];
  }
  return p;
}

Parameters make_parameters(Rank& rank, ParameterTable table, const vector<int>& chunk_sizes,
                           bool gather_layer) {
  const auto place = [&](Group g) { return ShardPlace{group_size(rank, g), group_rank(rank, g)}; };
  Parameters p = layout_parameters(std::move(table), chunk_sizes, gather_layer,
                                   place(Group::DenseShard), place(Group::ExpertShard));
  for (FlatUnit& unit : p.units) {
    unit.master = zeros(rank, {unit.shard_count}, DType::F32);
    unit.m = zeros(rank, {unit.shard_count}, DType::F32);
    unit.v = zeros(rank, {unit.shard_count}, DType::F32);
  }
  return p;
}

ParameterBytes parameter_bytes(const Parameters& p, DType compute) {
  ParameterBytes bytes;
  int64_t largest = 0;
  for (const FlatUnit& unit : p.units) {
    const bool shared = unit.cuts.size() == 1 && compute == DType::F32;
    bytes.master += 4 * unit.shard_count;
    bytes.moments += 8 * unit.shard_count;
    const int64_t weights = shared ? 0 : unit.numel * size_of(compute);
    const int64_t gradients = 4 * unit.numel;
    if (p.gather_layer && unit.cuts.size() > 1) {
      largest = std::max(largest, unit.numel);
      bytes.gradients += 4 * unit.shard_count;
    } else {
      bytes.weights += weights;
      bytes.gradients += gradients + (unit.cuts.size() > 1 ? 4 * unit.shard_count : 0);
    }
  }
  // Layer-wise gathering holds two units' full buffers at most.
  bytes.weights += 2 * largest * size_of(compute);
  bytes.gradients += 2 * largest * 4;
  return bytes;
}

vector<Fragment> fragments(const Parameters& p) {
  vector<Fragment> list;
  for (size_t u = 0; u < p.units.size(); u++) {
    const FlatUnit& unit = p.units[u];
    const int64_t shard_end = unit.shard_begin + unit.shard_count;
    for (size_t i = 0; i < unit.entries.size(); i++) {
      int64_t at = unit.offsets[i];
      for (const Piece& piece : p.table[unit.entries[i]].pieces) {
        const int64_t n = piece.dims.numel();
        const int64_t from = std::max(at, unit.shard_begin);
        const int64_t to = std::min(at + n, shard_end);
        if (from < to)
          list.push_back({&piece, from - at, to - from, int(u), from - unit.shard_begin});
        at += n;
      }
    }
  }
  return list;
}

void initialize(Rank& rank, Parameters& p, uint64_t seed) {
  for (const Fragment& f : fragments(p)) {
    const Tensor part = p.units[f.unit].master.slice_rows(f.offset, f.offset + f.count);
    if (f.piece->init.kind == InitKind::Constant)
      fill_constant(rank, part, f.piece->init.value);
    else
      fill_normal(rank, part, stream_key(seed, f.piece->name), f.begin, f.piece->init.value);
  }
}

static void clear(const Tensor& t) {
  if (t.bytes()) std::memset(t.data, 0, t.bytes());
}

void zero_grads(Rank&, Parameters& p) {
  for (FlatUnit& unit : p.units) {
    if (unit.grads.defined()) clear(unit.grads);
    if (unit.grad_shard.defined()) clear(unit.grad_shard);
  }
}

// Points the table's tensors at the unit's buffers. They hold no reference, so that a tape node
// that keeps a weight does not keep the buffer.
static void bind(Parameters& p, FlatUnit& unit) {
  for (size_t i = 0; i < unit.entries.size(); i++) {
    const Parameter& entry = p.table[unit.entries[i]];
    Tensor& t = *entry.target;
    t = unit.weights.meta();
    t.dim = entry.dims;
    t.name = entry.pieces[0].name.c_str();
    t.home = &t;
    t.home_offset = 0;
    const int64_t offset = unit.offsets[i];
    t.data = unit.weights.data + offset * size_of(unit.weights.dtype);
    t.grad = unit.grads.defined() ? unit.grads.data + offset * 4 : nullptr;
  }
}

void gather(Rank& rank, Parameters& p, FlatUnit& unit, bool with_grads) {
  const bool whole = unit.cuts.size() == 1;
  if (!unit.weights.defined())
    unit.weights =
        whole && rank.compute == DType::F32 ? unit.master : empty(rank, {unit.numel}, rank.compute);
  if (!is_shared(unit))
    all_gather(rank, unit.group, unit.master, unit.weights, "all_gather weights", unit.cuts.data());
  if (with_grads && !unit.grads.defined()) unit.grads = zeros(rank, {unit.numel}, DType::F32);
  if (with_grads && !unit.grad_shard.defined())
    unit.grad_shard = whole ? unit.grads : zeros(rank, {unit.shard_count}, DType::F32);
  bind(p, unit);
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
  clear(unit.grads);
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

}  // namespace pith
