// corpus_parts: the stages of tokenize_corpus(): plan -> read -> encode -> write.
// defines: CorpusSource, CorpusUnit, plan_corpus, Bytes, SourceStream, BadLine, CorpusBatch,
//          BatchReader, LineParser, BatchEncoder, Claim, TokenFileWriter
#pragma once
#include <memory>

#include "data/corpus.h"
#include "data/npy.h"
#include "data/tokenizer.h"

namespace pith {

enum class Packing : uint8_t { None, Gzip, Zstd, ByContent };

struct CorpusSource {
  string path;        // as opened; "-" is standard input
  string name;        // relative to the input it was found in
  int64_t bytes = 0;  // as stored; 0 for standard input
  int64_t mtime_ns = 0;
  CorpusFormat format = CorpusFormat::Text;
  Packing packing = Packing::None;
};

// What becomes one token file.
struct CorpusUnit {
  string name;  // below the output folder, without ".bin"
  vector<CorpusSource> sources;
  int64_t bytes = 0;
  int64_t empty_files = 0;
  // Of the names, sizes, times and formats of the sources: another value, other sources.
  uint64_t identity() const;
};

// Finds the sources and deals them out to units, in path order. Exit code 2: nothing found, a
// suffix that tells no format, Parquet, an empty file (unless skip_bad or join), two sources for
// one token file.
vector<CorpusUnit> plan_corpus(const CorpusOptions& options);

// Memory that grows without being cleared first. Moves, never copies.
struct Bytes {
  char* data = nullptr;
  size_t size = 0, capacity = 0;
  Bytes() = default;
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  ~Bytes();
  // Room for `more` bytes behind `size`, and kPadding zero bytes after those.
  void reserve(size_t more);
  void append(const char* from, size_t n);
  static constexpr size_t kPadding = 32;
};

// The bytes of a source, decompressed.
class SourceStream {
 public:
  explicit SourceStream(const CorpusSource& source);
  ~SourceStream();
  // Up to `n` bytes (n > 0); 0 at the end. Exit code 2 for damaged or truncated compressed data.
  size_t read(char* to, size_t n);
  int64_t stored_bytes() const;  // read so far, before decompression

 private:
  struct State;
  std::unique_ptr<State> state_;
};

struct BadLine {
  const CorpusSource* source;
  int64_t line;  // from 1; in a batch of lines, counted from its first one
  string what;
};

// Work for one thread: some lines of one source, or some whole text files.
struct CorpusBatch {
  int64_t sequence = 0;  // in its unit
  Bytes raw;
  const CorpusSource* lines_of = nullptr;  // null for text files
  bool first_lines = false;                // of that source
  struct TextFile {
    const CorpusSource* source;
    size_t begin, size;  // in raw
  };
  vector<TextFile> texts;
  int64_t stored_bytes = 0;  // read for this batch
  // Filled by BatchEncoder:
  vector<uint32_t> tokens;
  vector<uint64_t> ends;  // of documents, in `tokens`
  vector<BadLine> bad;
  int64_t lines = 0;
  int64_t text_bytes = 0;
  void clear();
};

// The documents of a unit in order, in batches of about a MiB, or of one larger document.
class BatchReader {
 public:
  static constexpr size_t kBatchBytes = size_t{1} << 20;
  explicit BatchReader(const CorpusUnit& unit) : sources_(unit.sources) {}
  // False, with an empty batch, at the end.
  bool read(CorpusBatch& batch);

 private:
  void read_text(CorpusBatch& batch);
  void read_lines(CorpusBatch& batch);
  const vector<CorpusSource>& sources_;
  size_t next_ = 0;  // source
  std::unique_ptr<SourceStream> stream_;
  Bytes carry_;  // the begin of a line that the last batch did not end
};

// Finds the string under one key of a JSON object on a line.
class LineParser {
 public:
  explicit LineParser(string key);
  ~LineParser();
  // Parses line[0, n), which it overwrites; line[n] is 0 and kPadding bytes may be read. `text`
  // then points into it. Returns an empty string, or what is wrong.
  string parse(char* line, size_t n, string_view& text);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Tokenises batches: one a thread.
class BatchEncoder {
 public:
  BatchEncoder(const Tokenizer& tokenizer, const CorpusOptions& options, uint32_t eos);
  void encode(CorpusBatch& batch);

 private:
  void encode_lines(CorpusBatch& batch);
  void encode_text(CorpusBatch& batch, const CorpusBatch::TextFile& file);
  void add_document(CorpusBatch& batch, string_view text);
  const Tokenizer& tokenizer_;
  EncodeOptions options_;
  uint32_t eos_;
  LineParser parser_;
  EncodeScratch scratch_;
};

enum class Claim : uint8_t { Mine, Finished, Elsewhere };

// Writes one token file under a temporary name, whose lock says that a living process is at work
// on it: a killed process leaves a file without a lock, which the next one takes over.
class TokenFileWriter {
 public:
  // `part` is the temporary's path, on the file system of `path`.
  TokenFileWriter(string path, string part, NpyType type);
  TokenFileWriter(const TokenFileWriter&) = delete;
  ~TokenFileWriter();  // removes an unfinished temporary
  Claim claim();
  // `ends` count from the begin of `tokens`.
  void append(const vector<uint32_t>& tokens, const vector<uint64_t>& ends);
  // On disk, then under its name.
  void finish();

 private:
  void write(const void* bytes, size_t n);
  void spill_ends();
  string path_, part_;
  NpyType type_;
  int fd_ = -1, ends_fd_ = -1;  // ends_fd_: a nameless file for the ends that are not in memory
  int64_t num_tokens_ = 0, num_documents_ = 0;
  vector<uint64_t> ends_;
  string narrow_;
};

}  // namespace pith
