#pragma once

#include "core/tensor.h"
#include "data/array_files.h"

namespace pith {

struct DataOptions {
  i64 seq_length = 0;  // S, tokens a sample
  i64 vocab_size = 0;  // token ids must be below it
  u64 seed = 0;
  bool shuffle = true;
  double heldout_fraction = 0;  // of documents
  i64 max_epochs = 1;
  bool document_mask = false;  // attention, positions and labels stay inside a document
};

// Where a sample is written: S elements each.
struct SampleRow {
  int* tokens = nullptr;
  int* labels = nullptr;    // the next token, or kIgnoreLabel
  int* doc_ends = nullptr;  // of each position's document in the row; S unmasked; may be null
};

// A .bin, mapped: token ids (u2 or u4), then u8 document ends, the last being num_tokens.
struct TokenFile {
  MappedFile map;
  FileDType type = FileDType::U16;
  i64 num_tokens = 0, num_docs = 0;
  const char* tokens = nullptr;
  const char* ends = nullptr;  // may be unaligned
  i64 doc_end(i64 doc) const;
  // Ids >= vocab_size are exit code 2.
  void copy(i64 offset, i64 count, i64 vocab_size, int* dst) const;
};
TokenFile open_token_file(const string& path);

// `path`, or all .bin below it in path order, not hidden. Exit code 2 if none.
vector<string> find_token_files(const string& path);

// Training samples are cut from a file's documents end to end, less a tail of at most S tokens;
// held-out ones from those of all files, the last padded. The XXH3 of its bytes holds a document
// out.
class Dataset {
 public:
  // Ids >= vocab_size are exit code 2 here, or above 1 GiB at the sample that holds them.
  Dataset(const vector<string>& paths, const DataOptions& options);

  const DataOptions& options() const { return options_; }
  i64 samples_per_epoch() const { return first_sample_.back(); }
  i64 heldout_samples() const;
  // Exit code 2 without `required` training samples or a held-out one.
  void require_samples(i64 required) const;
  void require_heldout() const;
  // Each epoch has its own permutation.
  void train_sample(i64 index, const SampleRow& row) const;
  // All labels are ignored from heldout_samples() on.
  void heldout_sample(i64 index, const SampleRow& row) const;
  // Of sizes, document ends and contents (of corpora above 64 MiB, 16 blocks a file).
  u64 fingerprint() const;

 private:
  struct Document {
    i64 begin;
    i64 file_offset;
    int file;
  };
  struct Stream {  // documents that are not empty, end to end
    vector<Document> documents;
    i64 num_tokens = 0;
    i64 num_labels() const { return num_tokens > 0 ? num_tokens - 1 : 0; }
  };
  void cut(const Stream& stream, i64 begin, const SampleRow& row) const;
  friend double bigram_nats(const Dataset& data);
  DataOptions options_;
  vector<TokenFile> files_;
  i64 token_bytes_ = 0;
  vector<Stream> train_;
  Stream heldout_;
  vector<i64> first_sample_;  // by file, then the number of samples
};

// positions[i] = i - (begin of i's document), from a whole row's doc_ends.
void positions_from_ends(const int* doc_ends, i64 seq_length, int* positions);

struct BatchShape {
  i64 global_batch = 1, micro_batch = 1;
  int dp = 1, ep = 1;
  i64 rows_per_rank() const { return global_batch / (i64{dp} * ep); }
  i64 num_micro_batches() const { return rows_per_rank() / micro_batch; }
};
// The sample of local row `row`; a step's set does not depend on the mesh.
i64 global_sample(const BatchShape& shape, i64 step, int dp_rank, int ep_rank, i64 row);

// Of a row's 2*cp equal blocks, rank r holds r and 2*cp-1-r; cp = 1 holds the row.
struct ZigzagBlocks {
  i64 begin[2], length[2];
  i64 total() const { return length[0] + length[1]; }
};
ZigzagBlocks zigzag_blocks(i64 seq_length, int cp, int cp_rank);
void take_zigzag(const int* row, const ZigzagBlocks& blocks, int* out);

// Mean nats a held-out label under an interpolated Kneser-Ney bigram model (Chen & Goodman 1998,
// eq. 21; one discount an order) of the training documents. NaN without labels; takes 4*V*V bytes.
constexpr i64 kBigramMaxVocab = 8192;
double bigram_nats(const Dataset& data);

}
