#include <algorithm>
#include <bit>
#include <filesystem>
#include <random>

#include "data/corpus.h"
#include "data/tokenizer.h"

namespace pith {
namespace fs = std::filesystem;

vector<u32> document_ids(const TokenFile& file, i64 document, u32 vocab_size) {
  i64 begin = document ? file.doc_end(document - 1) : 0;
  vector<u32> ids(file.doc_end(document) - begin);
  file.copy(begin, ids.size(), vocab_size, reinterpret_cast<int*>(ids.data()));
  return ids;
}

CorpusSummary inspect_corpus(const string& where, i64 top, i64 samples) {
  vector<string> paths = find_token_files(where);
  string folder = fs::is_directory(where) ? where : folder_of(where);
  const Tokenizer tokenizer = Tokenizer::load(folder + "/tokenizer.json");
  CorpusSummary summary;
  summary.files = paths.size();
  for (const auto& entry : fs::recursive_directory_iterator(folder))
    summary.unfinished += entry.path().extension() == ".tmp" || entry.path().filename() == ".run";
  std::mt19937_64 random;
  vector<i64> counts(tokenizer.vocab_size());
  for (const string& path : paths) {
    const TokenFile file = open_token_file(path);
    for (i64 i = 0; i < file.num_docs; i++) {
      vector<u32> ids = document_ids(file, i, counts.size());
      for (const u32 id : ids) counts[id]++;
      size_t bin = std::bit_width(ids.size() | 1) - 1;
      if (bin >= summary.length_histogram.size()) summary.length_histogram.resize(bin + 1);
      summary.length_histogram[bin]++;
      // A uniform sample.
      i64 n = summary.documents++, place = n < samples ? n : random() % (n + 1);
      if (place >= samples) continue;
      if (place == n) summary.samples.emplace_back();
      ids.resize(min<size_t>(ids.size(), 100));
      summary.samples[place] = {fs::relative(path, folder), i,
                                tokenizer.decode(ids, SpecialTokens::Keep)};
    }
    summary.tokens += file.num_tokens;
  }
  for (u32 id = 0; id < counts.size(); id++)
    if (counts[id]) summary.frequent.push_back({id, counts[id], ""});
  std::ranges::stable_sort(summary.frequent, std::greater{}, &CorpusSummary::Frequent::count);
  summary.frequent.resize(min<size_t>(summary.frequent.size(), top));
  for (auto& f : summary.frequent) f.text = tokenizer.decode({&f.id, 1}, SpecialTokens::Keep);
  return summary;
}

}
