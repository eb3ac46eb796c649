// corpus: pith corpus inspect.
#include "data/corpus.h"

#include <algorithm>

#include "app/arguments.h"
#include "app/commands.h"
#include "core/json.h"
#include "core/log.h"

namespace pith {

static void print_json(const CorpusSummary& s) {
  JsonWriter w(2);
  w.object().key("files").value(s.files).key("documents").value(s.documents);
  w.key("tokens").value(s.tokens).key("unfinished").value(s.unfinished);
  w.key("length_histogram").array();
  for (size_t i = 0; i < s.length_histogram.size(); i++) {
    w.object().key("from").value(i ? int64_t{1} << i : 0).key("below").value(int64_t{2} << i);
    w.key("documents").value(s.length_histogram[i]).end();
  }
  w.end().key("frequent").array();
  for (const auto& f : s.frequent)
    w.object().key("id").value(f.id).key("text").value(f.text).key("count").value(f.count).end();
  w.end().key("samples").array();
  for (const auto& d : s.samples) {
    w.object().key("file").value(d.file).key("document").value(d.document);
    w.key("text").value(d.text).end();
  }
  printf("%s\n", w.end().end().str().c_str());
}

// As a JSON string, so that white space can be seen and the terminal is left alone.
static string quoted(const string& text) { return JsonWriter().value(text).str(); }

static void print_table(const CorpusSummary& s) {
  printf("files      %s\ndocuments  %s\ntokens     %s\n\n", with_commas(s.files).c_str(),
         with_commas(s.documents).c_str(), with_commas(s.tokens).c_str());
  const int64_t most = std::ranges::max(s.length_histogram);
  printf("tokens in a document     documents\n");
  for (size_t i = 0; i < s.length_histogram.size(); i++) {
    const int64_t n = s.length_histogram[i];
    const string bar((n * 40 + most - 1) / most, '#');
    printf("%10s ..%10s  %12s  %s\n", with_commas(i ? int64_t{1} << i : 0).c_str(),
           with_commas((int64_t{2} << i) - 1).c_str(), with_commas(n).c_str(), bar.c_str());
  }
  printf("\n     token         count   share  text\n");
  for (const auto& f : s.frequent)
    printf("%10u  %12s  %5.2f%%  %s\n", f.id, with_commas(f.count).c_str(),
           100.0 * f.count / s.tokens, quoted(f.text).c_str());
  for (const auto& d : s.samples)
    printf("\n%s, document %s:\n  %s\n", d.file.c_str(), with_commas(d.document).c_str(),
           quoted(d.text).c_str());
}

int run_corpus(int argc, char** argv) {
  Arguments args("pith corpus", "Looks into token files: counts documents and tokens, samples.");
  InspectOptions o;
  string action;
  bool json = false;
  args.choice("action", action, {"inspect"}, "inspect");
  args.positional("folder", o.folder, "folder of token files, or one");
  args.option("--tokenizer", o.tokenizer, "default: the tokenizer.json in the folder");
  args.option("--top", o.top, "most frequent tokens to list", 0, 1000);
  args.option("--samples", o.samples, "documents to decode", 0, 1000);
  args.flag("--json", json, "print it as JSON");
  if (!args.parse(argc, argv)) return kExitDone;
  const CorpusSummary summary = inspect_corpus(o);
  if (json)
    print_json(summary);
  else
    print_table(summary);
  if (summary.unfinished)
    log_warning(
        "not all of it is there: a tokenize run did not finish; run it again to complete it");
  return kExitDone;
}

}  // namespace pith
