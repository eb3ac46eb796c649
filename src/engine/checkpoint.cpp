#include "engine/checkpoint.h"

#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <map>

#include "core/json.h"
#include "core/log.h"
#include "engine/checkpoint_parts.h"
#include "engine/config.h"

namespace pith {
namespace fs = std::filesystem;

static constexpr int64_t kVersion = 1;
static constexpr const char* kManifest = "/manifest.json";
static constexpr const char* kChecksumKey = "\"manifest_xxh3\": \"";
static const char* const kRestore = "restore it, or remove it to use the checkpoint before";

static string hex(uint64_t value) { return text("%016lx", value); }

static uint64_t from_hex(const Json& json) {
  const string digits = json.as_string();
  char* end = nullptr;
  const uint64_t value = strtoull(digits.c_str(), &end, 16);
  if (digits.size() != 16 || *end)
    bad_input(json.place(), "is no checksum (got \"" + digits + "\", need 16 hex digits)",
              kRestore);
  return value;
}

static uint64_t hash_of(const string& bytes) { return XXH3_64bits(bytes.data(), bytes.size()); }

bool is_moment(const string& name) { return name.ends_with(kExpAvg) || name.ends_with(kExpAvgSq); }

string step_name(int64_t step) { return text("step-%08ld", step); }

int64_t StoredTensor::numel() const {
  int64_t n = 1;
  for (const int64_t size : shape) n *= size;
  return n;
}

const StoredTensor* Checkpoint::find(string_view name) const {
  const auto at = std::lower_bound(tensors.begin(), tensors.end(), name,
                                   [](const StoredTensor& t, string_view n) { return t.name < n; });
  return at != tensors.end() && at->name == name ? &*at : nullptr;
}

// ---- manifest ----

// One line a tensor; a fragment is [file, begin, count, offset, XXH3]. There may be 10^5 of them,
// and names would take most of the time to read.
static string tensor_text(const StoredTensor& tensor) {
  JsonWriter w;
  w.object().key("name").value(tensor.name).key("dtype").value(name_of(tensor.dtype));
  w.key("shape").array();
  for (const int64_t size : tensor.shape) w.value(size);
  w.end().key("fragments").array();
  for (const StoredFragment& f : tensor.fragments) {
    w.array().value(f.file).value(f.begin).value(f.count).value(f.offset);
    w.value(hex(f.checksum)).end();
  }
  return w.end().end().str();
}

string manifest_text(const Checkpoint& c) {
  const RunState& s = c.state;
  JsonWriter w(1);
  w.object().key("format").value("pith checkpoint").key("version").value(kVersion);
  w.key("step").value(s.step).key("updates").value(s.updates).key("samples").value(s.samples);
  w.key("seed").value(std::to_string(s.seed));
  w.key("data_fingerprint").value(hex(s.data_fingerprint));
  w.key("optimizer").value(s.optimizer);
  w.key("mesh").object().key("pp").value(c.mesh.pp).key("dp").value(c.mesh.dp);
  w.key("cp").value(c.mesh.cp).key("ep").value(c.mesh.ep);
  w.key("dp_replicate").value(c.mesh.dp_replicate).end();
  JsonWriter counts;
  counts.array();
  for (const double count : s.balance_counts) counts.value(count);
  w.key("balance_counts").raw(counts.end().str());
  w.key("config_xxh3").value(hex(hash_of(s.config))).key("config").value(s.config);
  w.key("model").value(s.model).key("files").array();
  for (const StoredFile& file : c.files)
    w.object().key("name").value(file.name).key("bytes").value(file.bytes).end();
  w.end().key("tensors").array();
  for (const StoredTensor& tensor : c.tensors) w.raw(tensor_text(tensor));
  string body = w.end().end().str();
  while (body.back() == '}' || body.back() == '\n') body.pop_back();
  body += ",\n ";
  return body + kChecksumKey + hex(hash_of(body)) + "\"\n}\n";
}

static RunState read_state(const Json& json) {
  RunState s;
  s.step = json["step"].as_int(0);
  s.updates = json["updates"].as_int(0);
  s.samples = json["samples"].as_int(0);
  s.seed = strtoull(json["seed"].as_string().c_str(), nullptr, 10);
  s.data_fingerprint = from_hex(json["data_fingerprint"]);
  s.optimizer = json["optimizer"].as_string();
  const Json counts = json["balance_counts"];
  for (int64_t i = 0; i < counts.size(); i++) s.balance_counts.push_back(counts[i].as_double());
  s.config = json["config"].as_string();
  s.model = json["model"].as_string();
  return s;
}

static FileDType read_dtype(const Json& json) {
  const string name = json.as_string();
  for (int i = 0; i <= int(FileDType::BOOL); i++)
    if (name == name_of(static_cast<FileDType>(i))) return static_cast<FileDType>(i);
  bad_input(json.place(), "is an unknown dtype (got \"" + name + "\")", kRestore);
}

static StoredTensor read_tensor(const Json& json, int64_t num_files) {
  StoredTensor tensor;
  tensor.name = json["name"].as_string();
  tensor.dtype = read_dtype(json["dtype"]);
  tensor.shape = json["shape"].as_ints();
  const Json list = json["fragments"];
  for (int64_t i = 0; i < list.size(); i++) {
    const Json f = list[i];
    tensor.fragments.push_back({f[1].as_int(0), f[2].as_int(1), int(f[0].as_int(0, num_files - 1)),
                                f[3].as_int(0), from_hex(f[4])});
  }
  return tensor;
}

Checkpoint read_manifest(const string& path) {
  const string bytes = read_text_file(path);
  const size_t key = bytes.rfind(kChecksumKey);
  if (key == string::npos ||
      bytes.substr(key) != kChecksumKey + hex(hash_of(bytes.substr(0, key))) + "\"\n}\n")
    bad_input(path, "is damaged or cut short (its own checksum does not hold)", kRestore);
  const Json json = Json::parse(bytes, path);
  if (json["version"].as_int() != kVersion)
    bad_input(path + ": version",
              "is of another version of Pith (got " + json["version"].dump() + ", need 1)",
              "the version that wrote it");
  Checkpoint c;
  c.state = read_state(json);
  const Json mesh = json["mesh"], files = json["files"], tensors = json["tensors"];
  const auto axis = [&](const char* name) { return int(mesh[name].as_int(1)); };
  c.mesh = {axis("pp"), axis("dp"), axis("cp"), axis("ep"), axis("dp_replicate")};
  for (int64_t i = 0; i < files.size(); i++)
    c.files.push_back({files[i]["name"].as_string(), files[i]["bytes"].as_int(0)});
  c.tensors.reserve(size_t(tensors.size()));
  for (int64_t i = 0; i < tensors.size(); i++)
    c.tensors.push_back(read_tensor(tensors[i], files.size()));
  return c;
}

void check_coverage(const Checkpoint& c) {
  for (const StoredTensor& tensor : c.tensors) {
    int64_t end = 0;
    const auto need = [&](bool holds, int64_t begin) {
      if (holds) return;
      bad_input(c.folder + ": " + tensor.name,
                text("the fragments do not cover the tensor once (got one that begins at "
                     "element %ld of %ld, need %ld)",
                     begin, tensor.numel(), end),
                kRestore);
    };
    for (const StoredFragment& f : tensor.fragments) {
      need(f.begin == end, f.begin);
      end += f.count;
      if (f.offset + f.count * size_of(tensor.dtype) > c.files[size_t(f.file)].bytes)
        bad_input(c.folder + ": " + tensor.name, "a fragment passes the end of its file", kRestore);
    }
    need(end == tensor.numel(), tensor.numel());
  }
}

// ---- opening and verifying ----

static string without_slash(string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path;
}

Checkpoint open_checkpoint(const string& named) {
  const string folder = without_slash(named);
  if (access((folder + "/.").c_str(), F_OK) != 0)
    bad_input(folder, "there is no such checkpoint", "pith checkpoint list on the run folder");
  if (access((folder + kManifest).c_str(), F_OK) != 0)
    bad_input(folder, "is no finished checkpoint (it has no manifest.json)",
              list_checkpoints(folder).empty() ? kRestore : "name one of its step-* folders");
  Checkpoint c = read_manifest(folder + kManifest);
  c.folder = folder;
  check_coverage(c);
  for (const StoredFile& file : c.files) {
    const string path = folder + "/" + file.name;
    if (access(path.c_str(), F_OK) != 0)
      bad_input(path, "is missing, but the manifest names it", kRestore);
    c.maps.emplace_back(path);
    if (c.maps.back().size() != file.bytes)
      bad_input(path,
                text("is cut short or is another file (got %ld bytes, need %ld)",
                     c.maps.back().size(), file.bytes),
                kRestore);
  }
  return c;
}

static string entry_name(const StoredTensor& tensor, const StoredFragment& f) {
  return tensor.name + "#" + std::to_string(f.begin);
}

// The files' own headers say the same as the manifest.
static void verify_headers(const Checkpoint& c) {
  vector<SafetensorsReader> readers;
  for (const MappedFile& map : c.maps) readers.emplace_back(map.path());
  size_t fragments = 0, entries = 0;
  for (const SafetensorsReader& reader : readers) {
    entries += reader.tensors().size();
    if (string_view(reader.files()[0].data() + 8, 33) != R"({"__metadata__": {"format": "pt"})")
      bad_input(reader.files()[0].path(), "has a damaged header", kRestore);
  }
  for (const StoredTensor& tensor : c.tensors)
    for (const StoredFragment& f : tensor.fragments) {
      const SafetensorsReader& reader = readers[size_t(f.file)];
      const TensorEntry& entry = reader.at(entry_name(tensor, f));
      const bool same = entry.data - reader.files()[0].data() == f.offset &&
                        entry.dtype == tensor.dtype && entry.numel() == f.count;
      if (!same)
        bad_input(reader.files()[0].path() + ": " + entry.name, "is not what the manifest says",
                  kRestore);
      fragments++;
    }
  if (fragments != entries)
    bad_input(c.folder,
              text("the files hold other fragments than the manifest (got %zu, need %zu)", entries,
                   fragments),
              kRestore);
}

void verify(const Checkpoint& c, bool weights_only) {
  if (!weights_only) verify_headers(c);
  vector<std::pair<const StoredTensor*, const StoredFragment*>> tasks;
  for (const StoredTensor& tensor : c.tensors)
    if (!weights_only || !is_moment(tensor.name))
      for (const StoredFragment& f : tensor.fragments) tasks.push_back({&tensor, &f});
  on_threads(int64_t(tasks.size()), [&](int64_t i) {
    const auto [tensor, f] = tasks[size_t(i)];
    const MappedFile& map = c.maps[size_t(f->file)];
    const uint64_t got =
        XXH3_64bits(map.data() + f->offset, size_t(f->count * size_of(tensor->dtype)));
    if (got != f->checksum)
      bad_input(map.path() + ": " + entry_name(*tensor, *f),
                "is damaged (checksum " + hex(got) + ", need " + hex(f->checksum) + ")", kRestore);
  });
}

vector<CheckpointFolder> list_checkpoints(const string& run_folder) {
  vector<CheckpointFolder> list;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(run_folder, error)) {
    const string name = entry.path().filename();
    char* end = nullptr;
    if (!name.starts_with("step-") || name.size() < 13) continue;
    const int64_t step = strtoll(name.c_str() + 5, &end, 10);
    if (*end == 0 && name == step_name(step)) list.push_back({step, entry.path()});
  }
  std::sort(list.begin(), list.end(), [](auto& a, auto& b) { return a.step < b.step; });
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
      if (error.exit_code != kExitBadInput) throw;
      log_warning("checkpoint %s is left aside: %s", list[i].path.c_str(), error.what());
    }
  }
  if (list.empty()) return std::nullopt;
  bad_input(run_folder,
            text("none of its checkpoints is good (got %zu bad ones, named above)", list.size()),
            "restore one, or name another run.folder to begin anew");
}

// ---- resuming ----

// Keys and values of to_toml()'s text: `[section]` lines and `key = value` lines.
static std::map<string, string> config_values(const string& toml) {
  std::map<string, string> values;
  string section;
  for (size_t begin = 0; begin < toml.size();) {
    const size_t end = std::min(toml.find('\n', begin), toml.size());
    const string line = toml.substr(begin, end - begin);
    const size_t equals = line.find(" = ");
    if (line.starts_with("["))
      section = line.substr(1, line.find(']') - 1) + ".";
    else if (equals != string::npos)
      values[section + line.substr(0, equals)] = line.substr(equals + 3);
    begin = end + 1;
  }
  return values;
}

[[noreturn]] static void refuse(const Checkpoint& c, const string& what, const string& before,
                                const string& now) {
  bad_input(c.folder, what + " differs from the saved run's (got " + now + ", need " + before + ")",
            "the saved value, or another run.folder to begin anew");
}

static void check_same_model(const Checkpoint& c, const RunState& now) {
  const Json before = Json::parse(c.state.model, c.folder + "/manifest.json: model");
  const Json after = Json::parse(now.model, "config.json");
  const auto value = [](const Json& json, const string& key) {
    return json.has(key) ? json[key].dump() : string("nothing");
  };
  for (const Json& one : {before, after})
    for (const string& key : one.keys())
      if (value(before, key) != value(after, key))
        refuse(c, "the model's " + key, value(before, key), value(after, key));
}

void check_resumable(const Checkpoint& c, const RunState& now) {
  if (c.state.optimizer == "none")
    bad_input(c.folder, "holds weights alone, without optimiser state",
              "model.init_from, to begin a run from them");
  check_same_model(c, now);
  if (c.state.seed != now.seed)
    refuse(c, "data.seed", std::to_string(c.state.seed), std::to_string(now.seed));
  if (c.state.data_fingerprint != now.data_fingerprint)
    refuse(c, "the data set (its fingerprint)", hex(c.state.data_fingerprint),
           hex(now.data_fingerprint));
  if (c.state.optimizer != now.optimizer)
    refuse(c, "the optimiser", c.state.optimizer, now.optimizer);
  const auto before = config_values(c.state.config), after = config_values(now.config);
  for (const auto& [key, value] : after) {
    const auto at = before.find(key);
    if (at != before.end() && at->second != value && !may_change_on_resume(key))
      refuse(c, key, at->second, value);
  }
}

// ---- reading ----

void read_elements(const Checkpoint& c, const StoredTensor& tensor, int64_t begin, int64_t count,
                   float* out) {
  const int64_t end = begin + count, size = size_of(tensor.dtype);
  for (const StoredFragment& f : tensor.fragments) {
    const int64_t from = std::max(begin, f.begin), to = std::min(end, f.begin + f.count);
    if (from >= to) continue;
    const char* data = c.maps[size_t(f.file)].data() + f.offset;
    to_f32(tensor.dtype, data + (from - f.begin) * size, out + (from - begin), to - from);
  }
}

static const StoredTensor& stored(const Checkpoint& c, const Piece& piece, const string& name) {
  const StoredTensor* tensor = c.find(name);
  if (!tensor)
    bad_input(c.folder + ": " + name, "is missing", "the config.json that it was trained with");
  const vector<int64_t> need(piece.dims.size, piece.dims.size + piece.dims.rank);
  if (tensor->shape != need)
    bad_input(c.folder + ": " + name, "has another shape than the model's",
              "the config.json that it was trained with");
  return *tensor;
}

void load_state(Rank&, Parameters& p, const Checkpoint& c) {
  for (const Fragment& f : fragments(p)) {
    const FlatUnit& unit = p.units[size_t(f.unit)];
    const auto fill = [&](const Tensor& shard, const char* suffix) {
      read_elements(c, stored(c, *f.piece, f.piece->name + suffix), f.begin, f.count,
                    shard.f32() + f.offset);
    };
    fill(unit.master, "");
    fill(unit.m, kExpAvg);
    fill(unit.v, kExpAvgSq);
  }
}

}  // namespace pith
