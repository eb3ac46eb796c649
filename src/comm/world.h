// world: what the ranks of a process share. For communicator.cpp and launch.cpp only.
#pragma once
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>

#include "comm/communicator.h"

namespace pith {

struct Call {
  const char *op, *what;
  Group group;
  At at;
};

// What one member brings to others, copied; it does not change once sent.
struct Parcel {
  Call call;
  Tensor tensor;            // as meta
  vector<char> data;        // its values
  int detail = 0;           // of a collective: Reduce, or the root
  vector<int64_t> offsets;  // of all_to_all: where each destination's part begins, and the end
  bool is_message = false;  // its sender waits until a receive is posted
  MessageTag tag;
};

// From one member to another: parcels are received in the order in which both ends post.
struct Channel {
  std::deque<std::shared_ptr<const Parcel>> parcels;  // not yet picked up
  size_t matched = 0;                                 // of them, those whose receive is posted
  int wanted = 0;                                     // receives that have no parcel yet
};

struct GroupState {
  vector<int> members;
  vector<Channel> channels;  // by source * n + destination
};

struct RankState {
  std::condition_variable changed;  // it need not wait, or a rank has failed or ended
  int open = 0;                     // receives, and sends of messages, that it waits for
  bool finished = false;
};

struct World {
  Mesh mesh;
  std::mutex mutex;  // guards all that follows
  std::deque<GroupState> groups;
  vector<RankState> ranks;
  int returned = 0;              // ranks, well or not
  std::condition_variable over;  // a rank has failed or all have returned
  int failed_rank = -1;          // the first
  int exit_code = 0;
  string message;
};

// One rank's way to the others.
struct Comm {
  World* world = nullptr;
  GroupState* group[kGroups] = {};
  int place[kGroups] = {};  // of this rank among the members
  double limit_s = 0;       // longest wait
  double limit_after_startup_s = 0;
};

}  // namespace pith
