// corpus_plan: which sources become which token file.
#pragma once
#include "data/corpus.h"

namespace pith {

struct CorpusSource {
  string path;        // as opened; "-" is standard input
  string name;        // relative to the input it was found in
  int64_t bytes = 0;  // as stored; 0 for standard input
  CorpusFormat format = CorpusFormat::Auto;
};

// What becomes one token file.
struct CorpusUnit {
  string path, part, record;  // of the file; in .pith: of its temporary, of what it was made of
  vector<CorpusSource> sources;
  int64_t bytes = 0;
  string identity;  // hash of the sources' names, sizes, times and formats
};

// In path order. Exit code 2: nothing found, no format in a name, two sources for one token file.
vector<CorpusUnit> plan_corpus(const CorpusOptions& options);

}  // namespace pith
