// Saving while training goes on: a thread a rank writes, the ranks' own threads agree on progress.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <filesystem>

#include "comm/communicator.h"
#include "core/log.h"
#include "engine/checkpoint_parts.h"

namespace pith {
namespace fs = std::filesystem;

namespace {

constexpr int64_t kPiece = 4 << 20;  // bytes hashed and written at once
constexpr int kAllUnits = INT32_MAX;

// A fragment and its bytes, which stay as they are until their unit may be updated.
struct Source {
  FragmentPlan plan;
  const char* data = nullptr;
  int unit = 0;
};

// What this rank writes, unit by unit.
vector<Source> sources_of(const Parameters& p) {
  vector<Source> list;
  const vector<Fragment> all = fragments(p);
  for (size_t begin = 0, end = 0; begin < all.size(); begin = end) {
    const int u = all[begin].unit;
    const FlatUnit& unit = p.units[size_t(u)];
    while (end < all.size() && all[end].unit == u) end++;
    const auto add = [&](const Tensor& shard, const char* suffix) {
      for (size_t i = begin; i < end; i++) {
        const Fragment& f = all[i];
        const Dims& dims = f.piece->dims;
        list.push_back({{f.piece->name + suffix,
                         {dims.size, dims.size + dims.rank},
                         FileDType::F32,
                         f.begin,
                         f.count},
                        shard.data + f.offset * size_of(shard.dtype),
                        u});
      }
    };
    add(unit.master, "");
    add(unit.m, kExpAvg);
    add(unit.v, kExpAvgSq);
  }
  return list;
}

string part_name(int rank) { return text("/rank-%05d.json", rank); }

bool writes(const Mesh& mesh, int rank) {
  return coord_of(mesh, rank).dp_rank < mesh.dp_shard();  // the first replica
}

bool is_leftover(const string& name) { return name.starts_with("step-") && name.ends_with(".tmp"); }

// Keeps the newest `keep` up to `step`. Later ones are of a course that this run has left:
// automatic resume must not take them.
void prune(const string& run_folder, int64_t step, int64_t keep) {
  vector<CheckpointFolder> list = list_checkpoints(run_folder);
  while (!list.empty() && list.back().step > step) {
    const string& path = list.back().path;
    const string aside = path + ".aside";
    remove_folder(aside);
    if (rename(path.c_str(), aside.c_str()) == 0)
      log_warning("%s is of an earlier course of this run: moved to %s", path.c_str(),
                  aside.c_str());
    list.pop_back();
  }
  for (size_t i = 0; keep > 0 && i + size_t(keep) < list.size(); i++) {
    const string gone = list[i].path + ".tmp";
    if (rename(list[i].path.c_str(), gone.c_str()) == 0) remove_folder(gone);
  }
  sync_folder(run_folder);
}

// Sleeps a little longer each time; the same on all ranks.
void nap(double& seconds) {
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
  seconds = std::min(seconds * 1.5, 0.02);
}

}  // namespace

// What the rank's thread and its saver thread share; fields below `mutex` are guarded by it.
struct CheckpointSaver::Job {
  int rank = 0;
  Mesh mesh;
  RunState state;
  SaveOptions options;
  vector<Source> sources;
  string folder, temporary;  // of the checkpoint
  int64_t bytes_total = 0;
  double begun_s = 0, waited_s = 0;
  std::thread thread;
  std::atomic<bool> cancel{false};

  std::mutex mutex;
  std::condition_variable changed;
  int units_saved = 0;  // units before this one may be written to
  int64_t bytes_saved = 0;
  bool finished = false, gave_up = false;
  string error;  // empty: none

  // Runs `work` on a new thread, and notes how it ended.
  template <class Work>
  void start(Work work) {
    finished = false;
    thread = std::thread([this, work] {
      string what;
      try {
        (this->*work)();
      } catch (const std::exception& e) {
        what = e.what();
      }
      const std::lock_guard lock(mutex);
      error = what;
      finished = true;
      units_saved = kAllUnits;
      changed.notify_all();
    });
  }

  void write_source(FragmentWriter& file, const Source& source) {
    const int64_t bytes = source.plan.count * size_of(source.plan.dtype);
    for (int64_t at = 0; at < bytes; at += kPiece) {
      if (cancel) {
        gave_up = true;
        failed(temporary, "was given up");
      }
      const int64_t piece = std::min(kPiece, bytes - at);
      file.write(source.data + at, piece);
      const std::lock_guard lock(mutex);
      bytes_saved += piece;
    }
  }

  void write_shards() {
    if (!writes(mesh, rank)) return;
    make_folders(temporary);
    Checkpoint part;
    if (!sources.empty()) {
      vector<FragmentPlan> plan;
      for (const Source& source : sources) plan.push_back(source.plan);
      FragmentWriter file(temporary, text("rank-%05d.safetensors", rank), std::move(plan));
      for (size_t i = 0; i < sources.size(); i++) {
        write_source(file, sources[i]);
        if (i + 1 < sources.size() && sources[i + 1].unit == sources[i].unit) continue;
        const std::lock_guard lock(mutex);
        units_saved = i + 1 < sources.size() ? sources[i + 1].unit : kAllUnits;
        changed.notify_all();
      }
      part = file.finish();
    }
    write_file_durably(temporary + part_name(rank), manifest_text(part));
  }

  // After all ranks have written.
  void seal_all() {
    Checkpoint all;
    all.state = state;
    all.mesh = mesh;
    for (int r = 0; r < mesh.world(); r++) {
      if (!writes(mesh, r)) continue;
      const string part = temporary + part_name(r);
      add_fragments(all, read_manifest(part));
      if (unlink(part.c_str()) != 0) failed(part, "cannot be removed");
    }
    seal(all, temporary, folder);
    try {
      prune(options.folder, state.step, options.keep);
    } catch (const Error& e) {  // the checkpoint is good all the same
      log_warning("%s", e.what());
    }
  }
};

CheckpointSaver::CheckpointSaver(Rank& rank, const Parameters& parameters,
                                 const SaveOptions& options)
    : parameters_(parameters), options_(options) {
  if (rank.id == 0) {
    std::error_code error;
    vector<string> old;
    for (const auto& entry : fs::directory_iterator(options.folder, error))
      if (is_leftover(entry.path().filename())) old.push_back(entry.path());
    for (const string& path : old) remove_folder(path);
  }
  barrier(rank, Group::World, "checkpoint clean-up");
}

CheckpointSaver::~CheckpointSaver() {
  if (!job_) return;
  job_->cancel = true;
  if (job_->thread.joinable()) job_->thread.join();
  delete job_;
}

bool CheckpointSaver::under_way() const { return phase_ != Phase::Idle; }

double CheckpointSaver::take_stall() {
  const double stall = stall_s_;
  stall_s_ = 0;
  return stall;
}

void CheckpointSaver::begin(Rank& rank, const RunState& state) {
  finish(rank);
  delete job_;
  job_ = new Job;
  job_->rank = rank.id;
  job_->mesh = rank.comm ? mesh_of(rank) : Mesh{};
  job_->state = state;
  job_->options = options_;
  job_->sources = sources_of(parameters_);
  job_->folder = options_.folder + "/" + step_name(state.step);
  job_->temporary = job_->folder + ".tmp";
  for (const Source& source : job_->sources)
    job_->bytes_total += source.plan.count * size_of(source.plan.dtype);
  const bool any = !job_->sources.empty() && writes(job_->mesh, rank.id);
  job_->units_saved = any ? job_->sources[0].unit : kAllUnits;
  job_->begun_s = now_s();
  phase_ = Phase::Writing;
  job_->start(&Job::write_shards);
}

// Learns how far all ranks are and takes the step that all can take. Seconds until the slowest has
// written its shards; negative once the save is over.
double CheckpointSaver::exchange(Rank& rank) {
  double v[4] = {};  // unfinished, failed, seconds left, seconds waited
  {
    const std::lock_guard lock(job_->mutex);
    const double done = double(job_->bytes_saved), spent = now_s() - job_->begun_s;
    const double left = double(job_->bytes_total) - done;
    v[0] = !job_->finished;
    v[1] = job_->finished && !job_->error.empty();
    if (job_->units_saved < kAllUnits) v[2] = done > 0 ? left / done * spent : spent;
    v[3] = job_->waited_s;
  }
  all_reduce(rank, Group::World, v, 4, Reduce::Max, "checkpoint progress");
  const bool failed = v[1] > 0;
  if (failed) job_->cancel = true;
  if (v[0] > 0) return v[2];
  if (job_->thread.joinable()) job_->thread.join();
  job_->waited_s = v[3];
  if (failed || phase_ == Phase::Sealing) {
    settle(rank, failed);
    return -1;
  }
  phase_ = Phase::Sealing;
  if (rank.id == 0) job_->start(&Job::seal_all);
  return 0;
}

void CheckpointSaver::settle(Rank& rank, bool failed) {
  phase_ = Phase::Idle;
  last_failed_ = failed;
  const char* name = job_->folder.c_str();
  if (!failed) {
    last_step_ = job_->state.step;
    if (rank.id == 0)
      log_info("saved %s in %.1f s; training waited %.2f s", name, now_s() - job_->begun_s,
               job_->waited_s);
    return;
  }
  if (!job_->error.empty() && !job_->gave_up)
    log_warning("rank %d: %s", rank.id, job_->error.c_str());
  if (rank.id == 0) {
    remove_folder(job_->temporary);
    log_warning("%s was not saved; those before it are untouched, and the next save tries again",
                name);
  }
  barrier(rank, Group::World, "failed checkpoint removed");
}

void CheckpointSaver::poll(Rank& rank) {
  if (phase_ == Phase::Idle) return;
  double pause = 2e-4, begun = 0;
  while (exchange(rank) > options_.longest_wait_s) {
    if (begun == 0) begun = now_s();
    nap(pause);
  }
  const double waited = begun > 0 ? now_s() - begun : 0;
  stall_s_ += waited;
  job_->waited_s += waited;
}

void CheckpointSaver::wait_unit(int unit) {
  if (phase_ != Phase::Writing) return;
  std::unique_lock lock(job_->mutex);
  if (job_->units_saved > unit) return;
  const double begun = now_s();
  job_->changed.wait(lock, [&] { return job_->units_saved > unit; });
  stall_s_ += now_s() - begun;
  job_->waited_s += now_s() - begun;
}

bool CheckpointSaver::finish(Rank& rank) {
  double begun = now_s(), pause = 2e-4;
  while (phase_ != Phase::Idle && exchange(rank) >= 0) {
    nap(pause);
    stall_s_ += now_s() - begun;
    begun = now_s();
  }
  return !last_failed_;
}

}  // namespace pith
