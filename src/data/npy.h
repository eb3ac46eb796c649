// NumPy's array files: version 1, little endian, C order.
#pragma once

#include "data/durable.h"

namespace pith {

enum class NpyType : u8 { U2, U4, U8, I4, F4 };
i64 size_of(NpyType type);
const char* name_of(NpyType type);  // "<u2", as in the header

struct NpyHeader {
  NpyType type = NpyType::U2;
  vector<i64> shape;  // empty: a scalar
  i64 header_bytes = 0;
  i64 numel() const;
  i64 data_bytes() const { return numel() * size_of(type); }
};

// Exit code 2 unless all of it is there.
NpyHeader parse_npy_header(const char* data, i64 size, const string& place);

// Padded to `bytes`, a multiple of 64; 128 hold three dimensions.
string npy_header(NpyType type, const vector<i64>& shape, i64 bytes = 128);

void write_npy(const string& path, NpyType type, const vector<i64>& shape, const void* data);

struct NpyArray {
  MappedFile file;
  NpyHeader header;
  const char* data = nullptr;  // may be unaligned
};
NpyArray read_npy(const string& path);

}
