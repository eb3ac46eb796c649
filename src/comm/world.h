// world: what the ranks of a process share: the groups' meeting places, who waits where, and the
// first failure. Included by communicator.cpp and launch.cpp only.
// defines: World, Comm, GroupState
#pragma once
#include <condition_variable>
#include <memory>
#include <mutex>

#include "comm/communicator.h"

namespace pith {

// A communication call, as named in messages.
struct Call {
  const char* op = "";
  const char* what = "";
  Group group = Group::World;
  At at;
};

// What a member brings to a collective, copied. There are two a member, used in turn, so that a
// member may enter the next call while others still read this one.
struct Slot {
  Call call;
  DType dtype = DType::F32;
  int detail = 0;  // Reduce, or the root
  vector<char> data;
  vector<int64_t> counts;  // all_to_all: bytes by destination
};

// A message on its way; it keeps the sent tensor's memory.
struct Posted {
  Transfer transfer;
  const char* what = "";
};

// One set of ranks that communicate. Everything but what slots hold is guarded by World::mutex.
struct GroupState {
  vector<int> members;
  std::condition_variable changed;
  int64_t round = 0;  // meetings that are over
  vector<char> here;  // members at the current meeting
  vector<Slot> slots[2];
  vector<vector<Posted>> sends;  // by source * n + destination, in posted order
};

struct RankState {
  bool waits = false, finished = false;
  Call call;           // while it waits
  int unreceived = 0;  // messages it has sent that were not copied yet
  const Status* board = nullptr;
};

struct World {
  Mesh mesh;
  std::mutex mutex;
  vector<std::unique_ptr<GroupState>> groups;
  vector<RankState> ranks;
  int finished = 0;
  std::condition_variable over;  // a rank failed or all have finished
  int failed_rank = -1;          // the first that failed
  int exit_code = 0;
  string message;  // complete
};

// One rank's way to the others.
struct Comm {
  World* world = nullptr;
  GroupState* group[kGroups] = {};
  int place[kGroups] = {};      // of this rank among the group's members
  int64_t calls[kGroups] = {};  // collectives begun
  double limit_s = 0;           // longest wait
  double limit_after_startup_s = 0;
};

}  // namespace pith
