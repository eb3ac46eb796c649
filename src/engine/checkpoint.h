// RUN/step-00000100/ has rank-00000.safetensors ... with fragments `NAME#begin` of weights,
// `NAME.exp_avg` and `NAME.exp_avg_sq`, and manifest.json, which is written last.
#pragma once
#include <map>
#include <memory>
#include <optional>

#include "data/durable.h"
#include "data/safetensors.h"
#include "engine/parameters.h"

namespace pith {

struct RunState {
  i64 step = 0;
  i64 updates = 0;  // steps that changed weights: Adam's t
  i64 samples = 0;  // consumed
  u64 seed = 0;
  u64 data_fingerprint = 0;
  string optimizer = "adamw";  // "none": weights alone
  vector<double> balance_counts;
  string config;
  string model;  // config.json; empty: there is none
};

struct StoredFragment {
  i64 begin = 0, count = 0;  // elements of the tensor
  int file = 0;
  i64 offset = 0;  // bytes
};
struct StoredTensor : TensorDecl {   // of the whole tensor; the map of tensors names it
  vector<StoredFragment> fragments;  // by begin
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

// By step, good or not.
std::map<i64, string> list_checkpoints(const string& run_folder);
// Checks manifest and sizes. Exit code 2, here and below, names what is wrong.
Checkpoint open_checkpoint(const string& folder);
// Compares every byte with the checksums.
void verify(const Checkpoint& checkpoint);
// The newest good one of a run, verified, with a warning for each newer one. Exit code 2 if it has
// some and none is good.
std::optional<Checkpoint> find_checkpoint(const string& run_folder);
// Of a Hugging Face folder, a checkpoint (verified), or a run (its newest good one).
Checkpoint open_weights(const string& folder);

// Exit code 2 unless the run `now` may go on from it.
void check_resumable(const Checkpoint& checkpoint, const RunState& now);
// Exit code 2 for tensors that are missing, extra, misshapen or not finite.
void check_weights(const Checkpoint& weights, const ParameterTable& whole);

void read_elements(const Checkpoint& checkpoint, const StoredTensor& tensor, i64 begin, i64 count,
                   float* out);
vector<float> read_tensor(const Checkpoint& checkpoint, const StoredTensor& tensor);
// This rank's shards of master, m and v; of master alone.
void load_state(Rank& rank, Parameters& parameters, const Checkpoint& checkpoint);
void load_weights(Rank& rank, Parameters& parameters, const Checkpoint& checkpoint);

vector<i64> shape_of(const Piece& piece);
StoredFile stored_file(const string& folder, const string& name);
void write_manifest(const Checkpoint& checkpoint, const string& path);
// Flushes and renames a folder; replaces one that is there.
void put_in_place(const string& temporary, const string& folder);

struct SaveOptions {
  string folder;  // the run's
  i64 keep = 3;   // 0: all
};

// Writes this rank's shards on a thread of its own. Calls that take a Rank are collective. A save
// that fails on one rank is taken back on all, with a warning.
class CheckpointSaver {
 public:
  // Removes what killed saves left behind; the caller holds the run's lock.
  CheckpointSaver(Rank& rank, const Parameters& parameters, const SaveOptions& options);
  CheckpointSaver(const CheckpointSaver&) = delete;
  CheckpointSaver& operator=(const CheckpointSaver&) = delete;
  ~CheckpointSaver();

  // Once the save before is over.
  void begin(Rank& rank, const RunState& state);
  // Once a step, before the optimiser pass.
  void poll(Rank& rank);
  // Before the optimiser writes that unit of the parameters.
  void wait_unit(int unit);
  // False if the last save failed.
  bool finish(Rank& rank);
  bool under_way() const { return job_ != nullptr; }
  // Seconds waited since the last call.
  double take_stall() { return std::exchange(stall_s_, 0); }

 private:
  struct Job;
  void wait(Rank& rank, i64 most_bytes_left);
  const Parameters& parameters_;
  SaveOptions options_;
  std::unique_ptr<Job> job_;
  bool last_failed_ = false;
  double stall_s_ = 0;
};

}
