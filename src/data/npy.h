// NumPy's array files: version 1, little endian, C order.
#pragma once

#include "data/durable.h"

namespace pith {

enum class NpyType : uint8_t { U1, U2, U4, U8, I4, I8, F4, F8 };
int64_t size_of(NpyType type);
const char* name_of(NpyType type);  // "<u2", as in the header

struct NpyHeader {
  NpyType type = NpyType::U1;
  vector<int64_t> shape;     // empty: a scalar
  int64_t header_bytes = 0;  // the data begin here
  int64_t numel() const;
  int64_t data_bytes() const { return numel() * size_of(type); }
};

// The header of an array in the `size` bytes at `data`. Exit code 2 unless all of it is there.
NpyHeader parse_npy_header(const char* data, int64_t size, const string& place);

// Padded to `bytes`, a multiple of 64; 128 hold three dimensions.
string npy_header(NpyType type, const vector<int64_t>& shape, int64_t bytes = 128);

void write_npy(const string& path, NpyType type, const vector<int64_t>& shape, const void* data);

struct NpyArray {
  MappedFile file;
  NpyHeader header;
  const char* data = nullptr;  // may be unaligned
};
NpyArray read_npy(const string& path);

}  // namespace pith
