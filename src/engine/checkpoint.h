// A run's state on disk, saved in the background, readable under any layout.
//
//   RUN/step-00000100/rank-00000.safetensors   1-D fragments `NAME#begin` of weights, and of
//                                               moments `NAME.exp_avg` and `NAME.exp_avg_sq`
//   RUN/step-00000100/manifest.json             RunState, where each fragment is, checksums
//
// NAME is the Hugging Face name of a tensor (one an expert), begin the fragment's first element.
// The manifest is written last, in step-00000100.tmp, which is then renamed.
#pragma once
#include <map>
#include <memory>
#include <optional>

#include "data/run_lock.h"
#include "data/safetensors.h"
#include "engine/parameters.h"

namespace pith {

// What a run keeps besides tensors.
struct RunState {
  int64_t step = 0;               // optimiser steps completed
  int64_t updates = 0;            // of them, those that changed weights: Adam's t
  int64_t samples = 0;            // training samples consumed: the data position
  uint64_t seed = 0;              // of initialisation and data order
  uint64_t data_fingerprint = 0;  // Dataset::fingerprint()
  string optimizer = "adamw";     // what the moments are; "none": weights alone
  vector<double> balance_counts;  // BalanceState::previous
  string config;                  // to_toml(RunConfig)
  string model;                   // text of the model's config.json; empty: there is none
};

// Elements [begin, begin + count) of a tensor, at byte `offset` of a file.
struct StoredFragment {
  int64_t begin = 0, count = 0;
  int file = 0;
  int64_t offset = 0;
  uint64_t checksum = 0;  // XXH3 of its bytes
};
struct StoredTensor {
  FileDType dtype = FileDType::F32;
  vector<int64_t> shape;             // of the whole tensor
  vector<StoredFragment> fragments;  // by begin
  int64_t numel() const;
};
struct StoredFile {
  string name;  // in the folder
  int64_t bytes = 0, header_bytes = 0;
  uint64_t header_checksum = 0;
  MappedFile map;
};
struct Checkpoint {
  string folder;
  RunState state;
  Mesh mesh;  // it was saved under
  vector<StoredFile> files;
  std::map<string, StoredTensor> tensors;  // by name, moments included
};

struct CheckpointFolder {
  int64_t step = 0;
  string path;
};
// The folders step-NNNNNNNN of a run, by step, good or not.
vector<CheckpointFolder> list_checkpoints(const string& run_folder);
// Exit code 2 naming what is wrong: no or a damaged manifest, a missing file or one of another
// size, fragments that leave a gap or overlap.
Checkpoint open_checkpoint(const string& folder);
// Reads everything, or all but moments. Exit code 2 naming the first fragment or header that
// differs from its checksum.
void verify(const Checkpoint& checkpoint, bool weights_only = false);
// The newest good checkpoint of a run, verified. Warns of each newer one that is bad, saying what
// is wrong. None if the run has no step-*; exit code 2 if it has some and none is good.
std::optional<Checkpoint> find_checkpoint(const string& run_folder);
// Weights of a Hugging Face folder, a checkpoint (verified), or a run folder (its newest good one).
Checkpoint open_weights(const string& folder);

// Refuses (exit code 2), naming the difference, to go on from `checkpoint` as the run `now`:
// another model, data, seed or optimiser, or a configuration key that may not change on resume.
void check_resumable(const Checkpoint& checkpoint, const RunState& now);
// Compares with the table of the whole model. Exit code 2 listing by name the tensors that are
// missing, extra, misshapen, or not finite. Reads all weights once.
void check_weights(const Checkpoint& weights, const ParameterTable& whole);

// Elements [begin, begin + count) of a stored tensor as F32.
void read_elements(const Checkpoint& checkpoint, const StoredTensor& tensor, int64_t begin,
                   int64_t count, float* out);
// Fill this rank's shards: of master, m and v, or of master alone. Exit code 2 naming a tensor that
// is missing or of another shape.
void load_state(Rank& rank, Parameters& parameters, const Checkpoint& checkpoint);
void load_weights(Rank& rank, Parameters& parameters, const Checkpoint& checkpoint);

// ---- writing ----

// What is stored of a parameter: the suffix of its name, and its values.
struct StateKind {
  const char* suffix;
  Tensor FlatUnit::*shard;
};
constexpr StateKind kStateKinds[] = {
    {"", &FlatUnit::master}, {".exp_avg", &FlatUnit::m}, {".exp_avg_sq", &FlatUnit::v}};

string step_name(int64_t step);  // "step-00000100"
vector<int64_t> shape_of(const Piece& piece);
uint64_t checksum_of(const void* bytes, int64_t size);
// Describes a safetensors file that is complete.
StoredFile stored_file(const string& folder, const string& name);
void write_manifest(const Checkpoint& checkpoint, const string& path);
Checkpoint read_manifest(const string& path);  // exit code 2 if missing or damaged
// Flushes folder `temporary` and renames it; one that was there before is removed.
void put_in_place(const string& temporary, const string& folder);

struct SaveOptions {
  string folder;     // the run's
  int64_t keep = 3;  // newest checkpoints kept; 0: all
};

// Writes this rank's shards on a thread of its own while training goes on. Calls that take a Rank
// are collective over the world; all ranks make them in the same order. A save that fails on any
// rank is taken back on all of them, with a warning; the caller goes on and tries again later.
class CheckpointSaver {
 public:
  // `parameters` must outlive it. Rank 0 removes what killed saves left behind; the caller holds
  // the run's lock.
  CheckpointSaver(Rank& rank, const Parameters& parameters, const SaveOptions& options);
  CheckpointSaver(const CheckpointSaver&) = delete;
  CheckpointSaver& operator=(const CheckpointSaver&) = delete;
  ~CheckpointSaver();

  // Starts to save the weights and moments as they are now, as step-<state.step>. Waits for a
  // save that is still under way.
  void begin(Rank& rank, const RunState& state);
  // Once a step, before the optimiser pass: learns how far all ranks are. Waits while one is so far
  // behind that others, waiting for it in a collective, would run into its time limit.
  void poll(Rank& rank);
  // Before the optimiser writes parameters.units[unit]: waits until its shards are saved. Local.
  void wait_unit(int unit);
  // Waits for the save under way, if any. False if the last save failed: the run exits with 1.
  bool finish(Rank& rank);

  bool under_way() const { return job_ != nullptr; }
  int64_t last_step() const { return last_step_; }  // of the last one saved; -1: none yet
  // Seconds this rank has waited for saves since the last call.
  double take_stall();

 private:
  struct Job;  // a save under way
  int64_t exchange(Rank& rank);
  void wait(Rank& rank, int64_t most_bytes_left);
  const Parameters& parameters_;
  SaveOptions options_;
  std::unique_ptr<Job> job_;
  bool last_failed_ = false;
  int64_t last_step_ = -1;
  double stall_s_ = 0;
};

}  // namespace pith
