#include "data/safetensors.h"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <set>
#include <utility>

#include "core/check.h"
#include "core/json.h"

namespace pith {

static constexpr struct {
  const char* name;
  int64_t bytes;
} kDTypes[] = {{"F32", 4},     {"F64", 8}, {"F16", 2}, {"BF16", 2}, {"F8_E4M3", 1},
               {"F8_E5M2", 1}, {"I64", 8}, {"I32", 4}, {"I16", 2},  {"I8", 1},
               {"U64", 8},     {"U32", 4}, {"U16", 2}, {"U8", 1},   {"BOOL", 1}};
static constexpr int64_t kMaxHeader = 100 * 1000 * 1000;  // as the reference implementation
static const char* const kRefetch = "fetch or write the file again";

int64_t size_of(FileDType dtype) { return kDTypes[int(dtype)].bytes; }
const char* name_of(FileDType dtype) { return kDTypes[int(dtype)].name; }
bool is_float(FileDType dtype) { return dtype <= FileDType::BF16; }

string describe(const TensorEntry& tensor) {
  string shape;
  for (const int64_t size : tensor.shape)
    shape += (shape.empty() ? "" : ",") + std::to_string(size);
  return "[" + shape + "] " + name_of(tensor.dtype);
}

// ---- reading ------------------------------------------------------------------------------------

// Bytes of a shape; -1 if they do not fit 63 bits.
static int64_t bytes_of(FileDType dtype, const vector<int64_t>& shape) {
  int64_t bytes = size_of(dtype);
  for (const int64_t size : shape)
    if (__builtin_mul_overflow(bytes, size, &bytes)) return -1;
  return bytes;
}

// One entry of the header; `data` is the file's data section.
static TensorEntry read_entry(const string& name, const Json& json, string_view data) {
  TensorEntry tensor{.name = name};
  const string dtype = json["dtype"].as_string();
  const auto known =
      std::ranges::find_if(kDTypes, [&](const auto& entry) { return dtype == entry.name; });
  if (known == std::end(kDTypes))
    bad_input(json.place(), "has an unknown dtype (got \"" + dtype + "\", need F32, BF16, ...)",
              "convert the tensor with the safetensors package");
  tensor.dtype = static_cast<FileDType>(known - kDTypes);
  for (int64_t i = 0; i < json["shape"].size(); i++)
    tensor.shape.push_back(json["shape"][i].as_int(0));
  const vector<int64_t> offsets = json["data_offsets"].as_ints();
  const auto room = int64_t(data.size());
  if (offsets.size() != 2 || offsets[0] < 0 || offsets[1] < offsets[0] || offsets[1] > room)
    bad_input(json.place(),
              text("has bad data_offsets, or the file is cut short (got %s, need [begin, end] up "
                   "to %ld)",
                   json["data_offsets"].dump().c_str(), room),
              kRefetch);
  tensor.data = data.data() + offsets[0];
  tensor.bytes = offsets[1] - offsets[0];
  const int64_t need = bytes_of(tensor.dtype, tensor.shape);
  if (tensor.bytes != need)
    bad_input(json.place(),
              text("has a size that is not its shape's (got %ld bytes, need %ld for %s)",
                   tensor.bytes, need, describe(tensor).c_str()),
              kRefetch);
  return tensor;
}

void SafetensorsReader::open_file(const string& path) {
  const MappedFile& file = files_.emplace_back(path);
  const int64_t room = file.size() - 8;
  int64_t length = 0;
  if (room >= 0) memcpy(&length, file.data(), 8);
  if (length < 2 || length > std::min(room, kMaxHeader))
    bad_input(path,
              text("is no safetensors file or is cut short (got %ld bytes and a header length "
                   "of %lu)",
                   file.size(), uint64_t(length)),
              kRefetch);
  const char* begin = file.data() + 8 + length;
  const string_view data(begin, size_t(room - length));
  const Json json = Json::parse(string(file.data() + 8, begin), path);
  vector<TensorEntry> found;
  for (const string& name : json.keys()) {
    if (name != "__metadata__")
      found.push_back(read_entry(name, json[name], data));
    else
      for (const string& key : json[name].keys())
        metadata_.emplace(key, json[name][key].as_string());
  }
  std::ranges::sort(found, {}, [](const auto& t) { return std::pair(t.data, t.bytes); });
  for (TensorEntry& tensor : found) {
    if (tensor.data != begin)
      bad_input(path + ": " + tensor.name,
                text("does not follow the tensor before it (got begin %ld, need %ld)",
                     tensor.data - data.data(), begin - data.data()),
                kRefetch);
    begin += tensor.bytes;
    tensor.file = int(files_.size()) - 1;
    by_name_.emplace(tensor.name, tensors_.size());
    tensors_.push_back(std::move(tensor));
  }
  if (begin != data.data() + data.size())
    bad_input(path,
              text("has bytes behind its last tensor (got %zu bytes of data, need %ld)",
                   data.size(), begin - data.data()),
              kRefetch);
}

void SafetensorsReader::open_index(const string& index_path) {
  const Json weights = Json::parse_file(index_path)["weight_map"];
  std::map<string, string> path_of;
  std::set<string> paths;
  for (const string& name : weights.keys()) {
    const string shard = weights[name].as_string();
    if (shard.find('/') != string::npos || shard.empty())
      bad_input(weights[name].place(), "is not a file name (got \"" + shard + "\")", kRefetch);
    path_of[name] = path_ + "/" + shard;
    paths.insert(path_of[name]);
  }
  if (paths.empty()) bad_input(index_path, "lists no tensors", kRefetch);
  for (const string& path : paths) {
    if (access(path.c_str(), F_OK) != 0)
      bad_input(path, "is missing, but the index names it", "fetch the missing shard");
    open_file(path);
  }
  for (const TensorEntry& tensor : tensors_) {
    const string listed = std::exchange(path_of[tensor.name], "");
    if (listed != files_[tensor.file].path())
      bad_input(place(tensor),
                "is not where the index says (got this shard, need " +
                    (listed.empty() ? "none" : listed) + ")",
                "fetch index and shards again, from one version");
  }
  for (const auto& [name, path] : path_of)
    if (!path.empty())
      bad_input(path + ": " + name, "is missing, but the index says it is here",
                "fetch index and shards again, from one version");
}

SafetensorsReader::SafetensorsReader(const string& path) : path_(path) {
  while (path_.size() > 1 && path_.back() == '/') path_.pop_back();
  const string single = path_ + "/model.safetensors", index = single + ".index.json";
  if (access((path_ + "/.").c_str(), F_OK) != 0)
    open_file(path_);
  else if (access(single.c_str(), F_OK) == 0)
    open_file(single);
  else if (access(index.c_str(), F_OK) == 0)
    open_index(index);
  else
    bad_input(path_, "has no weights (need model.safetensors or model.safetensors.index.json)",
              "name a folder in Hugging Face layout");
}

const TensorEntry& SafetensorsReader::at(const string& name) const {
  const auto found = by_name_.find(name);
  if (found == by_name_.end())
    bad_input(path_ + ": " + name, text("is missing (got %zu other tensors)", tensors_.size()),
              "check that the weights belong to this model's config.json");
  return tensors_[found->second];
}

string SafetensorsReader::place(const TensorEntry& tensor) const {
  return files_[tensor.file].path() + ": " + tensor.name;
}

string SafetensorsReader::metadata(const string& key) const {
  const auto found = metadata_.find(key);
  return found == metadata_.end() ? "" : found->second;
}

// ---- writing ------------------------------------------------------------------------------------

int64_t TensorDecl::bytes() const { return bytes_of(dtype, shape); }

SafetensorsWriter::SafetensorsWriter(const string& path, const vector<TensorDecl>& tensors)
    : file_(path) {
  JsonWriter json;
  json.object().key("__metadata__").object().key("format").value("pt").end();
  int64_t end = 0;
  for (const TensorDecl& tensor : tensors) {
    json.key(tensor.name).object().key("dtype").value(name_of(tensor.dtype));
    json.key("shape").array();
    for (const int64_t size : tensor.shape) json.value(size);
    json.end().key("data_offsets").array().value(end).value(end + tensor.bytes()).end().end();
    end += tensor.bytes();
  }
  string header = json.end().str();
  header.resize((header.size() + 7) / 8 * 8, ' ');  // so that the data are aligned
  const auto length = int64_t(header.size());
  file_.write(&length, 8);
  file_.write(header.data(), length);
  total_bytes_ = file_.size() + end;
}

void SafetensorsWriter::write(const void* bytes, int64_t size) {
  if (size > bytes_left())
    failed(file_.path(),
           text("was given more bytes than declared (got %ld, need %ld)", size, bytes_left()));
  file_.write(bytes, size);
}

void SafetensorsWriter::finish() {
  if (bytes_left() != 0)
    failed(file_.path(),
           text("was finished %ld bytes short of the declared tensors", bytes_left()));
  file_.finish();
}

ShardedWriter::ShardedWriter(const string& folder, vector<TensorDecl> tensors,
                             int64_t max_shard_bytes)
    : folder_(folder) {
  int64_t filled = max_shard_bytes;
  for (TensorDecl& tensor : tensors) {
    filled += tensor.bytes();
    if (filled > max_shard_bytes || shards_.empty()) {
      shards_.emplace_back();
      filled = tensor.bytes();
    }
    shards_.back().push_back(std::move(tensor));
  }
  if (shards_.empty()) failed(folder, "cannot hold a model without tensors");
  make_folders(folder_);
  open_next();
}

ShardedWriter::~ShardedWriter() {
  if (!writer_) return;
  writer_.reset();
  for (size_t i = 0; i < begun_; i++) unlink(shard_path(i).c_str());
}

string ShardedWriter::shard_path(size_t shard) const {
  if (num_shards() == 1) return folder_ + "/model.safetensors";
  return folder_ + text("/model-%05zu-of-%05d.safetensors", shard + 1, num_shards());
}

void ShardedWriter::open_next() {
  writer_.emplace(shard_path(begun_), shards_[begun_]);
  begun_++;
}

void ShardedWriter::write(const void* bytes, int64_t size) {
  const char* next = static_cast<const char*>(bytes);
  while (size > 0) {
    const bool full = writer_->bytes_left() == 0, last = begun_ == shards_.size();
    if (full && !last) {
      writer_->finish();
      open_next();
    }
    // The last shard refuses what was not declared.
    const int64_t piece = full && last ? size : std::min(size, writer_->bytes_left());
    writer_->write(next, piece);
    next += piece;
    size -= piece;
  }
}

void ShardedWriter::finish() {
  if (begun_ < shards_.size())
    failed(folder_, text("was finished at shard %zu of %d", begun_, num_shards()));
  writer_->finish();
  if (num_shards() > 1) {
    JsonWriter map;
    int64_t total = 0;
    map.object();
    for (size_t shard = 0; shard < shards_.size(); shard++)
      for (const TensorDecl& tensor : shards_[shard]) {
        map.key(tensor.name).value(shard_path(shard).substr(folder_.size() + 1));
        total += tensor.bytes();
      }
    JsonWriter json(2);
    json.object().key("metadata").object().key("total_size").value(total).end();
    json.key("weight_map").raw(map.end().str());
    write_file_durably(folder_ + "/model.safetensors.index.json", json.end().str() + "\n");
  }
  writer_.reset();  // nothing is to be removed
}

// ---- conversion ---------------------------------------------------------------------------------

template <class T>
static T load(const void* src, int64_t i) {
  T value;
  memcpy(&value, static_cast<const char*>(src) + i * int64_t(sizeof(T)), sizeof(T));
  return value;
}

// IEEE half: its exponent and mantissa, placed as a float's, are 2^112 too small.
static float from_half(uint32_t half) {
  const uint32_t top = (half & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;  // Inf or NaN
  const float size = std::bit_cast<float>((half & 0x7fff) << 13 | top) * 0x1p112f;
  return half & 0x8000 ? -size : size;
}

template <class T>
static void convert(const void* src, float* dst, int64_t n, const auto& to_float) {
  for (int64_t i = 0; i < n; i++) dst[i] = to_float(load<T>(src, i));
}

void to_f32(FileDType dtype, const void* src, float* dst, int64_t n) {
  const auto from_bf16 = [](uint32_t bits) { return std::bit_cast<float>(bits << 16); };
  switch (dtype) {
    case FileDType::F32: memcpy(dst, src, size_t(n) * 4); break;
    case FileDType::F64: convert<double>(src, dst, n, [](double x) { return float(x); }); break;
    case FileDType::F16: convert<uint16_t>(src, dst, n, from_half); break;
    case FileDType::BF16: convert<uint16_t>(src, dst, n, from_bf16); break;
    default: failed("to_f32", string("cannot convert ") + name_of(dtype) + " to F32");
  }
}

void f32_to_bf16(const float* src, uint16_t* dst, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const uint32_t bits = load<uint32_t>(src, i);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    dst[i] = uint16_t(nan ? bits >> 16 | 0x40 : rounded >> 16);
  }
}

void from_f32(FileDType dtype, const float* src, void* dst, int64_t n) {
  switch (dtype) {
    case FileDType::F32: memcpy(dst, src, size_t(n) * 4); break;
    case FileDType::BF16: f32_to_bf16(src, static_cast<uint16_t*>(dst), n); break;
    default: failed("from_f32", string("cannot write ") + name_of(dtype));
  }
}

}  // namespace pith
