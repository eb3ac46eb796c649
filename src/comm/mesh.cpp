#include "comm/mesh.h"

namespace pith {

const char* name_of(Group group) {
  static const char* const names[kGroups] = {"world", "pp",           "dp",          "cp",
                                             "ep",    "dp*cp",        "dp*ep",       "dp*cp*ep",
                                             "cp*ep", "expert shard", "dense shard", "replicate"};
  return names[int(group)];
}

Mesh make_mesh(int world, int pp, int cp, int ep, int dp_replicate) {
  struct {
    const char* name;
    int size;
  } const axes[] = {
      {"ranks", world}, {"pp", pp}, {"cp", cp}, {"ep", ep}, {"dp_replicate", dp_replicate}};
  for (const auto& axis : axes)
    if (axis.size < 1)
      bad_input("mesh", text("size of %s (got %d, need at least 1)", axis.name, axis.size),
                text("%s = 1", axis.name));
  const int64_t fixed = int64_t{pp} * cp * ep, below = world / fixed * fixed;
  if (below != world) {
    string counts = std::to_string(below + fixed) + " ranks";
    if (below > 0) counts = std::to_string(below) + " or " + counts;
    bad_input("mesh",
              text("ranks do not split over pp * cp * ep (got %d ranks and %d * %d * %d = %ld, "
                   "need a multiple)",
                   world, pp, cp, ep, fixed),
              counts + ", or a smaller pp, cp or ep");
  }
  const int dp = int(world / fixed);
  if (dp % dp_replicate != 0)
    bad_input("mesh",
              text("dp_replicate does not divide dp (got %d and dp = %d ranks / (pp * cp * ep) = "
                   "%d, need a divisor)",
                   dp_replicate, world, dp),
              text("dp_replicate = 1 or %d", dp));
  return {.pp = pp, .dp = dp, .cp = cp, .ep = ep, .dp_replicate = dp_replicate};
}

MeshCoord coord_of(const Mesh& mesh, int rank) {
  MeshCoord c{.pp = mesh.pp, .dp = mesh.dp, .cp = mesh.cp, .ep = mesh.ep};
  c.ep_rank = rank % mesh.ep;
  c.cp_rank = rank / mesh.ep % mesh.cp;
  c.dp_rank = rank / mesh.ep / mesh.cp % mesh.dp;
  c.pp_rank = rank / mesh.ep / mesh.cp / mesh.dp;
  return c;
}

int rank_of(const Mesh& mesh, const MeshCoord& c) {
  return ((c.pp_rank * mesh.dp + c.dp_rank) * mesh.cp + c.cp_rank) * mesh.ep + c.ep_rank;
}

// The axes along which members of a group differ; dp in its two factors.
struct FreeAxes {
  bool pp = false, dp_replicate = false, dp_shard = false, cp = false, ep = false;
};

static FreeAxes free_axes(Group group) {
  switch (group) {
    case Group::World: return {true, true, true, true, true};
    case Group::Pp: return {.pp = true};
    case Group::Dp: return {.dp_replicate = true, .dp_shard = true};
    case Group::Cp: return {.cp = true};
    case Group::Ep: return {.ep = true};
    case Group::DpCp: return {.dp_replicate = true, .dp_shard = true, .cp = true};
    case Group::DpEp: return {.dp_replicate = true, .dp_shard = true, .ep = true};
    case Group::DpCpEp: return {false, true, true, true, true};
    case Group::CpEp: return {.cp = true, .ep = true};
    case Group::ExpertShard: return {.dp_shard = true, .cp = true};
    case Group::DenseShard: return {.dp_shard = true, .cp = true, .ep = true};
    case Group::Replicate: return {.dp_replicate = true};
  }
  return {};
}

vector<int> group_members(const Mesh& mesh, Group group, int rank) {
  const FreeAxes axes = free_axes(group);
  const MeshCoord mine = coord_of(mesh, rank);
  const int shard = mesh.dp_shard();
  vector<int> members;
  for (int other = 0; other < mesh.world(); other++) {
    const MeshCoord c = coord_of(mesh, other);
    if ((axes.pp || c.pp_rank == mine.pp_rank) &&
        (axes.dp_replicate || c.dp_rank / shard == mine.dp_rank / shard) &&
        (axes.dp_shard || c.dp_rank % shard == mine.dp_rank % shard) &&
        (axes.cp || c.cp_rank == mine.cp_rank) && (axes.ep || c.ep_rank == mine.ep_rank))
      members.push_back(other);
  }
  return members;
}

}  // namespace pith
