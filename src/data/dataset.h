// Tokenised files, split into training and held-out documents, cut into samples, shuffled.
#pragma once

#include "core/tensor.h"
#include "data/npy.h"

namespace pith {

struct DataOptions {
  int64_t seq_length = 0;  // S, tokens a sample
  int64_t vocab_size = 0;  // token ids must be below it
  uint64_t seed = 0;       // of the shuffle
  bool shuffle = true;
  double heldout_fraction = 0;  // of documents
  int64_t max_epochs = 1;
  bool document_mask = false;  // attention, positions and labels stay inside a document
};

// Where a sample is written: S elements each.
struct SampleRow {
  int32_t* tokens = nullptr;
  int32_t* labels = nullptr;    // the next token, or kIgnoreLabel
  int32_t* doc_ends = nullptr;  // of each position's document in the row; S unmasked; may be null
};

// A .bin, mapped: token ids (u1, u2, u4 or u8), then u8 document ends, the last being num_tokens.
struct TokenFile {
  MappedFile map;
  NpyType type = NpyType::U2;
  int64_t num_tokens = 0, num_docs = 0;
  const char* tokens = nullptr;
  const char* ends = nullptr;  // may be unaligned
  int64_t doc_end(int64_t doc) const;
  // Copies tokens [offset, offset + count); ids >= vocab_size are exit code 2.
  void copy(int64_t offset, int64_t count, int64_t vocab_size, int32_t* dst) const;
};
TokenFile open_token_file(const string& path);

// `path`, or all .bin below a folder in path order, but no hidden ones. Exit code 2 if none.
vector<string> find_token_files(const string& path);

// Training samples are cut from a file's training documents end to end, less a tail of fewer than
// S + 1 tokens; held-out ones from those of all files, the last padded with ignored labels. A
// document is held out by the XXH3 of its token bytes. Const functions are safe from many threads.
class Dataset {
 public:
  // Token ids >= vocab_size are found here, or above 1 GiB by the sample that holds them.
  Dataset(const vector<string>& paths, const DataOptions& options);

  const DataOptions& options() const { return options_; }
  int64_t samples_per_epoch() const { return first_sample_.back(); }
  int64_t heldout_samples() const;
  // Exit code 2 if a run cannot read `required` training samples, or any held-out one.
  void require_samples(int64_t required) const;
  void require_heldout() const;
  // Sample `index` of the whole run: each epoch has its own permutation.
  void train_sample(int64_t index, const SampleRow& row) const;
  // In corpus order; all labels are ignored from heldout_samples() on.
  void heldout_sample(int64_t index, const SampleRow& row) const;
  // Of sizes, document ends and contents (of corpora above 64 MiB, 16 blocks a file).
  uint64_t fingerprint() const;

 private:
  struct Document {
    int64_t begin;        // in the stream
    int64_t file_offset;  // of its first token
    int file;
  };
  struct Stream {  // documents that are not empty, end to end
    vector<Document> documents;
    int64_t num_tokens = 0;
    int64_t num_labels() const { return num_tokens > 0 ? num_tokens - 1 : 0; }
  };
  void cut(const Stream& stream, int64_t begin, const SampleRow& row) const;
  friend double bigram_nats(const Dataset& data);
  DataOptions options_;
  vector<TokenFile> files_;
  int64_t token_bytes_ = 0;
  vector<Stream> train_;  // one a file
  Stream heldout_;
  vector<int64_t> first_sample_;  // by file, then the number of samples
};

// positions[i] = i - (begin of i's document), from a whole row's doc_ends.
void positions_from_ends(const int32_t* doc_ends, int64_t seq_length, int32_t* positions);

// How a step's global batch is dealt out to (dp, ep) and micro-batches.
struct BatchShape {
  int64_t global_batch = 1, micro_batch = 1;
  int dp = 1, ep = 1;
  int64_t rows_per_rank() const { return global_batch / (int64_t{dp} * ep); }
  int64_t num_micro_batches() const { return rows_per_rank() / micro_batch; }
};
// The sample of local row `row`; a step's set does not depend on the mesh.
int64_t global_sample(const BatchShape& shape, int64_t step, int dp_rank, int ep_rank, int64_t row);

// Of a row's 2*cp equal blocks, rank r holds r and 2*cp-1-r; cp = 1 holds the row.
struct ZigzagBlocks {
  int64_t begin[2], length[2];
  int64_t total() const { return length[0] + length[1]; }
};
ZigzagBlocks zigzag_blocks(int64_t seq_length, int cp, int cp_rank);
void take_zigzag(const int32_t* row, const ZigzagBlocks& blocks, int32_t* out);

// Mean nats a held-out label under an interpolated Kneser-Ney bigram model of the training
// documents (Chen & Goodman 1998, eq. 21; one discount an order). NaN without labels; takes 4*V*V
// bytes.
constexpr int64_t kBigramMaxVocab = 8192;
double bigram_nats(const Dataset& data);

}  // namespace pith
