#include <algorithm>
#include <bit>
#include <filesystem>

#include "core/json.h"
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

string inspect_corpus(const string& where, i64 top, i64 samples) {
  vector<string> paths = find_token_files(where);
  string folder = fs::is_directory(where) ? where : folder_of(where);
  const Tokenizer tokenizer = Tokenizer::load(folder + "/tokenizer.json");
  i64 unfinished = 0, tokens = 0, documents = 0;
  for (const auto& entry : fs::recursive_directory_iterator(folder))
    unfinished += entry.path().extension() == ".tmp" || entry.path().filename() == ".run";
  JsonWriter first;  // documents
  first.array();
  vector<i64> counts(tokenizer.vocab_size()), histogram;  // by id; by log2 of the length
  for (const string& path : paths) {
    const TokenFile file = open_token_file(path);
    tokens += file.num_tokens;
    for (i64 i = 0; i < file.num_docs; i++) {
      vector<u32> ids = document_ids(file, i, counts.size());
      for (const u32 id : ids) counts[id]++;
      size_t bin = std::bit_width(ids.size() | 1) - 1;
      histogram.resize(max(histogram.size(), bin + 1));
      histogram[bin]++;
      if (documents++ >= samples) continue;
      ids.resize(min<size_t>(ids.size(), 100));
      first.object().members("file", fs::relative(path, folder).string(), "document", i);
      first.members("text", tokenizer.decode(ids, SpecialTokens::Keep)).end();
    }
  }
  vector<u32> frequent;
  for (u32 id = 0; id < counts.size(); id++)
    if (counts[id]) frequent.push_back(id);
  std::ranges::stable_sort(frequent, std::greater{}, [&](u32 id) { return counts[id]; });
  frequent.resize(min<size_t>(frequent.size(), top));
  JsonWriter w;
  w.object().members("files", paths.size(), "documents", documents, "tokens", tokens);
  w.members("unfinished", unfinished).key("length_histogram").array();
  for (size_t bin = 0; bin < histogram.size(); bin++)
    w.object().members("below", i64{2} << bin, "documents", histogram[bin]).end();
  w.end().key("frequent").array();
  for (const u32 id : frequent)
    w.object()
        .members(
            "id", id, "text", tokenizer.decode({&id, 1}, SpecialTokens::Keep), "count", counts[id])
        .end();
  w.end().key("samples").raw(first.end().str());
  return w.end().str();
}

}
