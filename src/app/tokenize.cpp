// tokenize: pith tokenize, and its way back, --decode.
#include <cstring>
#include <filesystem>

#include "app/arguments.h"
#include "app/commands.h"
#include "core/check.h"
#include "core/json.h"
#include "core/log.h"
#include "core/process.h"
#include "data/corpus.h"
#include "data/dataset.h"
#include "data/tokenizer.h"

namespace pith {
namespace fs = std::filesystem;

namespace {
struct TokenizeArguments {
  CorpusOptions corpus;
  string format = "auto", decode, part_size = "1G";
  int64_t document = -1, threads = 0;
  bool json = false;
};

void add_options(Arguments& args, TokenizeArguments& a) {
  CorpusOptions& c = a.corpus;
  args.option("--tokenizer", c.tokenizer, "tokenizer.json, or the folder that holds it");
  args.list("--input", c.inputs,
            "files and folders (all below, hidden ones aside), or - for standard input", ' ');
  args.option("--output", c.output, "folder for the token files");
  args.choice("--format", a.format, {"auto", "text", "jsonl"},
              "auto: by name (.txt, .jsonl; also .gz, .zst, .zstd); text: each file is a "
              "document; jsonl: each line is one");
  args.list("--include", c.include, "only files of these patterns: '*.c,*.h'", ',');
  args.option("--join", c.join,
              "put all documents into NAME-00000.bin and so on, instead of a token file each");
  args.option("--part-size", a.part_size, "input of one file of --join: 500M, 1G");
  args.option("--key", c.key, "the JSON member that holds the text");
  args.option("--eos", c.eos, "end-of-text: a token or id; default: the tokenizer's own");
  args.flag("--special-as-text", c.special_as_text,
            "special tokens' text in documents is ordinary text");
  args.flag("--skip-bad", c.skip_bad, "leave out malformed documents and list them");
  args.option("--threads", a.threads, "0: every core", 0, 1024);
  args.option("--decode", a.decode, "print the text of FILE.bin, or of ids such as 9707,11");
  args.option("--document", a.document, "with --decode FILE.bin: only this one, from 0");
  args.flag("--json", a.json, "print the result as JSON; with --decode a line a document");
}

int64_t parse_size(const string& size) {
  size_t used = 0;
  double value = 0;
  try {
    value = std::stod(size, &used);
  } catch (const std::exception&) {
  }
  const string unit = size.substr(used), units = "KMGT";
  const size_t power = unit.empty() ? 0 : units.find(unit) + 1;
  if (!(value > 0) || unit.size() > 1 || (unit.size() == 1 && power == 0))
    bad_input("--part-size", text("is \"%s\" (need a size such as 500M)", size.c_str()), "1G");
  return int64_t(value * double(int64_t{1} << (10 * power)));
}

// The tokenizer.json in the folder of a token file, or in one above it.
string tokenizer_above(const string& file) {
  for (fs::path at = fs::absolute(file).parent_path();; at = at.parent_path()) {
    if (fs::exists(at / "tokenizer.json")) return at / "tokenizer.json";
    if (at == at.parent_path())
      bad_input(file, "has no tokenizer.json in its folder or above", "--tokenizer PATH");
  }
}

void print_document(const TokenizeArguments& a, const string& document) {
  if (a.json) {
    JsonWriter w;
    w.object().key(a.corpus.key).value(document).end();
    printf("%s\n", w.str().c_str());
  } else {
    fwrite(document.data(), 1, document.size(), stdout);
  }
}

void decode_file(const TokenizeArguments& a, const Tokenizer& tokenizer) {
  const TokenFile file = open_token_file(a.decode);
  if (a.document >= file.num_docs)
    bad_input("--document",
              text("is not in the file (got %ld, need < %ld)", a.document, file.num_docs),
              "a smaller number");
  const int64_t first = std::max<int64_t>(a.document, 0);
  const int64_t last = a.document < 0 ? file.num_docs : first + 1;
  for (int64_t i = first; i < last && !stop_requested(); i++) {
    const int64_t begin = i ? file.doc_end(i - 1) : 0;
    vector<uint32_t> ids(file.doc_end(i) - begin);
    file.copy(begin, ids.size(), tokenizer.vocab_size(), reinterpret_cast<int32_t*>(ids.data()));
    // With --json a document ends with its line, so that it can be tokenised again.
    if (a.json && !ids.empty()) ids.pop_back();
    print_document(a, tokenizer.decode(ids, SpecialTokens::Keep));
  }
}

int decode(const TokenizeArguments& a) {
  const bool file = a.decode.ends_with(".bin");
  if (a.corpus.tokenizer.empty() && !file)
    bad_input("--decode", "needs a tokenizer for ids", "--tokenizer tokenizer.json");
  string path = a.corpus.tokenizer.empty() ? tokenizer_above(a.decode) : a.corpus.tokenizer;
  if (fs::is_directory(path)) path += "/tokenizer.json";
  const Tokenizer tokenizer = Tokenizer::load(path);
  if (file) return decode_file(a, tokenizer), kExitDone;
  vector<uint32_t> ids;
  for (const char* at = a.decode.c_str(); *at;) {
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
  print_document(a, tokenizer.decode(ids, SpecialTokens::Keep));
  if (!a.json) printf("\n");
  return kExitDone;
}

void print_json(const CorpusReport& r) {
  JsonWriter w;
  w.object().key("files").value(r.files).key("files_done_before").value(r.files_done_before);
  w.key("files_total").value(r.files_total).key("documents").value(r.documents);
  w.key("tokens").value(r.tokens).key("text_bytes").value(r.text_bytes);
  w.key("bad_documents").value(r.bad_documents).key("empty_files").value(r.empty_files);
  w.key("seconds").value(r.seconds).key("stopped").value(r.stopped).key("bad").array();
  for (const BadDocument& bad : r.bad)
    w.object().key("place").value(bad.place).key("what").value(bad.what).end();
  printf("%s\n", w.end().end().str().c_str());
}

void log_report(const CorpusReport& r) {
  for (const BadDocument& bad : r.bad)
    log_warning("left out: %s: %s", bad.place.c_str(), bad.what.c_str());
  if (r.bad_documents > int64_t(r.bad.size()))
    log_warning("left out: %s documents in all", with_commas(r.bad_documents).c_str());
  if (r.empty_files) log_info("%s empty files left out", with_commas(r.empty_files).c_str());
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
  TokenizeArguments a;
  add_options(args, a);
  if (!args.parse(argc, argv)) return kExitDone;
  a.corpus.threads = int(a.threads);
  if (!a.decode.empty()) return decode(a);
  if (a.corpus.tokenizer.empty() || a.corpus.inputs.empty() || a.corpus.output.empty())
    bad_input("pith tokenize", "needs --tokenizer, --input and --output", "--help");
  a.corpus.part_bytes = parse_size(a.part_size);
  a.corpus.format = a.format == "text"    ? CorpusFormat::Text
                    : a.format == "jsonl" ? CorpusFormat::Jsonl
                                          : CorpusFormat::Auto;
  const CorpusReport report = tokenize_corpus(a.corpus);
  log_report(report);
  if (a.json) print_json(report);
  return report.stopped ? kExitStopped : kExitDone;
}

}  // namespace pith
