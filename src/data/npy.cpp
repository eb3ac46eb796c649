#include "data/npy.h"

#include <algorithm>

namespace pith {

static constexpr struct {
  const char* name;
  i64 bytes;
} kTypes[] = {{"<u2", 2}, {"<u4", 4}, {"<u8", 8}, {"<i4", 4}, {"<f4", 4}};

i64 size_of(NpyType type) { return kTypes[int(type)].bytes; }
const char* name_of(NpyType type) { return kTypes[int(type)].name; }

i64 NpyHeader::numel() const {
  i64 n = 1;
  for (const i64 size : shape) n *= size;
  return n;
}

NpyHeader parse_npy_header(const char* data, i64 size, const string& place) {
  auto refuse = [&](const string& what) {
    bad_input(place, what, "write or fetch the file again");
  };
  if (size < 10 || !string_view(data, 10).starts_with("\x93NUMPY"))
    refuse(text("is not an NPY array, or is cut short (got %ld bytes)", size));
  if (data[6] != 1) refuse(text("has an unknown NPY version (got %d, need 1)", data[6]));
  NpyHeader header;
  header.header_bytes = 10 + u8(data[8]) + 256 * u8(data[9]);
  i64 room = size - header.header_bytes;
  if (room < 0)
    refuse(text("is cut short (got %ld bytes, need a header of %ld)", size, header.header_bytes));
  string dict(data + 10, data + header.header_bytes);
  char type[8] = "", fortran[8] = "";
  int shape = 0;  // where it begins
  sscanf(dict.c_str(), "{'descr': '%7[^']', 'fortran_order': %7[a-zA-Z], 'shape': (%n", type,
         fortran, &shape);
  if (shape == 0 || fortran != string("False"))
    refuse("has a header that numpy does not write for an array in C order (got " + dict + ")");
  auto known = std::ranges::find_if(kTypes, [&](auto& t) { return t.name == string(type); });
  if (known == std::end(kTypes))
    refuse(text("has an unknown dtype (got \"%s\", need <u2, <u4, ...)", type));
  header.type = NpyType(known - kTypes);
  i64 bytes = known->bytes;
  const char* at = &dict[shape];
  for (char* end = nullptr; *at != ')'; at = end + strspn(end, ", ")) {
    header.shape.push_back(strtoll(at, &end, 10));
    if (end == at || header.shape.back() < 0) refuse("has a bad shape (got " + dict + ")");
    i64 extent = max<i64>(header.shape.back(), 1);
    if (__builtin_mul_overflow(bytes, extent, &bytes)) refuse("has a shape that is too large");
  }
  if (header.data_bytes() > room)
    refuse(text("is cut short (got %ld bytes of data, need %ld)", room, header.data_bytes()));
  return header;
}

string npy_header(NpyType type, const vector<i64>& shape, i64 bytes) {
  string tuple;
  for (const i64 size : shape) tuple += (tuple.empty() ? "" : ", ") + std::to_string(size);
  if (shape.size() == 1) tuple += ',';
  string dict = text("{'descr': '%s', 'fortran_order': False, 'shape': (%s), }", name_of(type),
                     tuple.c_str());
  auto length = size_t(bytes - 10);
  if (dict.size() >= length) failed("npy_header", text("needs more than %ld bytes", bytes));
  dict.resize(length - 1, ' ');
  return string("\x93NUMPY\x01\0", 8) + char(length & 0xff) + char(length >> 8) + dict + '\n';
}

void write_npy(const string& path, NpyType type, const vector<i64>& shape, const void* data) {
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

}
