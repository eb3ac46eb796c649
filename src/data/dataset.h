// Tokenised files, split into training and held-out documents, cut into samples, shuffled. What a
// sample holds depends on (files, options) alone.
#pragma once

#include "core/tensor.h"
#include "data/npy.h"

namespace pith {

struct DataOptions {
  int64_t seq_length = 0;       // S, tokens a sample
  int64_t vocab_size = 0;       // token ids must be below it
  uint64_t seed = 0;            // of the shuffle
  bool shuffle = true;          // false: every epoch takes the samples in corpus order
  double heldout_fraction = 0;  // of documents, by hash; 1 holds out every document
  int64_t max_epochs = 1;       // passes over the training samples a run may take
  bool document_mask = false;   // attention, positions and labels stay inside a document
};

// Where a sample is written: S elements each.
struct SampleRow {
  int32_t* tokens = nullptr;
  int32_t* labels = nullptr;    // the next token; kIgnoreLabel where there is none to predict
  int32_t* doc_ends = nullptr;  // end (exclusive) in the row of each position's document, or S
                                // without document_mask; may be null
};

// One .bin, mapped: two NPY arrays back to back, token ids (u1, u2, u4 or u8) and u8 document ends
// (cumulative; the last one is the number of tokens).
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
// Exit code 2 naming the file for a truncated or corrupt one.
TokenFile open_token_file(const string& path);

// `path` itself, or all .bin below a folder in path order, names that begin with "." aside. Exit
// code 2 if there is none.
vector<string> find_token_files(const string& path);

// Samples are windows of S tokens, labelled with the window shifted by one. Training samples are
// cut from a file's training documents end to end; a tail of fewer than S + 1 tokens is dropped.
// The held-out documents of all files form one stream whose last sample is padded with ignored
// labels. A document is held out when the XXH3 of its token bytes falls below the fraction,
// whatever the order or names of files. Const functions may be called from many threads.
class Dataset {
 public:
  // Exit code 2: a corrupt file, an empty corpus, or a token id >= vocab_size (in corpora above
  // 1 GiB found by the sample that holds it).
  Dataset(const vector<string>& paths, const DataOptions& options);

  const DataOptions& options() const { return options_; }
  int64_t samples_per_epoch() const { return first_sample_.back(); }
  int64_t heldout_samples() const;  // the padded one included
  // Exit code 2 naming the key to change: a run cannot read `required` training samples; there is
  // no held-out sample to evaluate on.
  void require_samples(int64_t required) const;
  void require_heldout() const;
  // Training sample `index` of the whole run: each epoch has its own permutation.
  void train_sample(int64_t index, const SampleRow& row) const;
  // Held-out sample `index` in corpus order; all labels are ignored from heldout_samples() on.
  void heldout_sample(int64_t index, const SampleRow& row) const;

  // XXH3 over sizes, document ends and contents (of corpora above 64 MiB, 16 blocks a file).
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
  int64_t token_bytes_ = 0;  // of all files
  vector<Stream> train_;     // one a file
  Stream heldout_;
  vector<int64_t> first_sample_;  // by file, then the number of samples
};

// positions[i] = i - (begin of i's document), from a whole row's doc_ends.
void positions_from_ends(const int32_t* doc_ends, int64_t seq_length, int32_t* positions);

// How a step's global batch is dealt out to (dp, ep) and micro-batches.
struct BatchShape {
  int64_t global_batch = 1, micro_batch = 1;
  int dp = 1, ep = 1;  // sizes of the axes
  int64_t rows_per_rank() const { return global_batch / (int64_t{dp} * ep); }
  int64_t num_micro_batches() const { return rows_per_rank() / micro_batch; }
};
// Training sample (or, with step 0, evaluation sample) of local row `row` in [0, rows_per_rank):
// row % micro_batch of micro-batch row / micro_batch. A step's set does not depend on the mesh.
int64_t global_sample(const BatchShape& shape, int64_t step, int dp_rank, int ep_rank, int64_t row);

// Context parallelism cuts a row of S tokens into 2*cp equal blocks: rank r holds blocks r and
// 2*cp-1-r; cp = 1 holds the row and an empty block. Exit code 2 unless 2*cp divides S or cp = 1.
struct ZigzagBlocks {
  int64_t begin[2], length[2];
  int64_t total() const { return length[0] + length[1]; }  // S / cp
};
ZigzagBlocks zigzag_blocks(int64_t seq_length, int cp, int cp_rank);
// Copies this rank's total() elements of a row of tokens, labels, ends or positions.
void take_zigzag(const int32_t* row, const ZigzagBlocks& blocks, int32_t* out);

// Mean nats a label of the held-out samples under an interpolated Kneser-Ney bigram model of the
// training documents (Chen & Goodman 1998, eq. 21): one discount an order, n1 / (n1 + 2 n2), and
// continuation counts interpolated with the uniform distribution. Takes 4*V*V bytes; exit code 2
// unless V <= kBigramMaxVocab and there are held-out labels.
constexpr int64_t kBigramMaxVocab = 8192;
double bigram_nats(const Dataset& data);

}  // namespace pith
