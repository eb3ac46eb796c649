#include "comm/mesh.h"

namespace pith {

struct GroupAxes {
  const char* name;
  const char* free;  // where members differ: pp, dp_Replicate, dp_Shard, cp, ep
};
static constexpr GroupAxes kAxes[kGroups] = {{"world", "pRSce"},
                                             {"pp", "p"},
                                             {"cp", "c"},
                                             {"ep", "e"},
                                             {"dp*cp*ep", "RSce"},
                                             {"expert shard", "Sc"},
                                             {"dense shard", "Sce"},
                                             {"replicate", "R"}};

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
  const i64 fixed = i64{pp} * cp * ep, below = world / fixed * fixed;
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
  const MeshCoord mine = coord_of(mesh, rank);
  const int shard = mesh.dp_shard();
  const auto fits = [&](char axis, int a, int b) {
    return a == b || std::strchr(kAxes[int(group)].free, axis);
  };
  vector<int> members;
  for (int other = 0; other < mesh.world(); other++) {
    const MeshCoord c = coord_of(mesh, other);
    if (fits('p', c.pp_rank, mine.pp_rank) && fits('R', c.dp_rank / shard, mine.dp_rank / shard) &&
        fits('S', c.dp_rank % shard, mine.dp_rank % shard) && fits('c', c.cp_rank, mine.cp_rank) &&
        fits('e', c.ep_rank, mine.ep_rank))
      members.push_back(other);
  }
  return members;
}

}
