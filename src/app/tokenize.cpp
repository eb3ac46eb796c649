// tokenize: pith tokenize, and its way back, --decode.
#include <algorithm>
#include <cstring>

#include "app/arguments.h"
#include "app/commands.h"
#include "app/held_out.h"
#include "app/model_folder.h"
#include "core/json.h"
#include "core/log.h"
#include "core/process.h"
#include "data/corpus.h"
#include "data/tokenizer.h"

namespace pith {

namespace {
void print_document(const string& document, bool json) {
  if (json)
    printf("%s\n", JsonWriter().object().key("text").value(document).end().str().c_str());
  else
    fwrite(document.data(), 1, document.size(), stdout);
}

void decode_file(const string& path, const Tokenizer& tokenizer, bool json) {
  const TokenFile file = open_token_file(path);
  for (int64_t i = 0; i < file.num_docs && !stop_requested(); i++) {
    vector<uint32_t> ids = document_ids(file, i, tokenizer.vocab_size());
    // As JSON without the end-of-text, so that it can be tokenised again.
    if (json && !ids.empty()) ids.pop_back();
    print_document(tokenizer.decode(ids, SpecialTokens::Keep), json);
  }
}

void decode_ids(const string& list, const Tokenizer& tokenizer, bool json) {
  vector<uint32_t> ids;
  for (const char* at = list.c_str(); *at;) {
    char* end = nullptr;
    const unsigned long id = isdigit(*at) ? strtoul(at, &end, 10) : 0;
    if (!end || id >= tokenizer.vocab_size())
      bad_input("--decode",
                text("is neither FILE.bin nor ids (got \"%s\", need numbers < %u)", at,
                     tokenizer.vocab_size()),
                "--decode 9707,11");
    ids.push_back(id);
    at = end + strspn(end, ", ");
  }
  print_document(tokenizer.decode(ids, SpecialTokens::Keep), json);
  if (!json) printf("\n");
}

void print_json(const CorpusReport& r) {
  JsonWriter w;
  w.object().key("files").value(r.files).key("files_done_before").value(r.files_done_before);
  w.key("files_total").value(r.files_total).key("documents").value(r.documents);
  w.key("tokens").value(r.tokens).key("text_bytes").value(r.text_bytes);
  w.key("bad_documents").value(r.bad_documents).key("seconds").value(r.seconds);
  w.key("stopped").value(r.stopped).key("bad").array();
  for (const BadDocument& bad : r.bad)
    w.object().key("place").value(bad.place).key("what").value(bad.what).end();
  printf("%s\n", w.end().end().str().c_str());
}

void log_report(const CorpusReport& r) {
  for (const BadDocument& bad : r.bad)
    log_warning("left out: %s: %s", bad.place.c_str(), bad.what.c_str());
  if (r.bad_documents > int64_t(r.bad.size()))
    log_warning("left out: %s documents in all", with_commas(r.bad_documents).c_str());
  log_info("%s%s of %s files: %s documents, %s tokens, %.1f MB of text in %.1f s (%.1f MB/s)",
           r.stopped ? "stopped; the same command goes on. " : "", with_commas(r.files).c_str(),
           with_commas(r.files_total).c_str(), with_commas(r.documents).c_str(),
           with_commas(r.tokens).c_str(), r.text_bytes / 1e6, r.seconds,
           r.text_bytes / 1e6 / std::max(r.seconds, 1e-9));
  if (r.files_done_before)
    log_info("%s files were there before", with_commas(r.files_done_before).c_str());
}
}  // namespace

int run_tokenize(int argc, char** argv) {
  Arguments args("pith tokenize", "Turns text into token files that training reads, or back.");
  CorpusOptions o;
  string format = "auto", encoded;
  bool json = false;
  args.option("--tokenizer", o.tokenizer, "tokenizer.json, or the folder that holds it");
  args.many("--input", o.inputs,
            "files and folders (all below, hidden ones aside), or - for standard input");
  args.option("--output", o.output, "folder for the token files");
  args.choice("--format", format, {"auto", "text", "jsonl"},
              "auto: by name (.txt, .jsonl; also .gz, .zst, .zstd); text: each file is a "
              "document; jsonl: each line is one");
  args.list("--include", o.include, "only files of these patterns: '*.c,*.h'", ',');
  args.option("--join", o.join,
              "put all documents into NAME-00000.bin and so on, instead of a token file each");
  args.option("--key", o.key, "the JSON member that holds the text");
  args.option("--eos", o.eos, "end-of-text token; default: the tokenizer's own");
  args.flag("--special-as-text", o.special_as_text,
            "special tokens' text in documents is ordinary text");
  args.flag("--skip-bad", o.skip_bad, "leave out malformed documents and list them");
  args.option("--threads", o.threads, "0: every core", 0, 1024);
  args.option("--decode", encoded, "print the text of FILE.bin, or of ids such as 9707,11");
  args.flag("--json", json, "print the result as JSON; with --decode a line a document");
  if (!args.parse(argc, argv)) return kExitDone;
  if (!encoded.empty()) {
    const bool is_file = encoded.ends_with(".bin");
    if (o.tokenizer.empty() && !is_file)
      bad_input("--decode", "needs a tokenizer for ids", "--tokenizer tokenizer.json");
    const string path =
        o.tokenizer.empty() ? find_tokenizer(encoded) : tokenizer_of("", o.tokenizer);
    if (path.empty())
      bad_input(encoded, "has no tokenizer.json in its folder or above", "--tokenizer PATH");
    const Tokenizer tokenizer = Tokenizer::load(path);
    (is_file ? decode_file : decode_ids)(encoded, tokenizer, json);
    return kExitDone;
  }
  if (o.tokenizer.empty() || o.inputs.empty() || o.output.empty())
    bad_input("pith tokenize", "needs --tokenizer, --input and --output", "--help");
  if (format != "auto") o.format = format == "text" ? CorpusFormat::Text : CorpusFormat::Jsonl;
  const CorpusReport report = tokenize_corpus(o);
  log_report(report);
  if (json) print_json(report);
  return report.stopped ? kExitStopped : kExitDone;
}

}  // namespace pith
