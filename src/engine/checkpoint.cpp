#include "engine/checkpoint.h"

#include <xxhash.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <filesystem>
#include <future>
#include <nlohmann/json.hpp>
#include <ranges>
#include <sstream>
#include <thread>

#include "comm/communicator.h"
#include "core/cuda.h"
#include "core/json.h"
#include "core/log.h"
#include "engine/config.h"

namespace pith {
namespace fs = std::filesystem;
using std::chrono::duration;

static constexpr const char* kManifest = "/manifest.json";

[[noreturn]] static void damaged(const string& path, const string& what) {
  bad_input(path, what, "restore it, or remove it to use the checkpoint before");
}

static constexpr std::pair<const char*, Tensor FlatUnit::*> kStored[] = {
    {"", &FlatUnit::master}, {".exp_avg", &FlatUnit::m}, {".exp_avg_sq", &FlatUnit::v}};

static u64 checksum_of(const void* bytes, i64 size) { return XXH3_64bits(bytes, size_t(size)); }

static bool is_moment(const string& name) {
  return name.ends_with(kStored[1].first) || name.ends_with(kStored[2].first);
}

static string step_name(i64 step) { return text("step-%08ld", step); }

vector<i64> shape_of(const Piece& piece) {
  return {piece.dims.size, piece.dims.size + piece.dims.rank};
}

static void to_json(nlohmann::json& json, FileDType dtype) { json = name_of(dtype); }
static void from_json(const nlohmann::json& json, FileDType& dtype) {
  for (int i = 0; json != name_of(dtype) && dtype != FileDType::BOOL;) dtype = FileDType(++i);
}
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(RunState, step, updates, samples, seed, data_fingerprint,
    optimizer, balance_counts, config, model)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Mesh, pp, dp, cp, ep, dp_replicate)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(StoredFragment, begin, count, file, offset)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(StoredTensor, dtype, shape, fragments)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(StoredFile, name, bytes, checksum)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Checkpoint, state, mesh, files, tensors)

// With a version and a checksum of the rest.
static string sealed(const string& rest) {
  return text("{\"pith_checkpoint_3_xxh3\": \"%016lx\",",
             checksum_of(rest.data(), i64(rest.size()))) +
         rest;
}

void write_manifest(const Checkpoint& c, const string& path) {
  auto replace = nlohmann::json::error_handler_t::replace;  // of what is not UTF-8
  write_file_durably(path, sealed(nlohmann::json(c).dump(-1, ' ', false, replace).substr(1)));
}

static Checkpoint read_manifest(const string& path) {
  string bytes = read_text_file(path);
  size_t start = min(bytes.size(), sealed("").size());
  if (bytes != sealed(bytes.substr(start)))
    damaged(path, "is damaged or cut short, or of another version of Pith");
  return nlohmann::json::parse(bytes).get<Checkpoint>();
}

StoredFile stored_file(const string& folder, const string& name) {
  const MappedFile map(folder + "/" + name);
  return {name, map.size(), checksum_of(map.data(), map.size()), map};
}

Checkpoint open_checkpoint(const string& folder) {
  if (!fs::is_directory(folder))
    bad_input(folder, "there is no such checkpoint", "pith checkpoint verify on the run folder");
  if (!fs::exists(folder + kManifest))
    bad_input(folder, "is no finished checkpoint (it has no manifest.json)",
        "name a step-* folder that has one");
  Checkpoint c = read_manifest(folder + kManifest);
  c.folder = folder;
  for (StoredFile& file : c.files) {
    string path = folder + "/" + file.name;
    if (!fs::exists(path)) damaged(path, "is missing, but the manifest names it");
    file.map = MappedFile(path);
    if (file.map.size() != file.bytes)
      damaged(path, text("is cut short or is another file (got %ld bytes, need %ld)",
                        file.map.size(), file.bytes));
  }
  return c;
}

void verify(const Checkpoint& c) {
  vector<std::future<u64>> sums;
  for (const StoredFile& file : c.files)
    sums.push_back(std::async(std::launch::async, checksum_of, file.map.data(), file.bytes));
  for (size_t i = 0; i < sums.size(); i++)
    if (u64 got = sums[i].get(); got != c.files[i].checksum)
      damaged(c.files[i].map.path(),
          text("is damaged (checksum %016lx, need %016lx)", got, c.files[i].checksum));
}

std::map<i64, string> list_checkpoints(const string& run_folder) {
  std::map<i64, string> list;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(run_folder, error)) {
    string name = entry.path().filename();
    i64 step = name.starts_with("step-") ? strtoll(name.c_str() + 5, nullptr, 10) : -1;
    if (name == step_name(step)) list[step] = entry.path();
  }
  return list;
}

std::optional<Checkpoint> find_checkpoint(const string& run_folder) {
  const std::map<i64, string> list = list_checkpoints(run_folder);
  for (const auto& [step, path] : list | std::views::reverse) {
    try {
      Checkpoint c = open_checkpoint(path);
      verify(c);
      return c;
    } catch (const Error& error) {
      log_warning("checkpoint %s is left aside: %s", path.c_str(), error.what());
    }
  }
  if (list.empty()) return std::nullopt;
  bad_input(run_folder,
      text("none of its checkpoints is good (got %zu bad ones, named above)", list.size()),
      "another run.folder, to begin anew");
}

Checkpoint open_weights(const string& folder) {
  if (!list_checkpoints(folder).empty()) return *find_checkpoint(folder);
  if (fs::exists(folder + kManifest)) {
    Checkpoint c = open_checkpoint(folder);
    verify(c);
    return c;
  }
  const Safetensors weights = open_safetensors(folder);
  Checkpoint c{.folder = folder, .state = {.optimizer = "none"}};
  string config = folder + "/config.json";
  if (fs::exists(config)) c.state.model = read_text_file(config);
  for (const MappedFile& file : weights.files)
    c.files.push_back({.name = file.path(), .bytes = file.size(), .map = file});
  for (const auto& [name, t] : weights.tensors)
    c.tensors[name] = {t, {{0, t.numel(), t.file, t.data - c.files[t.file].map.data()}}};
  return c;
}

static std::map<string, string> identity_of(const RunState& s) {
  std::map<string, string> values;
  string section;
  std::istringstream lines(s.config);
  for (string line; std::getline(lines, line);) {
    size_t equals = line.find(" = ");
    if (line.starts_with("["))
      section = line.substr(1, line.find(']') - 1) + ".";
    else if (equals != string::npos && !may_change_on_resume(section + line.substr(0, equals)))
      values[section + line.substr(0, equals)] = line.substr(equals + 3);
  }
  const nlohmann::json model = nlohmann::json::parse(s.model);
  for (const auto& [key, value] : model.items()) values["the model's " + key] = value.dump();
  values["data.seed"] = std::to_string(s.seed);
  values["the data set (its fingerprint)"] = text("%016lx", s.data_fingerprint);
  values["the optimiser"] = s.optimizer;
  return values;
}

void check_resumable(const Checkpoint& c, const RunState& now) {
  if (c.state.optimizer == "none")
    bad_input(c.folder, "holds weights alone, without optimiser state",
        "model.init_from, to begin a run from them");
  std::map<string, string> before = identity_of(c.state), after = identity_of(now);
  for (const auto& [key, value] : before) after.try_emplace(key, "nothing");
  for (const auto& [key, value] : after)
    if (auto at = before.try_emplace(key, "nothing").first; at->second != value)
      bad_input(c.folder,
          key + " differs from the saved run's (got " + value + ", need " + at->second + ")",
          "the saved value, or another run.folder to begin anew");
}

void check_weights(const Checkpoint& c, const ParameterTable& whole) {
  std::map<string, vector<string>> faults;
  std::map<string, StoredTensor> left = c.tensors;
  for (const Parameter& parameter : whole)
    for (const Piece& piece : parameter.pieces) {
      auto found = left.extract(piece.name);
      if (!found) {
        faults["missing"].push_back(piece.name);
        continue;
      }
      const StoredTensor& got = found.mapped();
      const TensorDecl need{"", is_float(got.dtype) ? got.dtype : FileDType::F32, shape_of(piece)};
      if (describe(got) != describe(need)) {
        faults["of another shape or type"].push_back(
            piece.name + " (got " + describe(got) + ", need " + describe(need) + ")");
        continue;
      }
      vector<float> values = read_tensor(c, got);
      i64 bad = std::ranges::count_if(values, [](float x) { return !std::isfinite(x); });
      string count = text(" (%ld of %zu values)", bad, values.size());
      if (bad > 0) faults["tensors with NaN or Inf"].push_back(piece.name + count);
    }
  for (const auto& [name, tensor] : left)
    if (!is_moment(name)) faults["not of this model"].push_back(name + " " + describe(tensor));
  string what;
  for (const auto& [fault, names] : faults) {
    what += text("; %zu %s: ", names.size(), fault.c_str());
    for (size_t i = 0; i < min<size_t>(names.size(), 10); i++) what += (i ? ", " : "") + names[i];
    if (names.size() > 10) what += ", ...";
  }
  if (!what.empty())
    bad_input(c.folder, "the weights do not fit" + what,
        "the config.json of these weights, or weights of a run that did not diverge");
}

void read_elements(
    const Checkpoint& c, const StoredTensor& tensor, i64 begin, i64 count, float* out) {
  i64 left = count;
  for (const StoredFragment& f : tensor.fragments) {
    i64 from = max(begin, f.begin), to = min(begin + count, f.begin + f.count);
    if (from >= to) continue;
    i64 offset = f.offset + (from - f.begin) * size_of(tensor.dtype);
    to_f32(tensor.dtype, c.files[f.file].map.data() + offset, out + (from - begin), to - from);
    left -= to - from;
  }
  if (left) damaged(c.folder, text("lacks %ld elements of a tensor", left));
}

vector<float> read_tensor(const Checkpoint& c, const StoredTensor& tensor) {
  vector<float> values(tensor.numel());
  read_elements(c, tensor, 0, tensor.numel(), values.data());
  return values;
}

void load_state(Rank& rank, Parameters& p, const Checkpoint& c, bool moments) {
  for (const Fragment& f : fragments(p))
    for (const auto& [suffix, shard] : kStored) {
      if (*suffix && !moments) continue;
      string name = f.piece->name + suffix;
      auto at = c.tensors.find(name);
      bool found = at != c.tensors.end();
      if (!found || at->second.shape != shape_of(*f.piece))
        bad_input(c.folder + ": " + name,
            found ? "has another shape than the model's" : "is missing",
            "the config.json that it was trained with");
      float* to = (p.units[f.unit].*shard).f32() + f.offset;
      vector<float> values(kCuda && rank.device == Device::CUDA ? f.count : 0);
      read_elements(c, at->second, f.begin, f.count, values.empty() ? to : values.data());
      if constexpr (kCuda)
        if (!values.empty()) cuda_copy(rank, to, values.data(), f.count * 4);
    }
}

static void remove_tree(const string& path) {
  std::error_code ignored;
  fs::remove_all(path, ignored);
}

static void remove_checkpoint(const string& folder) {
  string old = folder + ".old.tmp";
  std::error_code error;
  remove_tree(old);
  fs::rename(folder, old, error);
  if (error) log_warning("%s: cannot be removed (%s)", folder.c_str(), error.message().c_str());
  remove_tree(old);
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

// Later ones than `now` go too: a resume must not take them.
static void prune(const SaveOptions& options, i64 now) {
  const std::map<i64, string> list = list_checkpoints(options.folder);
  i64 extra = std::distance(list.begin(), list.upper_bound(now)) - options.keep;
  for (const auto& [step, path] : list) {
    if (step > now) log_warning("%s is of an earlier course: removed", path.c_str());
    if (step > now || (options.keep > 0 && extra-- > 0)) remove_checkpoint(path);
  }
}

struct CheckpointSaver::Job {
  const Parameters& parameters;
  const SaveOptions& options;
  int rank = 0;
  Checkpoint checkpoint;
  std::atomic<int> unit{0};
  std::atomic<bool> cancel{false};
  double begun_s = now_s();
  std::shared_future<string> done;

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
    reached(INT32_MAX);
    return error;
  }

  // A GPU's memory goes through a buffer.
  static void write(DurableFile& file, const Tensor& values) {
    if (!kCuda || values.device == Device::CPU) return file.write(values.data, values.bytes());
    constexpr i64 kBuffer = i64{1} << 26;
    vector<char> buffer(min(kBuffer, values.bytes()));
    for (i64 at = 0; at < values.bytes(); at += kBuffer) {
      i64 n = min(kBuffer, values.bytes() - at);
      if constexpr (kCuda)
        cuda_read(*values.storage.get()->allocator->cuda, buffer.data(), values.data + at, n);
      file.write(buffer.data(), n);
    }
  }

  // Of replicas the first writes.
  void write_shards() {
    Checkpoint part;
    vector<Fragment> list;
    vector<TensorDecl> decls;
    if (coord_of(checkpoint.mesh, rank).dp_rank < checkpoint.mesh.dp_shard())
      list = fragments(parameters);
    for (const Fragment& f : list)
      for (const auto& [suffix, shard] : kStored)
        decls.push_back(
            {f.piece->name + suffix + "#" + std::to_string(f.begin), FileDType::F32, {f.count}});
    make_folders(checkpoint.folder);
    if (!list.empty()) {
      string name = text("rank-%05d.safetensors", rank);
      DurableFile file(checkpoint.folder + "/" + name);
      write_header(file, decls);
      for (const Fragment& f : list) {
        if (cancel) return;
        reached(f.unit);
        for (const auto& [suffix, shard] : kStored) {
          StoredTensor& tensor = part.tensors[f.piece->name + suffix];
          tensor.shape = shape_of(*f.piece);
          tensor.fragments.push_back({f.begin, f.count, 0, file.size()});
          write(file, (parameters.units[f.unit].*shard).slice_rows(f.offset, f.offset + f.count));
        }
      }
      reached(INT32_MAX);
      file.finish();
      part.files.push_back(stored_file(checkpoint.folder, name));
    }
    write_manifest(part, part_path(rank));
  }

  void seal() {
    for (int r = 0; r < checkpoint.mesh.world(); r++) {
      for (; !fs::exists(part_path(r)); std::this_thread::sleep_for(duration<double>(5e-3)))
        if (cancel) return;
      const Checkpoint part = read_manifest(part_path(r));
      for (const auto& [name, tensor] : part.tensors) {
        StoredTensor& whole = checkpoint.tensors[name];
        whole.shape = tensor.shape;
        whole.fragments.push_back(tensor.fragments[0]);
        whole.fragments.back().file = int(checkpoint.files.size());
      }
      checkpoint.files.insert(checkpoint.files.end(), part.files.begin(), part.files.end());
      remove_tree(part_path(r));
    }
    write_manifest(checkpoint, checkpoint.folder + kManifest);
    put_in_place(checkpoint.folder, folder());
    prune(options, checkpoint.state.step);
  }
};

CheckpointSaver::CheckpointSaver(
    Rank& rank, const Parameters& parameters, const SaveOptions& options)
    : parameters_(parameters), options_(options) {
  if (rank.id == 0) {
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(options.folder, error)) {
      string name = entry.path().filename();
      if (name.starts_with("step-") && name.ends_with(".tmp")) remove_tree(entry.path());
    }
  }
  barrier(rank, Group::World, "checkpoint clean-up");
}

CheckpointSaver::~CheckpointSaver() {
  if (job_) job_->cancel = true;
}

void CheckpointSaver::begin(Rank& rank, const RunState& state) {
  finish(rank);
  job_.reset(new Job{parameters_, options_, rank.id});
  Job& job = *job_;
  job.checkpoint.state = state;
  if (rank.comm) job.checkpoint.mesh = mesh_of(rank);
  job.checkpoint.folder = job.folder() + ".tmp";
  if constexpr (kCuda)
    if (rank.device == Device::CUDA) cuda_sync(cuda_of(rank));
  job.done = std::async(std::launch::async, [&job] { return job.run(); });
}

// Ends the save once all ranks are done, unless the slowest has few units left.
void CheckpointSaver::wait(Rank& rank, int most_units_left) {
  for (double pause = 2e-4; job_; pause = min(pause * 1.5, 0.02)) {
    bool done = job_->done.wait_for(duration<double>(0)) == std::future_status::ready;
    string error = done ? job_->done.get() : "";
    int left = max(int(parameters_.units.size()) - job_->unit, 0);
    double v[] = {done ? -1.0 : left, double(!error.empty())};
    all_reduce(rank, Group::World, v, 2, Reduce::Max, "checkpoint progress");
    last_failed_ = v[1] > 0;
    if (last_failed_) job_->cancel = true;
    if (v[0] >= 0 && v[0] <= most_units_left) return;
    if (v[0] >= 0) {
      std::this_thread::sleep_for(duration<double>(pause));
      stall_s_ += pause;
      continue;
    }
    string folder = job_->folder();
    if (!error.empty()) log_warning("rank %d: %s", rank.id, error.c_str());
    if (rank.id == 0 && last_failed_) {
      remove_tree(job_->checkpoint.folder);
      log_warning("%s was not saved; the next save tries again", folder.c_str());
    } else if (rank.id == 0) {
      log_info("saved %s in %.1f s", folder.c_str(), now_s() - job_->begun_s);
    }
    barrier(rank, Group::World, "checkpoint saved or removed");
    job_.reset();
  }
}

// Or others could meet a collective's time limit.
void CheckpointSaver::poll(Rank& rank) { wait(rank, 2); }

bool CheckpointSaver::finish(Rank& rank) {
  wait(rank, -1);
  return !last_failed_;
}

void CheckpointSaver::wait_unit(int unit) {
  if (!job_) return;
  for (int saved = job_->unit; saved <= unit; saved = job_->unit) {
    double begun = now_s();
    job_->unit.wait(saved);
    stall_s_ += now_s() - begun;
  }
}

}
