#pragma once
#include <map>
#include <mutex>

#include "core/rank.h"

namespace pith {

struct Stage {
  string name;
  int layer = -1, micro_batch = -1;  // -1: of none
};
// Of a kernel, a copy or a memset.
struct Launch {
  double begin_us, us;  // from the step's begin
  int stream, stage;    // stage: of Profile::stages
  string kernel;
};
struct Profile {
  i64 step = 0;
  double us = 0;
  vector<Stage> stages;
  vector<Launch> launches;
  // Of CUPTI's work.
  void* cupti = nullptr;
  bool recording = false;
  u64 begin_ns = 0;
  std::map<int, int> stage_of;  // by the number of a call; until the end, a launch's stage
  std::mutex mutex;
};

// In builds with CUDA. Loads CUPTI; exit code 2 if it is missing.
void open_profiler();
// Between them the rank's GPU is recorded, and bracketed for nsys and ncu.
void begin_profile(Rank& rank);
Profile& end_profile(Rank& rank);

// What the rank does: an NVTX range, and the stage of what it launches.
struct StageRange {
#ifdef PITH_CUDA
  StageRange(const Rank& rank, const Stage& stage);
  ~StageRange();
#else
  StageRange(const Rank&, const Stage&) {}
#endif
};

// 0 matrix products, 1 attention, 2 memory-bound, 3 communication.
int kind_of_kernel(string_view name);
// Of a linker's symbol: "OnCuda<BF16>::softmax".
string kernel_name(const string& symbol);

// Percent of the step by kind, and idle. A moment counts for what began first; launches in order.
vector<double> profile_shares(const Profile& profile);
string profile_table(const Profile& profile);
// FOLDER/profile-step-000007.json for Perfetto, and .tsv; logs the table. Of symbols, unordered.
void write_profile(const string& folder, Profile& profile);

}
