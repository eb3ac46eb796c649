#include "data/corpus.h"

#include "app/commands.h"
#include "core/json.h"
#include "core/log.h"
#include "core/process.h"
#include "data/tokenizer.h"

namespace pith {

static void decode(const string& file, const string& tokenizer_option) {
  const Tokenizer tokenizer = open_tokenizer(tokenizer_option, {file});
  const TokenFile tokens = open_token_file(file);
  for (i64 i = 0; i < tokens.num_docs && !stop_requested(); i++) {
    const vector<u32> ids = document_ids(tokens, i, tokenizer.vocab_size());
    const string document = tokenizer.decode(ids, SpecialTokens::Keep);
    fwrite(document.data(), 1, document.size(), stdout);
  }
}

static void print_report(const CorpusReport& r, bool json) {
  log_info("%s%ld of %ld files: %s documents, %s tokens, %.1f MB of text in %.1f s (%.1f MB/s)",
      r.stopped ? "stopped; the same command goes on. " : "", r.files, r.files_total,
      with_commas(r.documents).c_str(), with_commas(r.tokens).c_str(), r.text_bytes / 1e6,
      r.seconds, r.text_bytes / 1e6 / r.seconds);
  if (r.files_done_before) log_info("%ld files were there before", r.files_done_before);
  if (r.bad_documents) log_warning("left out: %ld documents", r.bad_documents);
  if (!json) return;
  JsonWriter w;
  w.object().members("files", r.files, "files_done_before", r.files_done_before, "files_total",
      r.files_total, "documents", r.documents, "tokens", r.tokens, "text_bytes", r.text_bytes,
      "bad_documents", r.bad_documents, "stopped", r.stopped);
  printf("%s\n", w.end().str().c_str());
}

int run_tokenize(int argc, char** argv) {
  Arguments args("pith tokenize");
  CorpusOptions o;
  string format = "auto", encoded;
  bool json = false;
  args.option("--tokenizer", o.tokenizer, "tokenizer.json, or the folder that holds it");
  args.list("--input", o.inputs, "files and folders, or - for standard input", ' ');
  args.option("--output", o.output, "folder for the token files");
  args.choice("--format", format, {"auto", "text", "jsonl"},
      "text: a file is a document; jsonl: a line is one; auto: as the file's name says");
  args.list("--include", o.include, "only files of these patterns: '*.c,*.h'", ',');
  args.option("--join", o.join, "put all into NAME.bin, not into a file each");
  args.option("--key", o.key, "the JSON member that holds the text");
  args.option("--eos", o.eos, "end-of-text token; default: the tokenizer's own");
  args.flag("--special-as-text", o.special_as_text, "special tokens' text is ordinary text");
  args.flag("--skip-bad", o.skip_bad, "leave out malformed documents and list them");
  args.option("--threads", o.threads, "0: every core", 0, 1024);
  args.option("--decode", encoded, "print the text of FILE.bin");
  args.flag("--json", json, "print the result as JSON");
  if (!args.parse(argc, argv)) return kExitDone;
  if (!encoded.empty()) {
    decode(encoded, o.tokenizer);
    return kExitDone;
  }
  if (o.tokenizer.empty() || o.inputs.empty() || o.output.empty())
    bad_input("pith tokenize", "needs --tokenizer, --input and --output", "--help");
  if (format != "auto") o.format = format == "text" ? CorpusFormat::Text : CorpusFormat::Jsonl;
  o.tokenizer = tokenizer_file(o.tokenizer);
  const CorpusReport report = tokenize_corpus(o);
  print_report(report, json);
  return report.stopped ? kExitStopped : kExitDone;
}

int run_corpus(int argc, char** argv) {
  Arguments args("pith corpus");
  string action, path;
  i64 top = 20, samples = 3;
  bool json = false;
  args.choice("action", action, {"inspect"}, "inspect");
  args.option("folder", path, "folder of token files, or one");
  args.option("--top", top, "most frequent tokens to list", 0, 1000);
  args.option("--samples", samples, "documents to decode", 0, 1000);
  args.flag("--json", json, "print it as JSON");
  if (!args.parse(argc, argv)) return kExitDone;
  const string found = inspect_corpus(path, top, samples);
  print_result(found, json);
  if (Json::parse(found, path)["unfinished"].as_int() > 0)
    log_warning("not all of it is there: a tokenize run did not finish; start it again");
  return kExitDone;
}

}
