// mesh: how the ranks are laid out over the axes, and which of them talk to each other.
#pragma once

#include "core/rank.h"

namespace pith {

// Axes outer to inner: (pp, dp, cp, ep). dp is split once more into dp_replicate (outer) x
// dp_shard: weights are sharded over dp_shard and replicated over dp_replicate ("hsdp"; 1 is
// "fsdp").
struct Mesh {
  int pp = 1, dp = 1, cp = 1, ep = 1;
  int dp_replicate = 1;
  int dp_shard() const { return dp / dp_replicate; }
  int world() const { return pp * dp * cp * ep; }
  bool operator==(const Mesh&) const = default;
};

// Sets of ranks that communicate: those that differ only in the named axes, by ascending rank.
enum class Group : uint8_t {
  World,
  Pp,
  Cp,
  Ep,
  DpCpEp,       // all ranks of one pipeline coordinate
  ExpertShard,  // dp_shard x cp: over which a layer's experts are sharded
  DenseShard,   // dp_shard x cp x ep: over which everything else is
  Replicate,    // dp_replicate: holders of the same shard
};
constexpr int kGroups = 8;
const char* name_of(Group group);

// The mesh of `world` ranks; dp is what pp, cp and ep leave. Throws bad_input, saying what to
// change, where sizes do not divide.
Mesh make_mesh(int world, int pp, int cp, int ep, int dp_replicate = 1);

MeshCoord coord_of(const Mesh& mesh, int rank);
int rank_of(const Mesh& mesh, const MeshCoord& coord);

// The ranks of the group that `rank` belongs to, ascending, `rank` included.
vector<int> group_members(const Mesh& mesh, Group group, int rank);

}  // namespace pith
