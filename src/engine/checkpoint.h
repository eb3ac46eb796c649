// RUN/step-00000100/: rank-00000.safetensors ... with fragments `NAME#begin` of weights,
// `NAME.exp_avg` and `NAME.exp_avg_sq`; manifest.json is written last.
#pragma once
#include <map>
#include <memory>
#include <optional>

#include "data/array_files.h"
#include "data/durable.h"
#include "engine/parameters.h"

namespace pith {

struct RunState {
  i64 step = 0;
  i64 updates = 0;  // steps that changed weights: Adam's t
  i64 samples = 0;
  u64 seed = 0;
  u64 data_fingerprint = 0;
  string optimizer = "adamw";  // "none": weights alone
  vector<double> balance_counts;
  string config;
  string model;  // config.json; empty: there is none
};

struct StoredFragment {
  i64 begin = 0, count = 0;
  int file = 0;
  i64 offset = 0;  // bytes
};
struct StoredTensor : TensorDecl {
  vector<StoredFragment> fragments;
};
struct StoredFile {
  string name;
  i64 bytes = 0;
  u64 checksum = 0;  // XXH3
  MappedFile map;
};
struct Checkpoint {
  string folder;
  RunState state;
  Mesh mesh;  // it was saved under
  vector<StoredFile> files;
  std::map<string, StoredTensor> tensors;  // by Hugging Face name, one an expert
};

std::map<i64, string> list_checkpoints(const string& run_folder);
// Checks manifest and sizes; exit code 2, here and below.
Checkpoint open_checkpoint(const string& folder);
void verify(const Checkpoint& checkpoint);
// The newest good one, verified. Exit code 2 if some exist and none is good.
std::optional<Checkpoint> find_checkpoint(const string& run_folder);
// A Hugging Face folder, a checkpoint (verified), or a run (its newest good one).
Checkpoint open_weights(const string& folder);

// Whether the run `now` may go on from it.
void check_resumable(const Checkpoint& checkpoint, const RunState& now);
// Refuses missing, extra, misshapen and not finite tensors.
void check_weights(const Checkpoint& weights, const ParameterTable& whole);

void read_elements(
    const Checkpoint& checkpoint, const StoredTensor& tensor, i64 begin, i64 count, float* out);
vector<float> read_tensor(const Checkpoint& checkpoint, const StoredTensor& tensor);
void load_state(
    Rank& rank, Parameters& parameters, const Checkpoint& checkpoint, bool moments = true);

vector<i64> shape_of(const Piece& piece);
StoredFile stored_file(const string& folder, const string& name);
void write_manifest(const Checkpoint& checkpoint, const string& path);
// Flushes, renames and replaces.
void put_in_place(const string& temporary, const string& folder);

struct SaveOptions {
  string folder;  // the run's
  i64 keep = 3;   // 0: all
};

// Writes this rank's shards on a thread of its own. Calls with a Rank are collective. A save that
// fails on one rank is taken back on all, with a warning.
class CheckpointSaver {
 public:
  // Removes what killed saves left; the caller holds the run's lock.
  CheckpointSaver(Rank& rank, const Parameters& parameters, const SaveOptions& options);
  ~CheckpointSaver();

  void begin(Rank& rank, const RunState& state);
  // Once a step, before the optimiser pass.
  void poll(Rank& rank);
  void wait_unit(int unit);
  bool finish(Rank& rank);
  bool under_way() const { return job_ != nullptr; }
  double take_stall() { return std::exchange(stall_s_, 0); }

 private:
  struct Job;
  void wait(Rank& rank, int most_units_left);
  const Parameters& parameters_;
  SaveOptions options_;
  std::unique_ptr<Job> job_;
  bool last_failed_ = false;
  double stall_s_ = 0;
};

}
