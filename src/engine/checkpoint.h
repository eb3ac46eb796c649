// A run's state on disk, saved in the background, readable under any layout. RUN/step-00000100/ has
// rank-00000.safetensors with fragments `NAME#begin` of weights, `NAME.exp_avg` and
// `NAME.exp_avg_sq`, and manifest.json, which says what they are and is written last.
#pragma once
#include <map>
#include <memory>
#include <optional>

#include "data/durable.h"
#include "data/safetensors.h"
#include "engine/parameters.h"

namespace pith {

// What a run keeps besides tensors.
struct RunState {
  i64 step = 0;                   // optimiser steps completed
  i64 updates = 0;                // of them, those that changed weights: Adam's t
  i64 samples = 0;                // training samples consumed: the data position
  u64 seed = 0;                   // of initialisation and data order
  u64 data_fingerprint = 0;       // Dataset::fingerprint()
  string optimizer = "adamw";     // what the moments are; "none": weights alone
  vector<double> balance_counts;  // BalanceState::previous
  string config;                  // to_toml(RunConfig)
  string model;                   // text of the model's config.json; empty: there is none
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

// The folders step-NNNNNNNN of a run, by step, good or not.
std::map<i64, string> list_checkpoints(const string& run_folder);
// Checks manifest and sizes; exit code 2 naming what is wrong.
Checkpoint open_checkpoint(const string& folder);
// Reads all of it. Exit code 2 naming a file that differs from its checksum.
void verify(const Checkpoint& checkpoint);
// The newest good checkpoint of a run, verified, with a warning for each newer one that is bad.
// None if the run has no step-*; exit code 2 if it has some and none is good.
std::optional<Checkpoint> find_checkpoint(const string& run_folder);
// Weights of a Hugging Face folder, a checkpoint (verified), or a run folder (its newest good one).
Checkpoint open_weights(const string& folder);

// Exit code 2, naming the difference, unless the run `now` may go on from `checkpoint`.
void check_resumable(const Checkpoint& checkpoint, const RunState& now);
// Exit code 2 naming the tensors that are missing, extra, misshapen or not finite. Reads all.
void check_weights(const Checkpoint& weights, const ParameterTable& whole);

// Elements [begin, begin + count) of a stored tensor as F32.
void read_elements(const Checkpoint& checkpoint, const StoredTensor& tensor, i64 begin, i64 count,
                   float* out);
vector<float> read_tensor(const Checkpoint& checkpoint, const StoredTensor& tensor);
// Fill this rank's shards of master, m and v; of master alone.
void load_state(Rank& rank, Parameters& parameters, const Checkpoint& checkpoint);
void load_weights(Rank& rank, Parameters& parameters, const Checkpoint& checkpoint);

vector<i64> shape_of(const Piece& piece);
StoredFile stored_file(const string& folder, const string& name);
void write_manifest(const Checkpoint& checkpoint, const string& path);
// Flushes folder `temporary` and renames it; one that was there before is removed.
void put_in_place(const string& temporary, const string& folder);

struct SaveOptions {
  string folder;  // the run's
  i64 keep = 3;   // newest checkpoints kept; 0: all
};

// Writes this rank's shards on a thread of its own while training goes on. Calls that take a Rank
// are collective over the world. A save that fails on one rank is taken back on all, with a
// warning.
class CheckpointSaver {
 public:
  // Removes what killed saves left behind; the caller holds the run's lock.
  CheckpointSaver(Rank& rank, const Parameters& parameters, const SaveOptions& options);
  CheckpointSaver(const CheckpointSaver&) = delete;
  CheckpointSaver& operator=(const CheckpointSaver&) = delete;
  ~CheckpointSaver();

  // Starts to save weights and moments as they are now, once the save before is over.
  void begin(Rank& rank, const RunState& state);
  // Once a step, before the optimiser pass: learns how far all ranks are. Waits for one so far
  // behind that others could meet the time limit of the next collective.
  void poll(Rank& rank);
  // Before the optimiser writes parameters.units[unit]: waits until its shards are saved. Local.
  void wait_unit(int unit);
  // Waits for the save under way, if any. False if the last save failed.
  bool finish(Rank& rank);
  bool under_way() const { return job_ != nullptr; }
  // Seconds this rank has waited since the last call.
  double take_stall() { return std::exchange(stall_s_, 0); }

 private:
  struct Job;  // a save under way
  void wait(Rank& rank, i64 most_bytes_left);
  const Parameters& parameters_;
  SaveOptions options_;
  std::unique_ptr<Job> job_;
  bool last_failed_ = false;
  double stall_s_ = 0;
};

}
