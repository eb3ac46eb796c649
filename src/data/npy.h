// npy: NumPy's array files (format versions 1.0 and 2.0; numpy.lib.format), little endian, C order.
// defines: NpyType, NpyHeader, parse_npy_header, write_npy, NpyArray, read_npy, NpyAppender
#pragma once
#include <vector>

#include "data/durable.h"

namespace pith {

enum class NpyType : uint8_t { U1, U2, U4, U8, I4, I8, F4, F8 };
int64_t size_of(NpyType type);      // bytes of one element
const char* name_of(NpyType type);  // "<u2", as in the header

struct NpyHeader {
    NpyType type = NpyType::U1;
    std::vector<int64_t> shape;  // empty: a scalar
    int64_t header_bytes = 0;    // where the data begin, from where the header begins
    int64_t numel() const;
    int64_t data_bytes() const { return numel() * size_of(type); }
};

// The header at `data`, of which `size` bytes may be read, with the array's data behind it. Exit
// code 2 naming `place` if it is not an NPY header, is cut short, has another dtype, is big endian
// or in Fortran order, or if the data behind it are cut short.
NpyHeader parse_npy_header(const char* data, int64_t size, const std::string& place);

// A version 1.0 header, padded with spaces to `bytes` (a multiple of 64 holding up to three
// dimensions by default).
std::string npy_header(NpyType type, const std::vector<int64_t>& shape, int64_t bytes = 128);

// Writes a whole array durably.
void write_npy(const std::string& path, NpyType type, const std::vector<int64_t>& shape,
               const void* data);

// A mapped array; elements may be unaligned only in files written by others.
struct NpyArray {
    MappedFile file;
    NpyHeader header;
    const char* data = nullptr;
};
NpyArray read_npy(const std::string& path);

// Appends a 1-D array of yet unknown length to a durable file: the header is written first, and
// corrected by end(). Several arrays may follow each other in one file:
//   DurableFile file(path);
//   NpyAppender tokens(file, NpyType::U2);  tokens.append(ids, n); ...  tokens.end();
//   NpyAppender ends(file, NpyType::U8);    ends.append(ends, m);       ends.end();
//   file.finish();
class NpyAppender {
  public:
    NpyAppender(DurableFile& file, NpyType type);
    void append(const void* elements, int64_t count);
    void end();
    int64_t count() const { return count_; }

  private:
    DurableFile& file_;
    NpyType type_;
    int64_t begin_, count_ = 0;
};

}  // namespace pith
