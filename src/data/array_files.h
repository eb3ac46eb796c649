// Tensors in Hugging Face's files, https://huggingface.co/docs/safetensors, and arrays in NumPy's
// (version 1, little endian, C order).
#pragma once
#include <map>

#include "data/durable.h"

namespace pith {

enum class FileDType : u8 { F32, F64, BF16, F16, F8_E4M3, I64, I32, U64, U32, U16, U8, BOOL };
i64 size_of(FileDType dtype);
const char* name_of(FileDType dtype);      // "BF16", as in safetensors
const char* npy_name_of(FileDType dtype);  // "<u2"
bool is_float(FileDType dtype);            // to_f32() takes it

struct TensorDecl {
  string name;
  FileDType dtype = FileDType::F32;
  vector<i64> shape;
  i64 bytes() const;  // -1 if they do not fit 63 bits
  i64 numel() const { return bytes() / size_of(dtype); }
};
string describe(const TensorDecl& tensor);  // "[128,64] BF16"

struct TensorEntry : TensorDecl {
  const char* data = nullptr;  // may be unaligned
  int file = 0;
};

struct Safetensors {
  vector<MappedFile> files;
  std::map<string, TensorEntry> tensors;
};
// A file, or a folder with model.safetensors or its index.json and shards. Damage is exit code 2.
Safetensors open_safetensors(const string& path);

// The bytes of the tensors come next, in order.
void write_header(DurableFile& file, const vector<TensorDecl>& tensors);

struct Shard {
  string path;
  vector<TensorDecl> tensors;
};
// FOLDER/model.safetensors or, beyond `max_bytes` of data a file, model-00001-of-000NN.safetensors
// ..., which want an index, too.
vector<Shard> plan_shards(const string& folder, const vector<TensorDecl>& tensors, i64 max_bytes);
void write_index(const string& folder, const vector<Shard>& shards);

void to_f32(FileDType dtype, const void* src, float* dst, i64 n);  // src may be unaligned
// To F32 (a copy) or BF16: to nearest, ties to even; NaN stays NaN.
void from_f32(FileDType dtype, const float* src, void* dst, i64 n);

struct NpyHeader : TensorDecl {
  i64 header_bytes = 0;
};
// Exit code 2 unless all of the array is there.
NpyHeader parse_npy_header(const char* data, i64 size, const string& place);
// 128 bytes, for at most three dimensions.
string npy_header(FileDType dtype, const vector<i64>& shape);
void write_npy(const string& path, FileDType dtype, const vector<i64>& shape, const void* data);

struct NpyArray {
  MappedFile file;
  NpyHeader header;
  const char* data = nullptr;  // may be unaligned
};
NpyArray read_npy(const string& path);

}
