// npy: NumPy's array files (numpy.lib.format), little endian, C order.
// defines: NpyType, NpyHeader, parse_npy_header, npy_header, write_npy, NpyArray, read_npy
#pragma once

#include "data/durable.h"

namespace pith {

enum class NpyType : uint8_t { U1, U2, U4, U8, I4, I8, F4, F8 };
int64_t size_of(NpyType type);      // bytes of one element
const char* name_of(NpyType type);  // "<u2", as in the header

struct NpyHeader {
  NpyType type = NpyType::U1;
  vector<int64_t> shape;     // empty: a scalar
  int64_t header_bytes = 0;  // where the data begin, from where the header begins
  int64_t numel() const;
  int64_t data_bytes() const { return numel() * size_of(type); }
};

// The header (of format 1, 2 or 3) at `data`, of which `size` bytes may be read, with the array's
// data behind it. Exit code 2 naming `place` if it is no NPY header, is cut short, has another
// dtype, is big endian or in Fortran order, or if the data behind it are cut short.
NpyHeader parse_npy_header(const char* data, int64_t size, const string& place);

// A header of format 1, padded with spaces to `bytes`, a multiple of 64; 128 hold three dimensions.
string npy_header(NpyType type, const vector<int64_t>& shape, int64_t bytes = 128);

// Writes a whole array durably.
void write_npy(const string& path, NpyType type, const vector<int64_t>& shape, const void* data);

// A mapped array; elements may be unaligned only in files written by others.
struct NpyArray {
  MappedFile file;
  NpyHeader header;
  const char* data = nullptr;
};
NpyArray read_npy(const string& path);

}  // namespace pith
