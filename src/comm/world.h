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

// What one member brings to others, copied; constant once sent.
struct Parcel {
  Call call;
  Tensor tensor;  // as meta
  vector<char> data;
  int detail = 0;           // Reduce, or the root
  vector<int64_t> offsets;  // of all_to_all: where each destination's part begins, and the end
  bool is_message = false;  // of send_recv: its sender waits until a receive is posted
  MessageTag tag;
};

// From one member to another: parcels are received in the order in which both ends post.
struct Channel {
  std::deque<std::shared_ptr<const Parcel>> parcels;
  size_t matched = 0;  // parcels that have a receive
  int wanted = 0;      // receives that have no parcel
};

struct GroupState {
  vector<int> members;
  vector<Channel> channels;  // by source * n + destination
};

struct RankState {
  std::condition_variable changed;
  int open = 0;  // receives, and sends of messages, that it waits for
  bool finished = false;
};

struct World {
  Mesh mesh;
  std::mutex mutex;  // of all that follows
  std::deque<GroupState> groups;
  vector<RankState> ranks;
  int returned = 0;
  std::condition_variable over;
  int failed_rank = -1;  // the first
  int exit_code = 0;
  string message;
};

struct Comm {
  World* world = nullptr;
  GroupState* group[kGroups] = {};
  int place[kGroups] = {};
  double limit_s = 0, limit_after_startup_s = 0;
};

}  // namespace pith
