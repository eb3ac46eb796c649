// The Hugging Face tensor format, https://huggingface.co/docs/safetensors.
#pragma once
#include <optional>

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
  int file = 0;                // of SafetensorsReader::files()
};

// A file, or a folder with model.safetensors or its index.json and shards. Damage is exit code 2.
class SafetensorsReader {
 public:
  explicit SafetensorsReader(const string& path);
  const vector<MappedFile>& files() const { return files_; }
  const vector<TensorEntry>& tensors() const { return tensors_; }  // by file and offset
  const TensorEntry& at(const string& name) const;                 // exit code 2 if absent

 private:
  void open_file(const string& path);
  void open_index(const string& folder, const string& index);
  vector<MappedFile> files_;
  vector<TensorEntry> tensors_;
};

// Durably into PATH.safetensors or, beyond `max_bytes` of data a file,
// PATH-00001-of-000NN.safetensors ... and PATH.safetensors.index.json.
class SafetensorsWriter {
 public:
  SafetensorsWriter(const string& path, const vector<TensorDecl>& tensors,
                    i64 max_bytes = INT64_MAX);
  // Bytes in declared order, in pieces of any size.
  void write(const void* bytes, i64 size);
  void finish();  // exit code 1 unless exactly the declared bytes were written
  i64 size() const { return file_->size(); }  // of the file at hand, with its header
  int num_files() const { return int(shards_.size()); }

 private:
  string shard_path(size_t shard) const;
  void open_next();
  string path_;
  vector<vector<TensorDecl>> shards_;
  size_t begun_ = 0;  // shards; the last of them is being written
  i64 left_ = 0;
  std::optional<DurableFile> file_;
};

void to_f32(FileDType dtype, const void* src, float* dst, i64 n);  // src may be unaligned
// To F32 (a copy) or BF16: to nearest, ties to even; NaN stays NaN.
void from_f32(FileDType dtype, const float* src, void* dst, i64 n);

}
