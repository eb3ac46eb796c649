#include "engine/checkpoint.h"

#include <xxhash.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <thread>

#include "core/json.h"
#include "core/log.h"
#include "engine/config.h"

namespace pith {
namespace fs = std::filesystem;

static constexpr int kVersion = 2;
static constexpr const char* kManifest = "/manifest.json";
static const char* const kRestore = "restore it, or remove it to use the checkpoint before";
static const char* const kItsConfig = "the config.json that it was trained with";

static string hex(uint64_t value) { return text("%016lx", value); }

uint64_t checksum_of(const void* bytes, int64_t size) { return XXH3_64bits(bytes, size_t(size)); }

static bool is_moment(const string& name) {
  return name.ends_with(kStateKinds[1].suffix) || name.ends_with(kStateKinds[2].suffix);
}

string step_name(int64_t step) { return text("step-%08ld", step); }

vector<int64_t> shape_of(const Piece& piece) {
  return {piece.dims.size, piece.dims.size + piece.dims.rank};
}

int64_t StoredTensor::numel() const {
  int64_t n = 1;
  for (const int64_t size : shape) n *= size;
  return n;
}

// Calls fn(i), which must not throw, for each i < n on a few threads.
template <class Fn>
static void in_parallel(size_t n, const Fn& fn) {
  std::atomic<size_t> next{0};
  vector<std::jthread> threads;
  for (size_t t = 0; t < std::min<size_t>({n, std::thread::hardware_concurrency(), 8}); t++)
    threads.emplace_back([&] {
      for (size_t i = next++; i < n; i = next++) fn(i);
    });
}

// ---- manifest ----

static void to_json(nlohmann::json& json, FileDType dtype) { json = name_of(dtype); }
static void from_json(const nlohmann::json& json, FileDType& dtype) {
  for (int i = 0; json != name_of(dtype = FileDType(i)); i++)
    if (dtype == FileDType::BOOL) json.at("dtype");  // throws
}
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(RunState, step, updates, samples, seed, data_fingerprint,
                                   optimizer, balance_counts, config, model)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Mesh, pp, dp, cp, ep, dp_replicate)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(StoredFragment, begin, count, file, offset, checksum)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(StoredTensor, dtype, shape, fragments)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(StoredFile, name, bytes, header_bytes, header_checksum)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Checkpoint, state, mesh, files, tensors)

// A manifest begins with a checksum of what follows it.
static string sealed_text(const string& rest) {
  const uint64_t checksum = checksum_of(rest.data(), int64_t(rest.size()));
  return "{\"manifest_xxh3\": \"" + hex(checksum) + "\"," + rest;
}

void write_manifest(const Checkpoint& c, const string& path) {
  nlohmann::json json = c;
  json["version"] = kVersion;
  const string body = json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  write_file_durably(path, sealed_text(body.substr(1) + "\n"));
}

Checkpoint read_manifest(const string& path) {
  const string bytes = read_text_file(path);
  const size_t start = sealed_text("").size();
  if (bytes.size() < start || bytes != sealed_text(bytes.substr(start)))
    bad_input(path, "is damaged or cut short (its own checksum does not hold)", kRestore);
  try {
    const nlohmann::json json = nlohmann::json::parse(bytes);
    if (json.at("version") == kVersion) return json.get<Checkpoint>();
  } catch (const nlohmann::json::exception&) {  // whole, but not what this version writes
  }
  bad_input(path, text("is of another version of Pith (need %d)", kVersion),
            "the version that wrote it");
}

StoredFile stored_file(const string& folder, const string& name) {
  const MappedFile map(folder + "/" + name);
  StoredFile file{.name = name, .bytes = map.size()};
  memcpy(&file.header_bytes, map.data(), 8);  // the length of what follows it
  file.header_bytes += 8;
  file.header_checksum = checksum_of(map.data(), file.header_bytes);
  return file;
}

// ---- opening and verifying ----

static void check_coverage(const Checkpoint& c, const string& name, const StoredTensor& tensor) {
  bool good = true;
  int64_t end = 0;
  for (const StoredFragment& f : tensor.fragments) {
    good = good && f.begin == end && size_t(f.file) < c.files.size() &&
           f.offset + f.count * size_of(tensor.dtype) <= c.files[size_t(f.file)].bytes;
    end += f.count;
  }
  if (!good || end != tensor.numel())
    bad_input(c.folder + ": " + name, "its fragments do not cover it once, within their files",
              kRestore);
}

Checkpoint open_checkpoint(const string& folder) {
  if (!fs::is_directory(folder))
    bad_input(folder, "there is no such checkpoint", "pith checkpoint list on the run folder");
  if (!fs::exists(folder + kManifest))
    bad_input(folder, "is no finished checkpoint (it has no manifest.json)",
              list_checkpoints(folder).empty() ? kRestore : "name one of its step-* folders");
  Checkpoint c = read_manifest(folder + kManifest);
  c.folder = folder;
  for (const auto& [name, tensor] : c.tensors) check_coverage(c, name, tensor);
  for (StoredFile& file : c.files) {
    const string path = folder + "/" + file.name;
    if (!fs::exists(path)) bad_input(path, "is missing, but the manifest names it", kRestore);
    file.map = MappedFile(path);
    if (file.map.size() != file.bytes)
      bad_input(path,
                text("is cut short or is another file (got %ld bytes, need %ld)", file.map.size(),
                     file.bytes),
                kRestore);
  }
  return c;
}

void verify(const Checkpoint& c, bool weights_only) {
  struct Region {
    const MappedFile& map;
    string what;
    int64_t offset, bytes;
    uint64_t need, got = 0;
  };
  vector<Region> regions;
  for (const StoredFile& file : c.files)
    regions.push_back({file.map, "header", 0, file.header_bytes, file.header_checksum});
  for (const auto& [name, tensor] : c.tensors)
    for (const StoredFragment& f : tensor.fragments)
      if (!weights_only || !is_moment(name))
        regions.push_back({c.files[size_t(f.file)].map, name + "#" + std::to_string(f.begin),
                           f.offset, f.count * size_of(tensor.dtype), f.checksum});
  in_parallel(regions.size(), [&](size_t i) {
    Region& r = regions[i];
    r.got = checksum_of(r.map.data() + r.offset, r.bytes);
  });
  for (const Region& r : regions)
    if (r.got != r.need)
      bad_input(r.map.path() + ": " + r.what,
                "is damaged (checksum " + hex(r.got) + ", need " + hex(r.need) + ")", kRestore);
}

vector<CheckpointFolder> list_checkpoints(const string& run_folder) {
  vector<CheckpointFolder> list;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(run_folder, error)) {
    const string name = entry.path().filename();
    const int64_t step = name.starts_with("step-") ? strtoll(name.c_str() + 5, nullptr, 10) : -1;
    if (name == step_name(step)) list.push_back({step, entry.path()});
  }
  std::ranges::sort(list, {}, &CheckpointFolder::step);
  return list;
}

std::optional<Checkpoint> find_checkpoint(const string& run_folder) {
  const vector<CheckpointFolder> list = list_checkpoints(run_folder);
  for (size_t i = list.size(); i-- > 0;) {
    try {
      Checkpoint c = open_checkpoint(list[i].path);
      verify(c);
      return c;
    } catch (const Error& error) {
      log_warning("checkpoint %s is left aside: %s", list[i].path.c_str(), error.what());
    }
  }
  if (list.empty()) return std::nullopt;
  bad_input(run_folder,
            text("none of its checkpoints is good (got %zu bad ones, named above)", list.size()),
            "restore one, or name another run.folder to begin anew");
}

// A Hugging Face folder in the form of a checkpoint: each tensor is one fragment.
static Checkpoint open_hugging_face(const string& folder) {
  const SafetensorsReader reader(folder);
  Checkpoint c{.folder = folder};
  c.state.optimizer = "none";
  if (fs::exists(folder + "/config.json")) c.state.model = read_text_file(folder + "/config.json");
  for (const MappedFile& file : reader.files())
    c.files.push_back({.name = file.path(), .bytes = file.size(), .map = file});
  for (const TensorEntry& t : reader.tensors()) {
    const int64_t offset = t.data - reader.files()[size_t(t.file)].data();
    c.tensors[t.name] = {t.dtype, t.shape, {{0, t.numel(), t.file, offset}}};
  }
  return c;
}

Checkpoint open_weights(const string& folder) {
  if (fs::exists(folder + kManifest)) {
    Checkpoint c = open_checkpoint(folder);
    verify(c, true);
    return c;
  }
  return list_checkpoints(folder).empty() ? open_hugging_face(folder) : *find_checkpoint(folder);
}

// ---- refusing what does not fit ----

// What must be the same in a resumed run, in the words that name it.
static std::map<string, string> identity_of(const RunState& s, const string& place) {
  std::map<string, string> values;
  string section;
  std::istringstream lines(s.config);
  for (string line; std::getline(lines, line);) {
    const size_t equals = line.find(" = ");
    if (line.starts_with("["))
      section = line.substr(1, line.find(']') - 1) + ".";
    else if (equals != string::npos && !may_change_on_resume(section + line.substr(0, equals)))
      values[section + line.substr(0, equals)] = line.substr(equals + 3);
  }
  const Json model = Json::parse(s.model, place);
  for (const string& key : model.keys()) values["the model's " + key] = model[key].dump();
  values["data.seed"] = std::to_string(s.seed);
  values["the data set (its fingerprint)"] = hex(s.data_fingerprint);
  values["the optimiser"] = s.optimizer;
  return values;
}

void check_resumable(const Checkpoint& c, const RunState& now) {
  if (c.state.optimizer == "none")
    bad_input(c.folder, "holds weights alone, without optimiser state",
              "model.init_from, to begin a run from them");
  auto before = identity_of(c.state, c.folder + "/manifest.json: model");
  auto after = identity_of(now, "config.json");
  for (const auto& [key, value] : before) after.try_emplace(key, "nothing");
  for (const auto& [key, value] : after)
    if (const auto at = before.try_emplace(key, "nothing").first; at->second != value)
      bad_input(c.folder,
                key + " differs from the saved run's (got " + value + ", need " + at->second + ")",
                "the saved value, or another run.folder to begin anew");
}

static string describe(FileDType dtype, const vector<int64_t>& shape) {
  TensorEntry entry;
  entry.dtype = dtype;
  entry.shape = shape;
  return describe(entry);
}

// "3 missing: a, b, c"; at most ten are named.
static void add_list(string& out, const char* what, const vector<string>& names) {
  if (names.empty()) return;
  out += text("%s%zu %s: ", out.empty() ? "" : "; ", names.size(), what);
  for (size_t i = 0; i < std::min<size_t>(names.size(), 10); i++) out += (i ? ", " : "") + names[i];
  if (names.size() > 10) out += ", ...";
}

static int64_t count_nonfinite(const Checkpoint& c, const StoredTensor& tensor) {
  vector<float> values(1 << 18);
  const int64_t n = tensor.numel(), most = int64_t(values.size());
  int64_t bad = 0;
  for (int64_t at = 0; at < n; at += most) {
    const int64_t count = std::min(most, n - at);
    read_elements(c, tensor, at, count, values.data());
    for (int64_t i = 0; i < count; i++) bad += !std::isfinite(values[size_t(i)]);
  }
  return bad;
}

void check_weights(const Checkpoint& c, const ParameterTable& whole) {
  vector<string> missing, extra, misshapen, nonfinite;
  vector<const Piece*> pieces;
  std::set<string> known;
  for (const Parameter& parameter : whole)
    for (const Piece& piece : parameter.pieces) {
      pieces.push_back(&piece);
      known.insert(piece.name);
      const auto at = c.tensors.find(piece.name);
      if (at == c.tensors.end()) {
        missing.push_back(piece.name);
        continue;
      }
      const auto& [dtype, shape, fragments] = at->second;
      if (shape != shape_of(piece) || !is_float(dtype))
        misshapen.push_back(piece.name + " (got " + describe(dtype, shape) + ", need " +
                            describe(is_float(dtype) ? dtype : FileDType::F32, shape_of(piece)) +
                            ")");
    }
  for (const auto& [name, tensor] : c.tensors)
    if (!is_moment(name) && !known.contains(name))
      extra.push_back(name + " " + describe(tensor.dtype, tensor.shape));
  string what;
  add_list(what, "missing", missing);
  add_list(what, "not of this model", extra);
  add_list(what, "of another shape or type", misshapen);
  if (!what.empty())
    bad_input(c.folder, "the tensors are not those of the model: " + what, kItsConfig);
  vector<int64_t> bad(pieces.size());
  in_parallel(pieces.size(),
              [&](size_t i) { bad[i] = count_nonfinite(c, c.tensors.at(pieces[i]->name)); });
  for (size_t i = 0; i < pieces.size(); i++)
    if (bad[i])
      nonfinite.push_back(
          text("%s (%ld of %ld values)", pieces[i]->name.c_str(), bad[i], pieces[i]->dims.numel()));
  add_list(what, "tensors with NaN or Inf", nonfinite);
  if (!what.empty()) bad_input(c.folder, what, "weights of a run that did not diverge");
}

// ---- reading ----

void read_elements(const Checkpoint& c, const StoredTensor& tensor, int64_t begin, int64_t count,
                   float* out) {
  for (const StoredFragment& f : tensor.fragments) {
    const int64_t from = std::max(begin, f.begin), to = std::min(begin + count, f.begin + f.count);
    if (from >= to) continue;
    const char* data = c.files[size_t(f.file)].map.data() + f.offset;
    to_f32(tensor.dtype, data + (from - f.begin) * size_of(tensor.dtype), out + (from - begin),
           to - from);
  }
}

static void load(Parameters& p, const Checkpoint& c, const StateKind& kind) {
  for (const Fragment& f : fragments(p)) {
    const string name = f.piece->name + kind.suffix;
    const auto at = c.tensors.find(name);
    if (at == c.tensors.end()) bad_input(c.folder + ": " + name, "is missing", kItsConfig);
    if (at->second.shape != shape_of(*f.piece))
      bad_input(c.folder + ": " + name, "has another shape than the model's", kItsConfig);
    const Tensor& shard = p.units[size_t(f.unit)].*kind.shard;
    read_elements(c, at->second, f.begin, f.count, shard.f32() + f.offset);
  }
}

void load_state(Rank&, Parameters& p, const Checkpoint& c) {
  for (const StateKind& kind : kStateKinds) load(p, c, kind);
}

void load_weights(Rank&, Parameters& p, const Checkpoint& c) { load(p, c, kStateKinds[0]); }

}  // namespace pith
