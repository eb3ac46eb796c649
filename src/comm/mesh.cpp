#include "comm/mesh.h"

namespace pith {

// The axes along which the members of a group differ.
struct GroupAxes {
  const char* name;
  bool pp, dp_replicate, dp_shard, cp, ep;
};
static constexpr GroupAxes kAxes[kGroups] = {
    {"world", true, true, true, true, true},
    {"pp", true, false, false, false, false},
    {"cp", false, false, false, true, false},
    {"ep", false, false, false, false, true},
    {"dp*cp*ep", false, true, true, true, true},
    {"expert shard", false, false, true, true, false},
    {"dense shard", false, false, true, true, true},
    {"replicate", false, true, false, false, false},
};

const char* name_of(Group group) { return kAxes[int(group)].name; }

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
  if (below != world)
    bad_input("mesh",
              text("ranks do not split over pp * cp * ep (got %d ranks and %d * %d * %d = %ld, "
                   "need a multiple)",
                   world, pp, cp, ep, fixed),
              (below > 0 ? text("%ld or ", below) : "") +
                  text("%ld ranks, or a smaller pp, cp or ep", below + fixed));
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

vector<int> group_members(const Mesh& mesh, Group group, int rank) {
  const GroupAxes& free = kAxes[int(group)];
  const MeshCoord mine = coord_of(mesh, rank);
  const int shard = mesh.dp_shard();
  vector<int> members;
  for (int other = 0; other < mesh.world(); other++) {
    const MeshCoord c = coord_of(mesh, other);
    if ((free.pp || c.pp_rank == mine.pp_rank) &&
        (free.dp_replicate || c.dp_rank / shard == mine.dp_rank / shard) &&
        (free.dp_shard || c.dp_rank % shard == mine.dp_rank % shard) &&
        (free.cp || c.cp_rank == mine.cp_rank) && (free.ep || c.ep_rank == mine.ep_rank))
      members.push_back(other);
  }
  return members;
}

}  // namespace pith
