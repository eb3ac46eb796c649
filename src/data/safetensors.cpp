#include "data/safetensors.h"

#include <algorithm>
#include <bit>
#include <filesystem>
#include <map>
#include <set>

#include "core/json.h"

namespace pith {

namespace fs = std::filesystem;

static constexpr struct {
  const char* name;
  i64 bytes;
} kDTypes[] = {{"F32", 4}, {"F64", 8}, {"BF16", 2}, {"F16", 2}, {"F8_E4M3", 1},
               {"I64", 8}, {"I32", 4}, {"U8", 1},   {"BOOL", 1}};
static const string kExtension = ".safetensors";

i64 size_of(FileDType dtype) { return kDTypes[int(dtype)].bytes; }
const char* name_of(FileDType dtype) { return kDTypes[int(dtype)].name; }
bool is_float(FileDType dtype) { return dtype <= FileDType::BF16; }

i64 TensorDecl::bytes() const {
  i64 bytes = size_of(dtype);
  for (const i64 size : shape)
    if (__builtin_mul_overflow(bytes, size, &bytes)) return -1;
  return bytes;
}

string describe(const TensorDecl& tensor) {
  string shape;
  for (const i64 size : tensor.shape) shape += (shape.empty() ? "" : ",") + std::to_string(size);
  return "[" + shape + "] " + name_of(tensor.dtype);
}

[[noreturn]] static void damaged(const string& place, const string& what) {
  bad_input(place, what, "fetch or write the file again");
}

void SafetensorsReader::open_file(const string& path) {
  const MappedFile& file = files_.emplace_back(path);
  i64 length = 0, end = 0, room = file.size() - 8;
  if (room >= 0) memcpy(&length, file.data(), 8);
  if (length < 2 || length > room)
    damaged(
        path,
        text("is no safetensors file or is cut short (got %ld bytes and a header length of %lu)",
             file.size(), u64(length)));
  const char* const data = file.data() + 8 + length;
  room -= length;
  Json header = Json::parse(string(file.data() + 8, data), path);
  vector<std::pair<vector<i64>, string>> order;
  for (const string& name : header.keys())
    if (name != "__metadata__") order.push_back({header[name]["data_offsets"].as_ints(), name});
  std::ranges::sort(order);
  for (const auto& [offsets, name] : order) {
    Json json = header[name];
    TensorEntry& tensor = tensors_.emplace_back();
    tensor.name = name;
    tensor.data = data + end;
    tensor.file = int(files_.size()) - 1;
    string dtype = json["dtype"].as_string();
    auto known = std::ranges::find_if(kDTypes, [&](auto& d) { return dtype == d.name; });
    if (known == std::end(kDTypes))
      damaged(json.place(), "has an unknown dtype (got \"" + dtype + "\", need F32, BF16, ...)");
    tensor.dtype = FileDType(known - kDTypes);
    for (i64 i = 0; i < json["shape"].size(); i++)
      tensor.shape.push_back(json["shape"][i].as_int(0));
    i64 bytes = tensor.bytes();
    if (bytes < 0 || bytes > room - end || offsets != vector<i64>{end, end + bytes})
      damaged(json.place(), text("has bad data_offsets, or the file is cut short (got %s, need %ld "
                                 "bytes for %s from %ld on, up to %ld)",
                                 json["data_offsets"].dump().c_str(), bytes,
                                 describe(tensor).c_str(), end, room));
    end += bytes;
  }
  if (end != room)
    damaged(path,
            text("has bytes behind its last tensor (got %ld bytes of data, need %ld)", room, end));
}

void SafetensorsReader::open_index(const string& folder, const string& index) {
  Json weights = Json::parse_file(index)["weight_map"];
  std::set<string> shards;
  std::map<string, string> path_of;
  for (const string& name : weights.keys())
    path_of[name] = folder + "/" + *shards.insert(weights[name].as_string()).first;
  if (shards.empty()) damaged(index, "lists no tensors");
  for (const string& shard : shards) {
    if (shard.find('/') != string::npos)
      damaged(index, "is not a file name (got \"" + shard + "\")");
    open_file(folder + "/" + shard);
  }
  for (const TensorEntry& tensor : tensors_) {
    string listed = std::exchange(path_of[tensor.name], ""), here = files_[tensor.file].path();
    if (listed != here)
      damaged(here + ": " + tensor.name, "is not where the index says (got this shard, need " +
                                             (listed.empty() ? "none" : listed) + ")");
  }
  for (const auto& [name, path] : path_of)
    if (!path.empty()) damaged(path + ": " + name, "is missing, but the index says it is here");
}

SafetensorsReader::SafetensorsReader(const string& path) {
  string folder = fs::path(path + "/").parent_path();
  string single = folder + "/model.safetensors", index = single + ".index.json";
  if (!fs::is_directory(folder))
    open_file(folder);
  else if (fs::exists(single))
    open_file(single);
  else if (fs::exists(index))
    open_index(folder, index);
  else
    bad_input(folder, "has no weights (need model.safetensors or model.safetensors.index.json)",
              "a folder in Hugging Face layout");
}

const TensorEntry& SafetensorsReader::at(const string& name) const {
  auto found = std::ranges::find(tensors_, name, &TensorEntry::name);
  if (found == tensors_.end())
    damaged(files_[0].path() + ": " + name,
            text("is missing (got %zu other tensors)", tensors_.size()));
  return *found;
}

SafetensorsWriter::SafetensorsWriter(const string& path, const vector<TensorDecl>& tensors,
                                     i64 max_bytes)
    : path_(path.substr(0, path.rfind(kExtension))), shards_(1) {
  i64 filled = 0;
  for (const TensorDecl& tensor : tensors) {
    if (tensor.bytes() > max_bytes - filled && !shards_.back().empty()) {
      shards_.emplace_back();
      filled = 0;
    }
    filled += tensor.bytes();
    shards_.back().push_back(tensor);
  }
  open_next();
}

string SafetensorsWriter::shard_path(size_t shard) const {
  if (num_files() == 1) return path_ + kExtension;
  return path_ + text("-%05zu-of-%05d", shard + 1, num_files()) + kExtension;
}

void SafetensorsWriter::open_next() {
  JsonWriter json;  // transformers asks for this metadata
  json.object().key("__metadata__").object().key("format").value("pt").end();
  left_ = 0;
  for (const TensorDecl& tensor : shards_[begun_]) {
    const vector<i64> offsets = {left_, left_ + tensor.bytes()};
    json.key(tensor.name)
        .object()
        .members("dtype", name_of(tensor.dtype), "shape", tensor.shape, "data_offsets", offsets);
    json.end();
    left_ = offsets[1];
  }
  string header = json.end().str();
  header.resize((header.size() + 7) / 8 * 8, ' ');  // so that the data are aligned
  auto length = i64(header.size());
  file_.emplace(shard_path(begun_++));
  file_->write(&length, 8);
  file_->write(header.data(), length);
}

void SafetensorsWriter::write(const void* bytes, i64 size) {
  const char* next = static_cast<const char*>(bytes);
  while (size > 0) {
    if (left_ == 0 && begun_ < shards_.size()) {
      file_->finish();
      open_next();
    }
    if (left_ < size && begun_ == shards_.size())
      failed(file_->path(),
             text("was given more bytes than declared (got %ld, need %ld)", size, left_));
    i64 piece = min(size, left_);
    file_->write(next, piece);
    next += piece;
    size -= piece;
    left_ -= piece;
  }
}

void SafetensorsWriter::finish() {
  if (left_ > 0 || begun_ < shards_.size())
    failed(file_->path(), text("was finished %ld bytes short of the declared tensors", left_));
  file_->finish();
  if (num_files() == 1) return;
  JsonWriter map;
  i64 total = 0;
  map.object();
  for (size_t shard = 0; shard < shards_.size(); shard++)
    for (const TensorDecl& tensor : shards_[shard]) {
      map.key(tensor.name).value(shard_path(shard).substr(path_.rfind('/') + 1));
      total += tensor.bytes();
    }
  JsonWriter json;
  json.object().key("metadata").object().key("total_size").value(total).end();
  json.key("weight_map").raw(map.end().str());
  write_file_durably(path_ + kExtension + ".index.json", json.end().str() + "\n");
}

void to_f32(FileDType dtype, const void* src, float* dst, i64 n) {
  if (!is_float(dtype)) failed("to_f32", string("cannot convert ") + name_of(dtype));
  if (dtype == FileDType::F32) memcpy(dst, src, n * 4);
  const char* at = static_cast<const char*>(src);
  for (i64 i = 0; i < n && dtype == FileDType::F64; i++) {
    double wide;
    memcpy(&wide, at + 8 * i, 8);
    dst[i] = float(wide);
  }
  for (i64 i = 0; i < n && dtype == FileDType::BF16; i++) {
    u16 bits;
    memcpy(&bits, at + 2 * i, 2);
    dst[i] = std::bit_cast<float>(u32{bits} << 16);
  }
}

void from_f32(FileDType dtype, const float* src, void* dst, i64 n) {
  if (dtype == FileDType::F32) {
    memcpy(dst, src, n * 4);
    return;
  }
  if (dtype != FileDType::BF16) failed("from_f32", string("cannot write ") + name_of(dtype));
  for (i64 i = 0; i < n; i++) {
    auto bits = std::bit_cast<u32>(src[i]);
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    u32 rounded = bits + 0x7fff + (bits >> 16 & 1);
    static_cast<u16*>(dst)[i] = u16(nan ? bits >> 16 | 0x40 : rounded >> 16);
  }
}

}
