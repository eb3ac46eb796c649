#include "comm/mesh.h"

#include <gtest/gtest.h>

#include <set>

namespace pith {

TEST(Mesh, CoordinatesAndRanksAreInverse) {
  const Mesh mesh = make_mesh(2 * 3 * 2 * 4, 2, 2, 4);
  EXPECT_EQ(mesh.dp, 3);
  for (int rank = 0; rank < mesh.world(); rank++) {
    const MeshCoord c = coord_of(mesh, rank);
    EXPECT_EQ(rank_of(mesh, c), rank);
    EXPECT_EQ(((c.pp_rank * 3 + c.dp_rank) * 2 + c.cp_rank) * 4 + c.ep_rank, rank);
  }
}

TEST(Mesh, GroupsOfKnownMeshes) {
  const struct {
    Mesh mesh;
    Group group;
    int rank;
    std::vector<int> members;
  } cases[] = {
      {{2, 2, 2, 2}, Group::World, 3, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}},
      {{2, 2, 2, 2}, Group::Pp, 5, {5, 13}},
      {{2, 2, 2, 2}, Group::Cp, 5, {5, 7}},
      {{2, 2, 2, 2}, Group::Ep, 5, {4, 5}},
      {{2, 2, 2, 2}, Group::DpCpEp, 9, {8, 9, 10, 11, 12, 13, 14, 15}},
      {{2, 2, 2, 2}, Group::ExpertShard, 9, {9, 11, 13, 15}},
      {{1, 4, 1, 2, 2}, Group::ExpertShard, 5, {5, 7}},
      {{1, 4, 1, 2, 2}, Group::DenseShard, 5, {4, 5, 6, 7}},
      {{1, 4, 1, 2, 2}, Group::Replicate, 5, {1, 5}},
      {{1, 4, 1, 2, 1}, Group::Replicate, 5, {5}},
      {{1, 4, 1, 2, 4}, Group::DenseShard, 5, {4, 5}},
      {{1, 4, 1, 2, 4}, Group::ExpertShard, 5, {5}},
      {{1, 4, 1, 2, 4}, Group::Replicate, 5, {1, 3, 5, 7}},
  };
  for (const auto& c : cases)
    EXPECT_EQ(group_members(c.mesh, c.group, c.rank), c.members)
        << name_of(c.group) << " of rank " << c.rank;
}

// Each kind of group cuts the world into disjoint sets, and a shard with its replicas is all of dp.
TEST(Mesh, GroupsPartitionTheWorld) {
  for (const Mesh& mesh : {Mesh{2, 4, 1, 2, 2}, Mesh{1, 6, 2, 1, 3}, Mesh{3, 5, 1, 1, 1}})
    for (int kind = 0; kind < kGroups; kind++) {
      std::set<std::vector<int>> groups;
      for (int rank = 0; rank < mesh.world(); rank++)
        groups.insert(group_members(mesh, static_cast<Group>(kind), rank));
      std::multiset<int> all;
      for (const auto& group : groups) all.insert(group.begin(), group.end());
      EXPECT_EQ(all.size(), static_cast<size_t>(mesh.world())) << kind;
      EXPECT_EQ(std::set<int>(all.begin(), all.end()).size(), all.size()) << kind;
    }
}

TEST(Mesh, RefusesSizesThatDoNotFit) {
  const struct {
    int world, pp, cp, ep, replicate;
    const char* message;
  } cases[] = {
      {6, 2, 1, 2, 1,
          "mesh: ranks do not split over pp * cp * ep (got 6 ranks and 2 * 1 * 2 = 4, need a "
          "multiple). Try: 4 or 8 ranks, or a smaller pp, cp or ep"},
      {2, 4, 1, 1, 1, "Try: 4 ranks, or"},
      {12, 1, 1, 2, 4, "dp_replicate does not divide dp (got 4 and dp = 12 ranks / (pp * cp * ep)"},
  };
  for (const auto& c : cases) try {
      make_mesh(c.world, c.pp, c.cp, c.ep, c.replicate);
      ADD_FAILURE() << "accepted: " << c.message;
    } catch (const Error& e) {
      EXPECT_EQ(e.exit_code, kExitBadInput);
      EXPECT_NE(std::string(e.what()).find(c.message), std::string::npos) << e.what();
    }
}

}  // namespace pith
