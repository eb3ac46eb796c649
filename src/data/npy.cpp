#include "data/npy.h"

#include <algorithm>

#include "core/json.h"

namespace pith {

static constexpr struct {
  const char* name;
  int64_t bytes;
} kTypes[] = {{"|u1", 1}, {"<u2", 2}, {"<u4", 4}, {"<u8", 8},
              {"<i4", 4}, {"<i8", 8}, {"<f4", 4}, {"<f8", 8}};

int64_t size_of(NpyType type) { return kTypes[int(type)].bytes; }
const char* name_of(NpyType type) { return kTypes[int(type)].name; }

int64_t NpyHeader::numel() const {
  int64_t n = 1;
  for (const int64_t size : shape) n *= size;
  return n;
}

// The Python literal {'descr': '<u2', 'fortran_order': False, 'shape': (3, 4), } as JSON: other
// quotes and brackets, words in small letters, no comma before a bracket.
static string as_json(string_view literal) {
  string json;
  for (const char c : literal) {
    const size_t at = string_view("'()TF").find(c);
    if (string_view("})").find(c) != string::npos && json.ends_with(',')) json.pop_back();
    if (c != ' ' && c != '\n') json += at == string::npos ? c : "\"[]tf"[at];
  }
  return json;
}

NpyHeader parse_npy_header(const char* data, int64_t size, const string& place) {
  const auto refuse = [&](const string& what) {
    bad_input(place, what, "write or fetch the file again");
  };
  if (size < 10 || !string_view(data, 10).starts_with("\x93NUMPY"))
    refuse(text("is not an NPY array, or is cut short (got %ld bytes)", size));
  if (data[6] != 1) refuse(text("has an unknown NPY version (got %d, need 1)", data[6]));
  NpyHeader header;
  header.header_bytes = 10 + uint8_t(data[8]) + 256 * uint8_t(data[9]);
  const int64_t room = size - header.header_bytes;
  if (room < 0)
    refuse(text("is cut short (got %ld bytes, need a header of %ld)", size, header.header_bytes));
  const Json json = Json::parse(as_json(string_view(data, header.header_bytes).substr(10)),
                                place + ": NPY header");
  const string type = json["descr"].as_string();
  const auto known = std::ranges::find_if(kTypes, [&](auto& t) { return type == t.name; });
  if (known == std::end(kTypes))
    refuse("has an unknown dtype (got \"" + type + "\", need |u1, <u2, ...)");
  header.type = NpyType(known - kTypes);
  if (json["fortran_order"].as_bool()) refuse("is in Fortran order (need C order)");
  int64_t bytes = known->bytes;
  for (int64_t i = 0; i < json["shape"].size(); i++) {
    header.shape.push_back(json["shape"][i].as_int(0));
    const int64_t extent = std::max<int64_t>(header.shape.back(), 1);
    if (__builtin_mul_overflow(bytes, extent, &bytes)) refuse("has a shape that is too large");
  }
  if (header.data_bytes() > room)
    refuse(text("is cut short (got %ld bytes of data, need %ld)", room, header.data_bytes()));
  return header;
}

string npy_header(NpyType type, const vector<int64_t>& shape, int64_t bytes) {
  string tuple;
  for (const int64_t size : shape) tuple += (tuple.empty() ? "" : ", ") + std::to_string(size);
  if (shape.size() == 1) tuple += ',';
  string dict = text("{'descr': '%s', 'fortran_order': False, 'shape': (%s), }", name_of(type),
                     tuple.c_str());
  const auto length = size_t(bytes - 10);
  if (dict.size() >= length) failed("npy_header", text("needs more than %ld bytes", bytes));
  dict.resize(length - 1, ' ');
  return string("\x93NUMPY\x01\0", 8) + char(length & 0xff) + char(length >> 8) + dict + '\n';
}

void write_npy(const string& path, NpyType type, const vector<int64_t>& shape, const void* data) {
  DurableFile file(path);
  file.write(npy_header(type, shape).data(), 128);
  file.write(data, NpyHeader{type, shape}.data_bytes());
  file.finish();
}

NpyArray read_npy(const string& path) {
  const MappedFile file(path);
  const NpyHeader header = parse_npy_header(file.data(), file.size(), path);
  return {file, header, file.data() + header.header_bytes};
}

}  // namespace pith
