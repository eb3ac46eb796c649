// corpus_inspect: what a folder of token files holds.
#include <algorithm>
#include <bit>
#include <filesystem>
#include <numeric>

#include "core/check.h"
#include "core/json.h"
#include "core/log.h"
#include "core/process.h"
#include "data/corpus.h"
#include "data/dataset.h"
#include "data/tokenizer.h"

namespace pith {
namespace fs = std::filesystem;

static vector<uint32_t> read_ids(const TokenFile& file, int64_t begin, int64_t count,
                                 int64_t vocab_size) {
  vector<uint32_t> ids(count);
  file.copy(begin, count, vocab_size, reinterpret_cast<int32_t*>(ids.data()));
  return ids;
}

// Files under way, and the mark of runs that did not come to their end.
static int64_t count_unfinished(const string& folder) {
  int64_t unfinished = 0;
  std::error_code error;
  for (const auto& entry : fs::recursive_directory_iterator(folder + "/.pith", error))
    unfinished += entry.path().extension() == ".part" || entry.path().filename() == ".run";
  return unfinished;
}

static void count_file(const TokenFile& file, int64_t vocab_size, CorpusSummary& summary,
                       vector<int64_t>& counts) {
  constexpr int64_t kBlock = 1 << 20;
  for (int64_t at = 0; at < file.num_tokens; at += kBlock) {
    const int64_t n = std::min(kBlock, file.num_tokens - at);
    for (const uint32_t id : read_ids(file, at, n, vocab_size)) counts[id]++;
  }
  for (int64_t i = 0, begin = 0; i < file.num_docs; i++) {
    const int64_t end = file.doc_end(i), length = end - begin;
    const size_t bin = std::bit_width(uint64_t(std::max<int64_t>(length, 1))) - 1;
    if (bin >= summary.length_histogram.size()) summary.length_histogram.resize(bin + 1);
    summary.length_histogram[bin]++;
    const bool first = summary.documents + i == 0;
    summary.shortest = first ? length : std::min(summary.shortest, length);
    summary.longest = std::max(summary.longest, length);
    begin = end;
  }
  summary.documents += file.num_docs;
  summary.tokens += file.num_tokens;
}

// Documents at even distances through the corpus.
static void add_samples(const vector<string>& paths, const Tokenizer& tokenizer,
                        const InspectOptions& o, CorpusSummary& summary) {
  const int64_t n = std::min<int64_t>(o.samples, summary.documents);
  int64_t before = 0, taken = 0;
  for (const string& path : paths) {
    const TokenFile file = open_token_file(path);
    for (; taken < n; taken++) {
      const int64_t i = summary.documents * (2 * taken + 1) / (2 * n) - before;
      if (i >= file.num_docs) break;
      const int64_t begin = i ? file.doc_end(i - 1) : 0;
      const int64_t length = std::min<int64_t>(file.doc_end(i) - begin, o.sample_tokens);
      const auto ids = read_ids(file, begin, length, tokenizer.vocab_size());
      summary.samples.push_back(
          {fs::relative(path, o.folder).string(), i, tokenizer.decode(ids, SpecialTokens::Keep)});
    }
    before += file.num_docs;
  }
}

CorpusSummary inspect_corpus(const InspectOptions& o) {
  const vector<string> paths = find_token_files(o.folder);
  if (paths.empty()) bad_input(o.folder, "holds no token file (got 0 .bin files)", "pith tokenize");
  const string folder = fs::is_directory(o.folder) ? o.folder : folder_of(o.folder);
  const Tokenizer tokenizer =
      Tokenizer::load(o.tokenizer.empty() ? folder + "/tokenizer.json" : o.tokenizer);
  CorpusSummary summary;
  summary.files = paths.size();
  summary.unfinished = count_unfinished(folder);
  vector<int64_t> counts(tokenizer.vocab_size());
  Progress progress("inspect", paths.size(), "files");
  for (const string& path : paths) {
    if (stop_requested()) return summary;
    count_file(open_token_file(path), counts.size(), summary, counts);
    progress.update(&path - paths.data() + 1);
  }
  summary.mean_length = summary.documents ? double(summary.tokens) / summary.documents : 0;
  summary.distinct_tokens =
      std::count_if(counts.begin(), counts.end(), [](int64_t n) { return n > 0; });
  vector<uint32_t> order(counts.size());
  std::iota(order.begin(), order.end(), 0);
  const size_t top = std::min<size_t>(o.top, summary.distinct_tokens);
  std::partial_sort(order.begin(), order.begin() + top, order.end(), [&](uint32_t a, uint32_t b) {
    return counts[a] != counts[b] ? counts[a] > counts[b] : a < b;
  });
  for (size_t i = 0; i < top; i++)
    summary.frequent.push_back(
        {order[i], counts[order[i]], tokenizer.decode({&order[i], 1}, SpecialTokens::Keep)});
  add_samples(paths, tokenizer, o, summary);
  return summary;
}

}  // namespace pith
