// safetensors: reading and writing the Hugging Face tensor format: 8 bytes of header length, a JSON
// header {name: {dtype, shape, data_offsets}}, then the tensors' bytes without gaps.
// https://huggingface.co/docs/safetensors
// defines: FileDType, TensorEntry, SafetensorsReader, TensorDecl, SafetensorsWriter, ShardedWriter,
//          to_f32, f32_to_bf16
#pragma once
#include <map>
#include <optional>

#include "data/durable.h"

namespace pith {

// clang-format off
enum class FileDType : uint8_t {
    F32, F64, F16, BF16, F8_E4M3, F8_E5M2, I64, I32, I16, I8, U64, U32, U16, U8, BOOL
};
// clang-format on
int64_t size_of(FileDType dtype);      // bytes of one element
const char* name_of(FileDType dtype);  // "BF16", as in the header
bool is_float(FileDType dtype);        // to_f32() takes it

// A tensor inside a mapped file. `data` may be unaligned (files of others need not pad).
struct TensorEntry {
  string name;
  FileDType dtype = FileDType::F32;
  vector<int64_t> shape;
  const char* data = nullptr;
  int64_t bytes = 0;
  int file = 0;  // index into SafetensorsReader::files()
  int64_t numel() const { return bytes / size_of(dtype); }
};
// "[128,64] BF16"
string describe(const TensorEntry& tensor);

// One .safetensors file, or a folder in the Hugging Face layout: model.safetensors, or
// model.safetensors.index.json with its shards. Opening checks everything but the values: header
// length, JSON, unknown dtypes, duplicate names, sizes that disagree with the shape, offsets that
// overlap, leave gaps or pass the end; missing shards, and index entries and shards that disagree.
// Each is exit code 2 naming the file and the tensor.
class SafetensorsReader {
 public:
  explicit SafetensorsReader(const string& path);
  // All tensors: file by file, within a file by offset.
  const vector<TensorEntry>& tensors() const { return tensors_; }
  const vector<MappedFile>& files() const { return files_; }
  const TensorEntry& at(const string& name) const;  // exit code 2 if absent
  // "DIR/model.safetensors: NAME": the place for an error about a tensor.
  string place(const TensorEntry& tensor) const;
  // Entry of the header's __metadata__ (of the first file that has it), or empty.
  string metadata(const string& key) const;

 private:
  void open_file(const string& path);
  void open_index(const string& index_path);
  string path_;
  vector<MappedFile> files_;
  vector<TensorEntry> tensors_;
  std::map<string, size_t> by_name_;  // indices of tensors_
  std::map<string, string> metadata_;
};

struct TensorDecl {
  string name;
  FileDType dtype = FileDType::F32;
  vector<int64_t> shape;
  int64_t bytes() const;
};

// Streams one file in constant memory: all tensors are declared, then their bytes are written in
// declared order, in pieces of any size. Durable, see DurableFile. Its metadata is {"format":
// "pt"}, which transformers asks for.
class SafetensorsWriter {
 public:
  SafetensorsWriter(const string& path, const vector<TensorDecl>& tensors);
  void write(const void* bytes, int64_t size);
  // Exit code 1 unless exactly the declared bytes were written.
  void finish();
  int64_t bytes_left() const { return total_bytes_ - file_.size(); }
  int64_t size() const { return file_.size(); }  // bytes written, the header's included

 private:
  DurableFile file_;
  int64_t total_bytes_ = 0;  // of the file
};

// Streams a Hugging Face folder: tensors are packed in declared order into shards of at most
// max_shard_bytes of data (a larger tensor gets one of its own), named
// model-00001-of-000NN.safetensors, and the index is written last; one shard alone is
// model.safetensors without an index. Destroyed unfinished, it removes the shards it wrote.
class ShardedWriter {
 public:
  static constexpr int64_t kMaxShardBytes = int64_t{5} * 1000 * 1000 * 1000;
  ShardedWriter(const string& folder, vector<TensorDecl> tensors,
                int64_t max_shard_bytes = kMaxShardBytes);
  ShardedWriter(const ShardedWriter&) = delete;
  ShardedWriter& operator=(const ShardedWriter&) = delete;
  ~ShardedWriter();
  void write(const void* bytes, int64_t size);
  void finish();
  int num_shards() const { return int(shards_.size()); }

 private:
  string shard_path(size_t shard) const;
  void open_next();
  string folder_;
  vector<vector<TensorDecl>> shards_;
  size_t begun_ = 0;  // shards; the last of them is being written
  std::optional<SafetensorsWriter> writer_;
};

// n elements of F32, F64, BF16 or F16 as F32; src may be unaligned. Exit code 1 for other dtypes.
void to_f32(FileDType dtype, const void* src, float* dst, int64_t n);
// Round to nearest, ties to even; NaN stays NaN.
void f32_to_bf16(const float* src, uint16_t* dst, int64_t n);
// F32 (a copy) or BF16.
void from_f32(FileDType dtype, const float* src, void* dst, int64_t n);

}  // namespace pith
