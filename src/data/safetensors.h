// The Hugging Face tensor format, https://huggingface.co/docs/safetensors.
#pragma once
#include <map>

#include "data/durable.h"

namespace pith {

enum class FileDType : u8 { F32, F64, BF16, F16, F8_E4M3, I64, I32, U8, BOOL };
i64 size_of(FileDType dtype);
const char* name_of(FileDType dtype);  // "BF16", as in the header
bool is_float(FileDType dtype);        // to_f32() takes it

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

}
