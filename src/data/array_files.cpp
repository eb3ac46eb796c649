#include "data/array_files.h"

#include <algorithm>
#include <filesystem>
#include <set>

#include "core/bf16.h"
#include "core/json.h"

namespace pith {

namespace fs = std::filesystem;

static constexpr struct Known {
  const char *name, *npy;  // "": none
  i64 bytes;
} kDTypes[] = {{"F32", "<f4", 4}, {"F64", "<f8", 8}, {"BF16", "", 2}, {"F16", "<f2", 2},
    {"F8_E4M3", "", 1}, {"I64", "<i8", 8}, {"I32", "<i4", 4}, {"U64", "<u8", 8}, {"U32", "<u4", 4},
    {"U16", "<u2", 2}, {"U8", "|u1", 1}, {"BOOL", "|b1", 1}};
static const string kModel = "/model.safetensors", kIndex = kModel + ".index.json";

i64 size_of(FileDType dtype) { return kDTypes[int(dtype)].bytes; }
const char* name_of(FileDType dtype) { return kDTypes[int(dtype)].name; }
const char* npy_name_of(FileDType dtype) { return kDTypes[int(dtype)].npy; }
bool is_float(FileDType dtype) { return dtype <= FileDType::BF16; }

i64 TensorDecl::bytes() const {
  i64 bytes = size_of(dtype);
  for (const i64 size : shape)
    if (__builtin_mul_overflow(bytes, size, &bytes)) return -1;
  return bytes;
}

static string list(const vector<i64>& shape) {
  string all;
  for (const i64 size : shape) all += (all.empty() ? "" : ",") + std::to_string(size);
  return all;
}

string describe(const TensorDecl& tensor) {
  return "[" + list(tensor.shape) + "] " + name_of(tensor.dtype);
}

[[noreturn]] static void damaged(const string& place, const string& what) {
  bad_input(place, what, "fetch or write the file again");
}

static FileDType read_dtype(const string& name, const char* Known::*in, const string& place) {
  auto known = std::ranges::find(kDTypes, name, in);
  if (known == std::end(kDTypes))
    damaged(place, "has an unknown dtype (got \"" + name + "\", need " + kDTypes->*in + ", ...)");
  return FileDType(known - kDTypes);
}

static void open_file(Safetensors& all, const string& path) {
  const MappedFile& file = all.files.emplace_back(path);
  i64 length = 0, end = 0, room = file.size() - 8;
  if (room >= 0) memcpy(&length, file.data(), 8);
  if (length < 2 || length > room)
    damaged(path,
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
    TensorEntry tensor{{.name = name}, data + end, int(all.files.size()) - 1};
    tensor.dtype = read_dtype(json["dtype"].as_string(), &Known::name, json.place());
    for (i64 i = 0; i < json["shape"].size(); i++)
      tensor.shape.push_back(json["shape"][i].as_int(0));
    i64 bytes = tensor.bytes();
    if (bytes < 0 || bytes > room - end || offsets != vector<i64>{end, end + bytes})
      damaged(json.place(),
          text("has bad data_offsets, or the file is cut short (got %s, need %ld "
               "bytes for %s from %ld on, up to %ld)",
              json["data_offsets"].dump().c_str(), bytes, describe(tensor).c_str(), end, room));
    end += bytes;
    if (!all.tensors.emplace(name, tensor).second) damaged(json.place(), "is in two shards");
  }
  if (end != room)
    damaged(path,
        text("has bytes behind its last tensor (got %ld bytes of data, need %ld)", room, end));
}

Safetensors open_safetensors(const string& path) {
  string folder = fs::path(path + "/").parent_path();
  std::set<string> files;
  if (!fs::is_directory(folder)) {
    files = {folder};
  } else if (fs::exists(folder + kModel)) {
    files = {folder + kModel};
  } else if (fs::exists(folder + kIndex)) {
    Json weights = Json::parse_file(folder + kIndex)["weight_map"];
    for (const string& name : weights.keys())
      files.insert(folder + "/" + weights[name].as_string());
  } else {
    bad_input(folder, "has no weights (need model.safetensors or model.safetensors.index.json)",
        "a folder in Hugging Face layout");
  }
  Safetensors all;
  for (const string& file : files) open_file(all, file);
  return all;
}

void write_header(DurableFile& file, const vector<TensorDecl>& tensors) {
  JsonWriter json;  // transformers asks for this metadata
  json.object().key("__metadata__").object().key("format").value("pt").end();
  i64 end = 0;
  for (const TensorDecl& tensor : tensors) {
    i64 begin = std::exchange(end, end + tensor.bytes());
    json.key(tensor.name).object().members("dtype", name_of(tensor.dtype), "shape", tensor.shape);
    json.members("data_offsets", vector{begin, end}).end();
  }
  string header = json.end().str();
  header.resize((header.size() + 7) / 8 * 8, ' ');  // so that the data are aligned
  auto length = i64(header.size());
  file.write(&length, 8);
  file.write(header);
}

vector<Shard> plan_shards(const string& folder, const vector<TensorDecl>& tensors, i64 max_bytes) {
  vector<Shard> shards;
  i64 filled = 0;
  for (const TensorDecl& tensor : tensors) {
    if (shards.empty() || tensor.bytes() > max_bytes - filled) {
      shards.emplace_back();
      filled = 0;
    }
    filled += tensor.bytes();
    shards.back().tensors.push_back(tensor);
  }
  size_t n = shards.size();
  for (size_t i = 0; i < n; i++)
    shards[i].path =
        folder + (n == 1 ? kModel : text("/model-%05zu-of-%05zu.safetensors", i + 1, n));
  return shards;
}

void write_index(const string& folder, const vector<Shard>& shards) {
  if (shards.size() == 1) return;
  JsonWriter map;
  i64 total = 0;
  map.object();
  for (const Shard& shard : shards)
    for (const TensorDecl& tensor : shard.tensors) {
      map.key(tensor.name).value(shard.path.substr(folder.size() + 1));
      total += tensor.bytes();
    }
  JsonWriter json;
  json.object().key("metadata").object().key("total_size").value(total).end();
  json.key("weight_map").raw(map.end().str());
  write_file_durably(folder + kIndex, json.end().str() + "\n");
}

template <class T>
static void convert(const void* src, float* dst, i64 n) {
  T value;
  for (i64 i = 0; i < n; i++) {
    memcpy(&value, static_cast<const T*>(src) + i, sizeof(T));
    dst[i] = float(value);
  }
}

void to_f32(FileDType dtype, const void* src, float* dst, i64 n) {
  if (!is_float(dtype)) failed("to_f32", string("cannot convert ") + name_of(dtype));
  if (dtype == FileDType::F32) memcpy(dst, src, n * 4);
  if (dtype == FileDType::F64) convert<double>(src, dst, n);
  if (dtype == FileDType::BF16) convert<BF16>(src, dst, n);
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

NpyHeader parse_npy_header(const char* data, i64 size, const string& place) {
  if (size < 10 || !string_view(data, 10).starts_with("\x93NUMPY"))
    damaged(place, text("is not an NPY array, or is cut short (got %ld bytes)", size));
  if (data[6] != 1) damaged(place, text("has an unknown NPY version (got %d, need 1)", data[6]));
  NpyHeader header{.header_bytes = 10 + u8(data[8]) + 256 * u8(data[9])};
  i64 room = size - header.header_bytes;
  if (room < 0)
    damaged(place,
        text("is cut short (got %ld bytes, need a header of %ld)", size, header.header_bytes));
  string dict(data + 10, data + header.header_bytes);
  char dtype[8] = "", fortran[8] = "";
  int shape = 0;  // where it begins
  sscanf(dict.c_str(), "{'descr': '%7[^']', 'fortran_order': %7[a-zA-Z], 'shape': (%n", dtype,
      fortran, &shape);
  if (shape == 0 || fortran != string("False"))
    damaged(
        place, "has a header that numpy does not write for an array in C order (got " + dict + ")");
  header.dtype = read_dtype(dtype, &Known::npy, place);
  const char* at = &dict[shape];
  for (char* end = nullptr; *at != ')'; at = end + strspn(end, ", ")) {
    header.shape.push_back(strtoll(at, &end, 10));
    if (end == at || header.shape.back() < 0) damaged(place, "has a bad shape (got " + dict + ")");
  }
  i64 bytes = header.bytes();
  if (bytes < 0) damaged(place, "has a shape that is too large");
  if (bytes > room)
    damaged(place, text("is cut short (got %ld bytes of data, need %ld)", room, bytes));
  return header;
}

string npy_header(FileDType dtype, const vector<i64>& shape) {
  string dict = text("{'descr': '%s', 'fortran_order': False, 'shape': (%s%s), }",
      npy_name_of(dtype), list(shape).c_str(), shape.size() == 1 ? "," : "");
  if (dict.size() > 117) failed("npy_header", "the shape is too long");
  dict.resize(117, ' ');
  return string("\x93NUMPY\x01\0\x76\0", 10) + dict + '\n';
}

void write_npy(const string& path, FileDType dtype, const vector<i64>& shape, const void* data) {
  DurableFile file(path);
  file.write(npy_header(dtype, shape));
  file.write(data, TensorDecl{"", dtype, shape}.bytes());
  file.finish();
}

NpyArray read_npy(const string& path) {
  const MappedFile file(path);
  const NpyHeader header = parse_npy_header(file.data(), file.size(), path);
  return {file, header, file.data() + header.header_bytes};
}

}
