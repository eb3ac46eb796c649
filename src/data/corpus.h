// corpus: from files of documents to token files (see TokenFile): parallel, in order, restartable.
// Beside them `output` holds tokenizer.json, corpus.json (what they were made with) and a hidden
// folder .pith: unfinished files, and for each file the lock of the process at work on it, later a
// record of what it was made from.
#pragma once
#include "data/dataset.h"

namespace pith {

enum class CorpusFormat : uint8_t {
  Auto,   // by the file's suffix
  Text,   // a file is one document
  Jsonl,  // a line is a JSON object that holds one document
};

struct CorpusOptions {
  string tokenizer;       // a tokenizer.json
  vector<string> inputs;  // files and folders, or "-" alone: standard input
  string output;          // folder, made where missing
  CorpusFormat format = CorpusFormat::Auto;
  vector<string> include;                 // file name patterns, "*.c"; empty: every file
  string join;                            // one series JOIN-00000.bin, ... instead of a file each
  int64_t part_bytes = int64_t{1} << 30;  // input bytes of a file of that series
  string key = "text";                    // member of the JSON object that is the document
  string eos;                             // token; empty: the tokenizer's end-of-text
  bool special_as_text = false;           // special tokens' text is ordinary text
  bool skip_bad = false;                  // leave out malformed documents, do not stop at them
  int64_t threads = 0;                    // 0: every core
};

struct CorpusReport {
  int64_t files = 0, files_done_before = 0, files_total = 0;
  int64_t documents = 0, tokens = 0, text_bytes = 0;  // of this run
  int64_t bad_documents = 0;                          // each was logged
  double seconds = 0;
  bool stopped = false;  // by a signal: the same command goes on
};

// Makes every token file that is not there yet. A file appears under its name when complete, and
// never otherwise; bytes do not depend on the number of threads. Several processes may work on one
// output folder; each returns when all files are complete. Memory: about 100 MiB + 80 MiB a thread,
// and some times each larger document. Exit code 2: inputs that cannot be used, malformed
// documents, a folder made with other options. Exit code 1: reading or writing fails.
CorpusReport tokenize_corpus(const CorpusOptions& options);

// Ids >= vocab_size are exit code 2.
vector<uint32_t> document_ids(const TokenFile& file, int64_t document, uint32_t vocab_size);

struct CorpusSummary {
  int64_t files = 0, documents = 0, tokens = 0;
  int64_t unfinished = 0;            // files under way, and runs that did not end
  vector<int64_t> length_histogram;  // [i]: documents of [2^i, 2^(i+1)) tokens; [0] has 0 too
  struct Frequent {
    uint32_t id;
    int64_t count;
    string text;
  };
  vector<Frequent> frequent;  // the most frequent tokens, falling
  struct Sample {
    string file;
    int64_t document;  // in the file, from 0
    string text;       // its first tokens, decoded
  };
  vector<Sample> samples;
};

// Reads every token of a folder, or of one file, with the tokenizer.json beside it. Exit code 2: no
// or damaged token files, an id that the tokenizer has not.
CorpusSummary inspect_corpus(const string& path, int64_t top = 20, int64_t samples = 3);

}  // namespace pith
