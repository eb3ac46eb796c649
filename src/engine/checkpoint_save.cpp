// Writing checkpoints: each rank's thread writes its shards, and rank 0's then seals.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <filesystem>
#include <future>
#include <thread>
#include <utility>

#include "comm/communicator.h"
#include "core/log.h"
#include "engine/checkpoint.h"

namespace pith {
namespace fs = std::filesystem;
using std::chrono::duration;

// Of the slowest rank, while the others go on: seconds of writing, on any disk.
static constexpr int64_t kMostBytesLeft = int64_t{1} << 30;
static constexpr int kAllUnits = INT32_MAX;

static void remove_tree(const string& path) {
  std::error_code error;
  fs::remove_all(path, error);
  if (error) log_warning("%s: cannot be removed (%s)", path.c_str(), error.message().c_str());
}

static void rename_folder(const string& from, const string& to) {
  std::error_code error;
  fs::rename(from, to, error);
  if (error)
    failed(to, "cannot be put in place (" + error.message() + ")",
           "check the permissions of the folder");
}

// Under another name first, so that a kill leaves no half of it to be found.
static void remove_checkpoint(const string& folder) {
  const string old = folder + ".old.tmp";
  remove_tree(old);
  rename_folder(folder, old);
  remove_tree(old);
}

void put_in_place(const string& temporary, const string& folder) {
  sync_folder(temporary);
  if (fs::exists(folder)) remove_checkpoint(folder);
  rename_folder(temporary, folder);
  sync_folder(folder_of(folder));
}

// Keeps the newest `keep` up to `step`. Later ones are of a course that this run has left:
// automatic resume must not take them.
static void prune(const SaveOptions& options, int64_t step) {
  vector<CheckpointFolder> list = list_checkpoints(options.folder);
  for (; !list.empty() && list.back().step > step; list.pop_back()) {
    const string& path = list.back().path;
    remove_tree(path + ".aside");
    rename_folder(path, path + ".aside");
    log_warning("%s is of an earlier course of this run: moved to %s.aside", path.c_str(),
                path.c_str());
  }
  const int64_t extra = options.keep > 0 ? int64_t(list.size()) - options.keep : 0;
  for (int64_t i = 0; i < extra; i++) remove_checkpoint(list[size_t(i)].path);
}

// What the rank's thread and its saver thread share.
struct CheckpointSaver::Job {
  const Parameters& parameters;
  const SaveOptions& options;
  int rank = 0;
  Checkpoint checkpoint;     // under way: its folder is the temporary one
  std::atomic<int> unit{0};  // units before this one are saved
  std::atomic<int64_t> bytes_left{0};
  std::atomic<bool> cancel{false};
  double begun_s = now_s();
  std::shared_future<string> done;  // what went wrong; empty: nothing

  string folder() const { return options.folder + "/" + step_name(checkpoint.state.step); }
  string part_path(int of_rank) const {
    return checkpoint.folder + text("/rank-%05d.json", of_rank);
  }
  bool writes(int of_rank) const {  // of replicas, the first
    return coord_of(checkpoint.mesh, of_rank).dp_rank < checkpoint.mesh.dp_shard();
  }
  void reached(int next_unit) {
    unit = next_unit;
    unit.notify_all();
  }
  string run();
  void write_shards();
  void seal();
};

string CheckpointSaver::Job::run() {
  string error;
  try {
    if (writes(rank)) write_shards();
    reached(kAllUnits);
    if (rank == 0) seal();
  } catch (const std::exception& e) {
    error = e.what();
  }
  bytes_left = 0;
  reached(kAllUnits);
  return error;
}

void CheckpointSaver::Job::write_shards() {
  const vector<Fragment> list = fragments(parameters);
  const string name = text("rank-%05d.safetensors", rank);
  vector<TensorDecl> decls;
  for (const Fragment& f : list)
    for (const StateKind& kind : kStateKinds)
      decls.push_back(
          {f.piece->name + kind.suffix + "#" + std::to_string(f.begin), FileDType::F32, {f.count}});
  make_folders(checkpoint.folder);
  Checkpoint part;
  if (!list.empty()) {
    SafetensorsWriter file(checkpoint.folder + "/" + name, decls);
    for (const Fragment& f : list) {
      reached(f.unit);
      for (const StateKind& kind : kStateKinds) {
        if (cancel) return;
        const Tensor& shard = parameters.units[size_t(f.unit)].*kind.shard;
        const float* values = shard.f32() + f.offset;
        const int64_t bytes = f.count * int64_t(sizeof(float));
        StoredTensor& tensor = part.tensors[f.piece->name + kind.suffix];
        tensor.shape = shape_of(*f.piece);
        tensor.fragments.push_back({f.begin, f.count, 0, file.size(), checksum_of(values, bytes)});
        file.write(values, bytes);
        bytes_left -= bytes;
      }
    }
    reached(kAllUnits);
    file.finish();
    part.files.push_back(stored_file(checkpoint.folder, name));
  }
  write_manifest(part, part_path(rank));
}

// Waits for what each rank has written.
void CheckpointSaver::Job::seal() {
  for (int r = 0; r < checkpoint.mesh.world(); r++) {
    if (!writes(r)) continue;
    const string path = part_path(r);
    for (; !fs::exists(path); std::this_thread::sleep_for(duration<double>(5e-3)))
      if (cancel) return;
    const Checkpoint part = read_manifest(path);
    for (const auto& [name, tensor] : part.tensors) {
      StoredTensor& whole = checkpoint.tensors[name];
      whole.shape = tensor.shape;
      for (StoredFragment f : tensor.fragments) {
        f.file = int(checkpoint.files.size());
        whole.fragments.push_back(f);
      }
    }
    checkpoint.files.insert(checkpoint.files.end(), part.files.begin(), part.files.end());
    remove_tree(path);
  }
  write_manifest(checkpoint, checkpoint.folder + "/manifest.json");
  open_checkpoint(checkpoint.folder);
  put_in_place(checkpoint.folder, folder());
  try {
    prune(options, checkpoint.state.step);
  } catch (const Error& e) {  // the checkpoint is good all the same
    log_warning("%s", e.what());
  }
}

CheckpointSaver::CheckpointSaver(Rank& rank, const Parameters& parameters,
                                 const SaveOptions& options)
    : parameters_(parameters), options_(options) {
  if (rank.id == 0) {
    std::error_code error;
    vector<string> old;
    for (const auto& entry : fs::directory_iterator(options.folder, error)) {
      const string name = entry.path().filename();
      if (name.starts_with("step-") && name.ends_with(".tmp")) old.push_back(entry.path());
    }
    for (const string& path : old) remove_tree(path);
  }
  barrier(rank, Group::World, "checkpoint clean-up");
}

CheckpointSaver::~CheckpointSaver() {
  if (job_) job_->cancel = true;  // its future waits for the thread
}

void CheckpointSaver::begin(Rank& rank, const RunState& state) {
  finish(rank);
  job_.reset(new Job{parameters_, options_, rank.id});
  Job& job = *job_;
  job.checkpoint.state = state;
  if (rank.comm) job.checkpoint.mesh = mesh_of(rank);
  job.checkpoint.folder = job.folder() + ".tmp";
  for (const FlatUnit& unit : parameters_.units)
    job.bytes_left += unit.shard_count * int64_t(std::size(kStateKinds) * sizeof(float));
  job.done = std::async(std::launch::async, [&job] { return job.run(); });
}

// Learns how far all ranks are, and ends the save once they are done. Bytes that the slowest has
// yet to write; -1 when no save is under way.
int64_t CheckpointSaver::exchange(Rank& rank) {
  if (!job_) return -1;
  const bool done = job_->done.wait_for(duration<double>(0)) == std::future_status::ready;
  const string error = done ? job_->done.get() : "";
  double v[] = {double(!done), double(!error.empty()), double(job_->bytes_left)};
  all_reduce(rank, Group::World, v, 3, Reduce::Max, "checkpoint progress");
  last_failed_ = v[1] > 0;
  if (last_failed_) job_->cancel = true;
  if (v[0] > 0) return int64_t(v[2]);
  const string folder = job_->folder();
  if (!error.empty()) log_warning("rank %d: %s", rank.id, error.c_str());
  if (last_failed_) {
    if (rank.id == 0) {
      remove_tree(job_->checkpoint.folder);
      log_warning("%s was not saved; those before it are untouched, and the next save tries again",
                  folder.c_str());
    }
    barrier(rank, Group::World, "failed checkpoint removed");
  } else {
    last_step_ = job_->checkpoint.state.step;
    if (rank.id == 0) log_info("saved %s in %.1f s", folder.c_str(), now_s() - job_->begun_s);
  }
  job_.reset();
  return -1;
}

void CheckpointSaver::wait(Rank& rank, int64_t most_bytes_left) {
  for (double pause = 2e-4; exchange(rank) > most_bytes_left; pause = std::min(pause * 1.5, 0.02)) {
    std::this_thread::sleep_for(duration<double>(pause));
    stall_s_ += pause;
  }
}

void CheckpointSaver::poll(Rank& rank) { wait(rank, kMostBytesLeft); }

bool CheckpointSaver::finish(Rank& rank) {
  wait(rank, -1);
  return !last_failed_;
}

void CheckpointSaver::wait_unit(int unit) {
  if (!job_) return;
  for (int saved = job_->unit; saved <= unit; saved = job_->unit) {
    const double begun = now_s();
    job_->unit.wait(saved);
    stall_s_ += now_s() - begun;
  }
}

double CheckpointSaver::take_stall() { return std::exchange(stall_s_, 0); }

}  // namespace pith
