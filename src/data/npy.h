// NumPy's array files (numpy.lib.format): version 1, little endian, C order.
#pragma once

#include "data/durable.h"

namespace pith {

enum class NpyType : uint8_t { U1, U2, U4, U8, I4, I8, F4, F8 };
int64_t size_of(NpyType type);      // bytes of one element
const char* name_of(NpyType type);  // "<u2", as in the header

struct NpyHeader {
  NpyType type = NpyType::U1;
  vector<int64_t> shape;     // empty: a scalar
  int64_t header_bytes = 0;  // the data begin here
  int64_t numel() const;
  int64_t data_bytes() const { return numel() * size_of(type); }
};

// The header at `data`, of which `size` bytes may be read: of an array that is whole, or it is exit
// code 2 naming `place`.
NpyHeader parse_npy_header(const char* data, int64_t size, const string& place);

// A header padded to `bytes`, a multiple of 64; 128 hold three dimensions.
string npy_header(NpyType type, const vector<int64_t>& shape, int64_t bytes = 128);

// Writes a whole array durably.
void write_npy(const string& path, NpyType type, const vector<int64_t>& shape, const void* data);

struct NpyArray {
  MappedFile file;
  NpyHeader header;
  const char* data = nullptr;  // unaligned in some files of others
};
NpyArray read_npy(const string& path);

}  // namespace pith
