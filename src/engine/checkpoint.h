// checkpoint: a run's state on disk, written in the background, readable under any layout.
//
//   RUN/step-00000100/rank-00000.safetensors   1-D fragments `NAME#begin`, unit by unit: weights,
//                                               `NAME.exp_avg#begin`, `NAME.exp_avg_sq#begin`
//   RUN/step-00000100/manifest.json             what the fragments are parts of, their checksums,
//                                               and RunState; written last: the truth
//
// NAME is the Hugging Face name of a tensor (one an expert), begin the fragment's first element.
// A checkpoint is written as step-00000100.tmp, flushed, and renamed: it is whole or absent. Of
// replicas only the first writes.
// A run:  RunLock lock(folder); auto found = find_checkpoint(folder);  (main thread)
//         if (found) check_resumable(*found, now);
//         per rank: if (found) load_state(rank, parameters, *found);
//         CheckpointSaver saver(rank, parameters, options);
//         each step: saver.poll(rank), then saver.wait_unit(u) before the update of unit u,
//         then at an interval saver.begin(rank, state); at the end saver.finish(rank).
// defines: RunState, Checkpoint, open_checkpoint, verify, find_checkpoint, list_checkpoints,
//          check_resumable, load_state, CheckpointSaver, WeightSource, open_weights,
//          check_weights, load_weights
#pragma once
#include <optional>

#include "data/durable.h"
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
  string model;                   // text of the model's config.json
};

// Part of a stored tensor: elements [begin, begin + count) at byte `offset` of a file.
struct StoredFragment {
  int64_t begin = 0, count = 0;
  int file = 0;
  int64_t offset = 0;
  uint64_t checksum = 0;  // XXH3 of its bytes
};
struct StoredTensor {
  string name;
  FileDType dtype = FileDType::F32;
  vector<int64_t> shape;             // of the whole tensor
  vector<StoredFragment> fragments;  // by begin; they cover the tensor
  int64_t numel() const;
};
struct StoredFile {
  string name;  // in the folder
  int64_t bytes = 0;
};
struct Checkpoint {
  string folder;
  RunState state;
  Mesh mesh;  // it was saved under
  vector<StoredFile> files;
  vector<StoredTensor> tensors;                      // by name
  vector<MappedFile> maps;                           // one a file
  const StoredTensor* find(string_view name) const;  // null if absent
};

// Reads the manifest and maps the files. Exit code 2 naming what is wrong: no or a damaged
// manifest, a missing file or one of another size, fragments that leave a gap or overlap.
Checkpoint open_checkpoint(const string& folder);
// Reads everything: checksums of all fragments, headers that agree with the manifest. Exit code 2
// naming the first file and fragment that differ.
void verify(const Checkpoint& checkpoint, bool weights_only = false);
// Sealed or not, the folders step-NNNNNNNN of a run, by step.
struct CheckpointFolder {
  int64_t step = 0;
  string path;
};
vector<CheckpointFolder> list_checkpoints(const string& run_folder);
// The newest good checkpoint of a run, verified. Warns of each newer one that is bad, saying what
// is wrong. None if the run has no step-*; exit code 2 if it has some and none is good.
std::optional<Checkpoint> find_checkpoint(const string& run_folder);

// Refuses (exit code 2), naming the difference, to go on from `checkpoint` as the run `now`:
// another model, data, seed or optimiser, or a configuration key that may not change on resume.
void check_resumable(const Checkpoint& checkpoint, const RunState& now);

// Elements [begin, begin + count) of a stored tensor as F32.
void read_elements(const Checkpoint& checkpoint, const StoredTensor& tensor, int64_t begin,
                   int64_t count, float* out);
// Fills this rank's shards of master, m and v, reading only what overlaps them. Exit code 2 naming
// a tensor that is missing or of another shape.
void load_state(Rank& rank, Parameters& parameters, const Checkpoint& checkpoint);

struct SaveOptions {
  string folder;     // the run's
  int64_t keep = 3;  // newest checkpoints kept; 0: all
  // poll() waits while a rank has more seconds than this left to write; well below the time limit
  // of collectives, because ranks that need not wait in wait_unit() wait for it there.
  double longest_wait_s = 20;
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
  // Once a step, before the optimiser pass (cheap when nothing is under way): learns what has
  // been written everywhere, and seals. Waits while some rank is so far behind that others would
  // run into the time limit of collectives.
  void poll(Rank& rank);
  // Before the optimiser writes parameters.units[unit]: waits until its shards are saved. Local.
  void wait_unit(int unit);
  // Waits for the save under way, if any. False if the last save failed: the run exits with 1.
  bool finish(Rank& rank);

  bool under_way() const;
  bool last_failed() const { return last_failed_; }
  int64_t last_step() const { return last_step_; }  // of the last sealed one; -1: none yet
  // Seconds this rank has waited for saves since the last call.
  double take_stall();

 private:
  struct Job;  // what the saver thread and the rank's share
  enum class Phase : uint8_t { Idle, Writing, Sealing };
  double exchange(Rank& rank);
  void settle(Rank& rank, bool failed);
  const Parameters& parameters_;
  SaveOptions options_;
  Phase phase_ = Phase::Idle;
  Job* job_ = nullptr;
  bool last_failed_ = false;
  int64_t last_step_ = -1;
  double stall_s_ = 0;
};

// Weights alone, from a Hugging Face folder, a checkpoint, or a run folder (its newest good
// checkpoint): what init_from, eval, generate and convert read. One of the two is there.
struct WeightSource {
  string folder;
  string config;  // text of the model's config.json; empty: there is none
  std::optional<SafetensorsReader> hugging_face;
  std::optional<Checkpoint> checkpoint;
};
// Exit code 2 naming what is wrong; a checkpoint's weights are verified. For the main thread,
// before ranks start, as is check_weights().
WeightSource open_weights(const string& folder);
// Compares with the whole model's table (engine/instance.h): missing, extra and misshapen tensors
// are listed by name; NaN and Inf are refused by name and count. Exit code 2. Reads all weights
// once.
void check_weights(const WeightSource& source, const ParameterTable& whole);
// Elements of the weight `name`, which check_weights has found, as F32.
void read_weight(const WeightSource& source, const string& name, int64_t begin, int64_t count,
                 float* out);
// Fills this rank's master shards; moments are left alone.
void load_weights(Rank& rank, Parameters& parameters, const WeightSource& source);

}  // namespace pith
