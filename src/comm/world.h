// world: what the ranks of a process share: parcels on their way, who waits where, and the first
// failure. Included by communicator.cpp and launch.cpp only.
#pragma once
#include <condition_variable>
#include <deque>
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

// What one member brings to another, copied.
struct Parcel {
  Call call;
  DType dtype = DType::F32;
  int detail = 0;           // of a collective: Reduce, or the root
  vector<int64_t> offsets;  // of all_to_all: where the part of each destination begins, and the end
  MessageTag tag;
  Tensor message;  // of send_recv, whose sender waits until it is received: the tensor as meta
  vector<char> data;
};

// From one member to another: parcels are received in the order in which both ends post.
struct Channel {
  std::deque<std::shared_ptr<const Parcel>> parcels;  // sent and not yet picked up
  size_t matched = 0;                                 // parcels whose receive is posted
  int wanted = 0;                                     // posted receives that have no parcel yet
};

// One set of ranks that communicate.
struct GroupState {
  vector<int> members;
  vector<Channel> channels;  // by source * n + destination
};

struct RankState {
  std::condition_variable changed;  // done waiting, or some rank failed or ended
  bool waits = false, finished = false;
  Call call;     // while it waits
  int open = 0;  // receives, and sends of messages, that it waits for
  const Status* board = nullptr;
};

// Everything is guarded by `mutex`, but for parcels, which do not change once sent.
struct World {
  Mesh mesh;
  std::mutex mutex;
  std::deque<GroupState> groups;
  vector<RankState> ranks;
  int returned = 0;              // ranks, well or not
  std::condition_variable over;  // a rank failed or all have finished
  int failed_rank = -1;          // the first that failed
  int exit_code = 0;
  string message;  // complete
};

// One rank's way to the others.
struct Comm {
  World* world = nullptr;
  GroupState* group[kGroups] = {};
  int place[kGroups] = {};  // of this rank among the group's members
  double limit_s = 0;       // longest wait
  double limit_after_startup_s = 0;
};

}  // namespace pith
