#pragma once

#include "core/rank.h"

namespace pith {

// Axes outer to inner; dp_replicate is the outer factor of dp.
struct Mesh {
  int pp = 1, dp = 1, cp = 1, ep = 1;
  int dp_replicate = 1;
  int dp_shard() const { return dp / dp_replicate; }
  int world() const { return pp * dp * cp * ep; }
  bool operator==(const Mesh&) const = default;
};

// Ranks that differ only in the named axes.
enum class Group : u8 {
  World,
  Pp,
  Cp,
  Ep,
  DpCpEp,
  ExpertShard,  // dp_shard x cp: a layer's experts
  DenseShard,   // dp_shard x cp x ep: everything else
  Replicate,
};
constexpr int kGroups = 8;
const char* name_of(Group group);

// dp is what pp, cp and ep leave. Exit code 2 where sizes do not divide.
Mesh make_mesh(int world, int pp, int cp, int ep, int dp_replicate = 1);

MeshCoord coord_of(const Mesh& mesh, int rank);
int rank_of(const Mesh& mesh, const MeshCoord& coord);

vector<int> group_members(const Mesh& mesh, Group group, int rank);

}
