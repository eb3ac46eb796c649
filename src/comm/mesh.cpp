#include "comm/mesh.h"

#include <array>

namespace pith {

static constexpr struct {
  const char* name;
  const char* free;  // where members differ: pp, dp_Replicate, dp_Shard, cp, ep
} kAxes[kGroups] = {
    {"world", "pRSce"},
    {"pp", "p"},
    {"cp", "c"},
    {"ep", "e"},
    {"dp*cp*ep", "RSce"},
    {"expert shard", "Sc"},
    {"dense shard", "Sce"},
    {"replicate", "R"},
};

const char* name_of(Group group) { return kAxes[int(group)].name; }

Mesh make_mesh(int world, int pp, int cp, int ep, int dp_replicate) {
  i64 fixed = i64{pp} * cp * ep, below = world / fixed * fixed;
  string fewer = below > 0 ? text("%ld or ", below) : "";
  if (below != world)
    bad_input("mesh",
        text("ranks do not split over pp * cp * ep (got %d ranks and %d * %d * %d = %ld, "
             "need a multiple)",
            world, pp, cp, ep, fixed),
        fewer + text("%ld ranks, or a smaller pp, cp or ep", below + fixed));
  int dp = int(world / fixed);
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
  auto place = [&](int of) {
    MeshCoord c = coord_of(mesh, of);
    int shard = mesh.dp_shard();
    std::array<int, 5> at = {c.pp_rank, c.dp_rank / shard, c.dp_rank % shard, c.cp_rank, c.ep_rank};
    for (int axis = 0; axis < 5; axis++)
      if (std::strchr(kAxes[int(group)].free, "pRSce"[axis])) at[axis] = 0;
    return at;
  };
  vector<int> members;
  for (int other = 0; other < mesh.world(); other++)
    if (place(other) == place(rank)) members.push_back(other);
  return members;
}

}
