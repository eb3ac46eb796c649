// Files of documents -> token files, in parallel, in order, restartable. `output` also gets
// tokenizer.json and .pith (locks and records).
#pragma once
#include "data/dataset.h"

namespace pith {

enum class CorpusFormat : u8 { Auto, Text, Jsonl };  // Auto: as the name says

struct CorpusOptions {
  string tokenizer;
  vector<string> inputs;  // files, folders, or "-": standard input
  string output;
  CorpusFormat format = CorpusFormat::Auto;
  vector<string> include;  // file name patterns, "*.c"; empty: every file
  string join;             // all into JOIN.bin, not into a file each
  string key = "text";
  string eos;  // empty: the tokenizer's end-of-text
  bool special_as_text = false;
  bool skip_bad = false;  // log malformed documents
  i64 threads = 0;        // 0: every core
};

struct CorpusReport {
  i64 files = 0, files_done_before = 0, files_total = 0;
  i64 documents = 0, tokens = 0, text_bytes = 0;
  i64 bad_documents = 0;
  double seconds = 0;
  bool stopped = false;  // by a signal: the same command goes on
};

// Makes missing token files; bytes do not depend on threads. Several processes may share the
// output; each returns when all is complete. Exit code 2: unusable inputs, malformed documents, a
// folder made with other options.
CorpusReport tokenize_corpus(const CorpusOptions& options);

// Ids >= vocab_size are exit code 2.
vector<u32> document_ids(const TokenFile& file, i64 document, u32 vocab_size);

// JSON, of a folder or file: how many documents have less than 2, 4, ... tokens, the `top` most
// frequent tokens, the first `samples` decoded. "unfinished": files, and runs that did not end.
// Exit code 2: no or damaged files.
string inspect_corpus(const string& path, i64 top = 20, i64 samples = 3);

}
