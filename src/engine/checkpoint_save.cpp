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
  std::error_code ignored;
  fs::remove_all(path, ignored);
}

// Whole and at once, so that a kill leaves no half of it under its name.
static void move_away(const string& folder, const string& to) {
  std::error_code error;
  remove_tree(to);
  fs::rename(folder, to, error);
  if (error) log_warning("%s: cannot be moved (%s)", folder.c_str(), error.message().c_str());
}

static void remove_checkpoint(const string& folder) {
  move_away(folder, folder + ".old.tmp");
  remove_tree(folder + ".old.tmp");
}

void put_in_place(const string& temporary, const string& folder) {
  sync_folder(temporary);
  if (fs::exists(folder)) remove_checkpoint(folder);
  std::error_code error;
  fs::rename(temporary, folder, error);
  if (error)
    failed(folder, "cannot be put in place (" + error.message() + ")",
           "check the permissions of the folder");
  sync_folder(folder_of(folder));
}

// Keeps the newest `keep` up to `step`. Later ones are of a course that this run has left:
// automatic resume must not take them.
static void prune(const SaveOptions& options, int64_t step) {
  const vector<CheckpointFolder> list = list_checkpoints(options.folder);
  int64_t extra = -options.keep;
  for (const CheckpointFolder& one : list) extra += one.step <= step;
  for (const CheckpointFolder& one : list) {
    if (one.step > step) {
      log_warning("%s is of an earlier course of this run: moved aside", one.path.c_str());
      move_away(one.path, one.path + ".aside");
    } else if (options.keep > 0 && extra-- > 0) {
      remove_checkpoint(one.path);
    }
  }
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
  string part_path(int r) const { return checkpoint.folder + text("/rank-%05d.json", r); }
  void reached(int next_unit) {
    unit = next_unit;
    unit.notify_all();
  }

  string run() {
    string error;
    try {
      write_shards();
      if (rank == 0) seal();
    } catch (const std::exception& e) {
      error = e.what();
    }
    bytes_left = 0;
    reached(kAllUnits);
    return error;
  }

  // A file, and a manifest of it for rank 0. Of replicas the first writes.
  void write_shards() {
    vector<Fragment> list;
    if (coord_of(checkpoint.mesh, rank).dp_rank < checkpoint.mesh.dp_shard())
      list = fragments(parameters);
    vector<TensorDecl> decls;
    for (const Fragment& f : list)
      for (const auto& [suffix, shard] : kStored)
        decls.push_back(
            {f.piece->name + suffix + "#" + std::to_string(f.begin), FileDType::F32, {f.count}});
    make_folders(checkpoint.folder);
    Checkpoint part;
    if (!list.empty()) {
      const string name = text("rank-%05d.safetensors", rank);
      SafetensorsWriter file(checkpoint.folder + "/" + name, decls);
      for (const Fragment& f : list) {
        if (cancel) return;
        reached(f.unit);
        for (const auto& [suffix, shard] : kStored) {
          const float* values = (parameters.units[size_t(f.unit)].*shard).f32() + f.offset;
          const int64_t bytes = f.count * int64_t(sizeof(float));
          StoredTensor& tensor = part.tensors[f.piece->name + suffix];
          tensor.shape = shape_of(*f.piece);
          tensor.fragments.push_back(
              {f.begin, f.count, 0, file.size(), checksum_of(values, bytes)});
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

  // Waits for what each rank has written. Ranks hold ascending fragments of a tensor.
  void seal() {
    for (int r = 0; r < checkpoint.mesh.world(); r++) {
      for (; !fs::exists(part_path(r)); std::this_thread::sleep_for(duration<double>(5e-3)))
        if (cancel) return;
      const Checkpoint part = read_manifest(part_path(r));
      for (const auto& [name, tensor] : part.tensors) {
        StoredTensor& whole = checkpoint.tensors[name];
        whole.shape = tensor.shape;
        for (StoredFragment f : tensor.fragments) {
          f.file = int(checkpoint.files.size());
          whole.fragments.push_back(f);
        }
      }
      checkpoint.files.insert(checkpoint.files.end(), part.files.begin(), part.files.end());
      remove_tree(part_path(r));
    }
    write_manifest(checkpoint, checkpoint.folder + "/manifest.json");
    open_checkpoint(checkpoint.folder);
    put_in_place(checkpoint.folder, folder());
    prune(options, checkpoint.state.step);
  }
};

CheckpointSaver::CheckpointSaver(Rank& rank, const Parameters& parameters,
                                 const SaveOptions& options)
    : parameters_(parameters), options_(options) {
  if (rank.id == 0) {
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(options.folder, error)) {
      const string name = entry.path().filename();
      if (name.starts_with("step-") && name.ends_with(".tmp")) remove_tree(entry.path());
    }
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
    job.bytes_left += unit.shard_count * int64_t(std::size(kStored) * sizeof(float));
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
  if (!error.empty()) log_warning("rank %d: %s", rank.id, error.c_str());
  if (last_failed_) {
    if (rank.id == 0) {
      remove_tree(job_->checkpoint.folder);
      log_warning("%s was not saved; those before it are untouched, and the next save tries again",
                  job_->folder().c_str());
    }
    barrier(rank, Group::World, "failed checkpoint removed");
  } else if (rank.id == 0) {
    log_info("saved %s in %.1f s", job_->folder().c_str(), now_s() - job_->begun_s);
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
