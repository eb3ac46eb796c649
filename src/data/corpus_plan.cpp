// corpus_plan: which sources become which token file.
#include <fnmatch.h>
#include <sys/stat.h>
#include <xxhash.h>

#include <algorithm>
#include <filesystem>
#include <map>

#include "core/check.h"
#include "core/log.h"
#include "data/corpus_parts.h"

namespace pith {
namespace fs = std::filesystem;

static bool cut_suffix(string& name, string_view suffix) {
  if (name.size() <= suffix.size() || !name.ends_with(suffix)) return false;
  name.resize(name.size() - suffix.size());
  return true;
}

// Sets format and packing; returns the name without the suffixes that told them.
static string classify(CorpusSource& source, CorpusFormat wanted) {
  string stem = source.name;
  if (stem.ends_with(".parquet"))
    bad_input(source.path, "Parquet is not read (need text or JSON lines)",
              "duckdb -c \"COPY (SELECT text FROM 'x.parquet') TO 'x.jsonl' (FORMAT json)\"");
  if (cut_suffix(stem, ".gz"))
    source.packing = Packing::Gzip;
  else if (cut_suffix(stem, ".zst") || cut_suffix(stem, ".zstd"))
    source.packing = Packing::Zstd;
  const bool jsonl = cut_suffix(stem, ".jsonl"), text = !jsonl && cut_suffix(stem, ".txt");
  source.format = wanted;
  if (wanted == CorpusFormat::Auto && !jsonl && !text)
    bad_input(source.path,
              "its name does not tell its format (need .txt or .jsonl, also .gz, .zst, .zstd)",
              "--format text or --format jsonl; --include '*.jsonl' to take only some files");
  if (wanted == CorpusFormat::Auto)
    source.format = jsonl ? CorpusFormat::Jsonl : CorpusFormat::Text;
  return stem;
}

static bool included(const CorpusSource& source, const vector<string>& patterns) {
  const string file = fs::path(source.name).filename();
  return patterns.empty() || std::any_of(patterns.begin(), patterns.end(), [&](const auto& p) {
           return fnmatch(p.c_str(), file.c_str(), 0) == 0 ||
                  fnmatch(p.c_str(), source.name.c_str(), 0) == 0;
         });
}

static bool fill_stat(CorpusSource& source) {
  struct stat s;
  if (stat(source.path.c_str(), &s) != 0 || !S_ISREG(s.st_mode)) return false;
  source.bytes = s.st_size;
  source.mtime_ns = s.st_mtim.tv_sec * 1'000'000'000 + s.st_mtim.tv_nsec;
  return true;
}

// Adds the files below `folder`, but not hidden ones, those of `output`, and linked folders, which
// in source trees lead to the same files again.
static void walk(const fs::path& folder, const string& below, const fs::path& output,
                 vector<CorpusSource>& found) {
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    const string file = it->path().filename();
    if (file.starts_with(".")) continue;
    if (it->is_directory(error)) {
      if (!it->is_symlink() && !fs::equivalent(it->path(), output, error))
        walk(it->path(), below + file + "/", output, found);
    } else {
      CorpusSource source{.path = it->path(), .name = below + file};
      if (fill_stat(source)) found.push_back(std::move(source));
    }
    error.clear();
  }
  if (error) failed(folder, text("cannot be listed (%s)", error.message().c_str()));
}

static vector<CorpusSource> find_sources(const CorpusOptions& o) {
  vector<CorpusSource> found;
  for (const string& input : o.inputs) {
    if (input == "-") {
      if (o.inputs.size() != 1)
        bad_input("-", "standard input beside other inputs (need it alone)",
                  "two runs, or files only");
      if (o.format == CorpusFormat::Auto)
        bad_input("-", "standard input has no name to tell its format by",
                  "--format text or --format jsonl");
      return {{.path = "-", .name = "stdin", .format = o.format, .packing = Packing::ByContent}};
    }
    if (fs::is_directory(input)) {
      vector<CorpusSource> files;
      walk(input, "", o.output, files);
      std::erase_if(files, [&](const auto& s) { return !included(s, o.include); });
      std::sort(files.begin(), files.end(),
                [](const auto& a, const auto& b) { return a.name < b.name; });
      for (CorpusSource& s : files) found.push_back(std::move(s));
      continue;
    }
    CorpusSource source{.path = input, .name = fs::path(input).filename()};
    if (!fill_stat(source))
      bad_input(input, "is not a file or folder that can be read",
                "another --input; data from a pipe as --input -");
    found.push_back(std::move(source));
  }
  if (found.empty())
    bad_input("--input", "no file to tokenise was found", "another folder or --include");
  return found;
}

static vector<CorpusUnit> joined(const CorpusOptions& o, vector<CorpusSource> sources) {
  if (o.join.starts_with(".") || o.join.find('/') != string::npos)
    bad_input("--join", text("is \"%s\" (need a plain file name)", o.join.c_str()), "--join c");
  vector<CorpusUnit> units;
  int64_t empty = 0;
  for (CorpusSource& source : sources) {
    classify(source, o.format);
    if (source.bytes == 0) {
      empty++;
      continue;
    }
    if (units.empty() || units.back().bytes + source.bytes > o.part_bytes)
      units.push_back({.name = text("%s-%05zu", o.join.c_str(), units.size())});
    units.back().bytes += source.bytes;
    units.back().sources.push_back(std::move(source));
  }
  if (units.empty()) bad_input("--input", "all files are empty", "files with text in them");
  units.back().empty_files = empty;
  return units;
}

vector<CorpusUnit> plan_corpus(const CorpusOptions& o) {
  vector<CorpusSource> sources = find_sources(o);
  if (sources[0].path == "-")
    return {{.name = o.join.empty() ? "stdin" : o.join, .sources = sources}};
  if (!o.join.empty()) return joined(o, std::move(sources));
  vector<CorpusUnit> units;
  std::map<string, string> taken;  // token file -> its source
  for (CorpusSource& source : sources) {
    const string name = classify(source, o.format);
    const auto [other, fresh] = taken.emplace(name, source.path);
    if (!fresh)
      bad_input(source.path,
                text("would become the same token file %s.bin as %s", name.c_str(),
                     other->second.c_str()),
                "--join NAME, or one run and output folder for each");
    if (source.bytes == 0 && !o.skip_bad)
      bad_input(source.path, "is empty (need at least one document)",
                "removing it, or --skip-bad to leave such files out");
    units.push_back({.name = name, .sources = {source}, .bytes = source.bytes});
  }
  if (units.size() > 1000 && o.format == CorpusFormat::Text)
    log_warning("%zu text files become as many token files; --join NAME puts them into few",
                units.size());
  return units;
}

uint64_t CorpusUnit::identity() const {
  string all;
  for (const CorpusSource& s : sources)
    all += text("%s\t%ld\t%ld\t%d\n", s.name.c_str(), s.bytes, s.mtime_ns, int(s.format));
  return XXH3_64bits(all.data(), all.size());
}

}  // namespace pith
