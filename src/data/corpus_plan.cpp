// corpus_plan: which files become which token file.
#include <fnmatch.h>
#include <xxhash.h>

#include <algorithm>
#include <filesystem>
#include <map>

#include "data/corpus.h"

namespace pith {
namespace fs = std::filesystem;

static bool cut_suffix(string& name, string_view suffix) {
  if (name.size() <= suffix.size() || !name.ends_with(suffix)) return false;
  name.resize(name.size() - suffix.size());
  return true;
}

// Sets the format; returns the name without suffixes.
static string classify(CorpusSource& source, CorpusFormat wanted) {
  string stem = source.name;
  if (stem.ends_with(".parquet"))
    bad_input(source.path, "Parquet is not read (need text or JSON lines)",
              "duckdb -c \"COPY (SELECT text FROM 'x.parquet') TO 'x.jsonl' (FORMAT json)\"");
  if (source.path == "-" && wanted == CorpusFormat::Auto)
    bad_input("-", "standard input has no name to tell its format by",
              "--format text or --format jsonl");
  for (const char* packed : {".gz", ".zst", ".zstd"})
    if (cut_suffix(stem, packed)) break;
  const bool jsonl = cut_suffix(stem, ".jsonl"), text = !jsonl && cut_suffix(stem, ".txt");
  if (wanted == CorpusFormat::Auto && !jsonl && !text)
    bad_input(source.path,
              "its name does not tell its format (need .txt or .jsonl, also .gz, .zst, .zstd)",
              "--format text or --format jsonl; --include '*.jsonl' to take only some files");
  const CorpusFormat by_name = jsonl ? CorpusFormat::Jsonl : CorpusFormat::Text;
  source.format = wanted == CorpusFormat::Auto ? by_name : wanted;
  return stem;
}

// Linked folders are left out: in source trees they lead to the same files again.
static vector<CorpusSource> find_sources(const string& input, const CorpusOptions& o) {
  if (input == "-") return {{"-", "stdin"}};
  vector<CorpusSource> found;
  try {
    if (fs::is_regular_file(input))
      return {{input, fs::path(input).filename(), i64(fs::file_size(input))}};
    std::error_code absent;
    for (fs::recursive_directory_iterator it(input), end; it != end; ++it) {
      const fs::path &path = it->path(), file = path.filename();
      const bool hidden = file.native().starts_with('.');
      const fs::path below = path.lexically_relative(input);
      const auto matches = [&](const string& s) {
        return !fnmatch(s.c_str(), file.c_str(), 0) || !fnmatch(s.c_str(), below.c_str(), 0);
      };
      if (it->is_directory() && (hidden || fs::equivalent(path, o.output, absent)))
        it.disable_recursion_pending();
      else if (!hidden && it->is_regular_file() &&
               (o.include.empty() || std::ranges::any_of(o.include, matches)))
        found.push_back({path, below, i64(it->file_size())});
    }
  } catch (const fs::filesystem_error& error) {
    bad_input(input, "is not a file or folder that can be read (" + error.code().message() + ")",
              "another --input; data from a pipe as --input -");
  }
  std::ranges::sort(found, {}, &CorpusSource::name);
  return found;
}

static void add_source(CorpusUnit& unit, CorpusSource& source) {
  std::error_code none;  // standard input has no time
  const i64 time = fs::last_write_time(source.path, none).time_since_epoch().count();
  const string all = unit.identity + text("%s\t%ld\t%ld\t%d", source.name.c_str(), source.bytes,
                                          time, int(source.format));
  unit.identity = std::to_string(XXH3_64bits(all.data(), all.size()));
  unit.bytes += source.bytes;
  unit.sources.push_back(std::move(source));
}

vector<CorpusUnit> plan_corpus(const CorpusOptions& o) {
  if (o.join.starts_with(".") || o.join.find('/') != string::npos)
    bad_input("--join", text("is \"%s\" (need a plain file name)", o.join.c_str()), "--join c");
  vector<CorpusUnit> units;
  const auto add_unit = [&](const string& name) {
    const string hidden = o.output + "/.pith/" + name;
    units.push_back({o.output + "/" + name + ".bin", hidden + ".part", hidden + ".sources"});
  };
  std::map<string, string> taken;  // name -> its source
  vector<CorpusSource> sources;
  if (o.inputs.size() > 1 && std::ranges::count(o.inputs, "-"))
    bad_input("-", "standard input beside other inputs (need it alone)", "two runs, or files only");
  for (const string& input : o.inputs)
    std::ranges::move(find_sources(input, o), std::back_inserter(sources));
  for (CorpusSource& source : sources) {
    const string name = classify(source, o.format);
    if (o.join.empty()) {
      const auto [other, fresh] = taken.emplace(name, source.path);
      if (!fresh)
        bad_input(source.path,
                  text("would become the same token file %s.bin as %s", name.c_str(),
                       other->second.c_str()),
                  "--join NAME, or one run and output folder for each");
      if (source.bytes == 0 && source.path != "-" && !o.skip_bad)
        bad_input(source.path, "is empty (need at least one document)",
                  "removing it, or --skip-bad to leave such files out");
      add_unit(name);
    } else {
      if (source.bytes == 0 && source.path != "-") continue;
      if (units.empty() || units.back().bytes + source.bytes > o.part_bytes)
        add_unit(text("%s-%05zu", o.join.c_str(), units.size()));
    }
    add_source(units.back(), source);
  }
  if (sources.empty())
    bad_input("--input", "no file to tokenise was found", "another folder or --include");
  if (units.empty()) bad_input("--input", "all files are empty", "files with text in them");
  return units;
}

}
