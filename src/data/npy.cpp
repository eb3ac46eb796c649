#include "data/npy.h"

#include <algorithm>
#include <cctype>

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

static constexpr string_view kMagic = "\x93NUMPY";
static const char* const kRefetch = "write or fetch the file again";

// The header's Python literal, {'descr': '<u2', 'fortran_order': False, 'shape': (3, 4), }, as
// JSON, which has other quotes and brackets, words in small letters, and no commas before brackets.
static string as_json(string_view literal) {
  string json;
  for (const char c : literal) {
    const bool closes = c == '}' || c == ')' || c == ']';
    if (isspace(static_cast<unsigned char>(c))) continue;
    if (closes && json.ends_with(',')) json.pop_back();
    const size_t at = string_view("'()TF").find(c);
    json += at == string_view::npos ? c : "\"[]tf"[at];
  }
  return json;
}

NpyHeader parse_npy_header(const char* data, int64_t size, const string& place) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(data);
  if (size < 12 || !string_view(data, 12).starts_with(kMagic))
    bad_input(place, text("is not an NPY array, or is cut short (got %ld bytes)", size), kRefetch);
  const int version = bytes[6];
  if (version < 1 || version > 3)
    bad_input(place, text("has an unknown NPY version (got %d, need 1, 2 or 3)", version),
              "save it again with numpy.save");
  int64_t length = bytes[8] | bytes[9] << 8, begin = 10;
  if (version > 1) {
    length |= int64_t{bytes[10]} << 16 | int64_t{bytes[11]} << 24;
    begin = 12;
  }
  NpyHeader header;
  header.header_bytes = begin + length;
  const int64_t room = size - header.header_bytes;
  if (room < 0)
    bad_input(place,
              text("is cut short (got %ld bytes, need a header of %ld)", size, begin + length),
              kRefetch);
  const Json json = Json::parse(as_json({data + begin, size_t(length)}), place + ": NPY header");
  const string type = json["descr"].as_string();
  const auto known =
      std::ranges::find_if(kTypes, [&](const auto& known_type) { return type == known_type.name; });
  if (known == std::end(kTypes))
    bad_input(place,
              "has an unknown dtype (got \"" + type +
                  "\", need |u1, <u2, <u4, <u8, <i4, <i8, <f4 or <f8)",
              "convert the array with numpy");
  header.type = static_cast<NpyType>(known - kTypes);
  int64_t need = known->bytes;
  for (int64_t i = 0; i < json["shape"].size(); i++) {
    header.shape.push_back(json["shape"][i].as_int(0));
    const int64_t extent = std::max<int64_t>(header.shape.back(), 1);
    if (__builtin_mul_overflow(need, extent, &need))
      bad_input(place, "has a shape that is too large", kRefetch);
  }
  if (json["fortran_order"].as_bool() && header.shape.size() > 1)
    bad_input(place, "is in Fortran order (need C order)", "save numpy.ascontiguousarray of it");
  if (header.data_bytes() > room)
    bad_input(place,
              text("is cut short (got %ld bytes of data, need %ld)", room, header.data_bytes()),
              kRefetch);
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
  const char sizes[4] = {1, 0, char(length & 0xff), char(length >> 8)};
  return string(kMagic) + string(sizes, 4) + dict + '\n';
}

void write_npy(const string& path, NpyType type, const vector<int64_t>& shape, const void* data) {
  DurableFile file(path);
  const string head = npy_header(type, shape);
  file.write(head.data(), int64_t(head.size()));
  file.write(data, NpyHeader{type, shape}.data_bytes());
  file.finish();
}

NpyArray read_npy(const string& path) {
  const MappedFile file(path);
  const NpyHeader header = parse_npy_header(file.data(), file.size(), path);
  return {file, header, file.data() + header.header_bytes};
}

}  // namespace pith
