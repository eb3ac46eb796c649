#include "data/corpus.h"

#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>

#include "core/check.h"
#include "core/json.h"
#include "core/process.h"
#include "data/dataset.h"
#include "data/tokenizer.h"
#include "helpers.h"

namespace pith {
namespace {

namespace fs = std::filesystem;
using Documents = std::vector<std::string>;
using Files = std::map<std::string, std::string>;  // name -> bytes

const std::string kTokenizer = SOURCE_DIR "/configs/quickstart/tokenizer.json";

// The token files of a folder by their definition: NPY ids, then NPY ends.
std::string token_file(const Documents& documents, bool parse_special = true) {
  const Tokenizer tokenizer = Tokenizer::load(kTokenizer);
  EncodeScratch scratch;
  std::string ids_bytes, ends_bytes;
  uint64_t end = 0;
  for (const std::string& document : documents) {
    std::vector<uint32_t> ids;
    tokenizer.encode(document, ids, !parse_special, scratch);
    ids.push_back(0);  // <|endoftext|>
    for (const uint32_t id : ids) ids_bytes += {static_cast<char>(id), static_cast<char>(id >> 8)};
    end += ids.size();
    ends_bytes.append(reinterpret_cast<const char*>(&end), 8);
  }
  const auto count = static_cast<int64_t>(documents.size());
  return npy_header(FileDType::U16, {static_cast<int64_t>(end)}) + ids_bytes +
         npy_header(FileDType::U64, {count}) + ends_bytes;
}

Files files_of(const std::string& folder) {
  Files files;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    const std::string name = fs::relative(entry.path(), folder);
    if (name.ends_with(".bin")) files[name] = read_text_file(entry.path());
  }
  return files;
}

// Names only: the bytes would fill the screen.
std::string difference(const Files& got, const Files& need) {
  std::string all;
  for (const auto& [name, bytes] : need)
    if (!got.count(name))
      all += name + " is missing; ";
    else if (got.at(name) != bytes)
      all += name + " differs; ";
  for (const auto& [name, bytes] : got)
    if (!need.count(name)) all += name + " is too much; ";
  return all;
}

std::string json_line(const std::string& document, const std::string& key = "text") {
  return JsonWriter().object().key("id").value(7).key(key).value(document).end().str() + "\n";
}

std::string json_lines(const Documents& documents) {
  std::string lines;
  for (const std::string& document : documents) lines += json_line(document);
  return lines;
}

std::string gzip(const std::string& bytes) {
  z_stream z{};
  deflateInit2(&z, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY);
  std::string out(deflateBound(&z, bytes.size()), 0);
  z.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(bytes.data()));
  z.avail_in = bytes.size();
  z.next_out = reinterpret_cast<Bytef*>(out.data());
  z.avail_out = out.size();
  EXPECT_EQ(deflate(&z, Z_FINISH), Z_STREAM_END);
  out.resize(z.total_out);
  deflateEnd(&z);
  return out;
}

std::string zstd(const std::string& bytes) {
  std::string out(ZSTD_compressBound(bytes.size()), 0);
  out.resize(ZSTD_compress(out.data(), out.size(), bytes.data(), bytes.size(), 3));
  return out;
}

// `bytes` of words, digits, scripts, emoji and white space.
std::string random_text(std::mt19937& random, size_t bytes) {
  static const char* const parts[] = {"the ", "token", "\n\n", "    ", "1234", "h\u00e9 ", "\u4e2d",
      "\u0645", "\U0001f600", "\r\n", "'ll ", "_x_", "\t", "\"", "\\n"};
  std::string out;
  while (out.size() < bytes) out += parts[random() % std::size(parts)];
  return out;
}

Documents random_documents(uint32_t seed, int count, size_t longest) {
  std::mt19937 random(seed);
  Documents documents;
  for (int i = 0; i < count; i++) documents.push_back(random_text(random, random() % longest));
  return documents;
}

CorpusOptions options_for(const std::string& folder, std::vector<std::string> inputs = {}) {
  if (inputs.empty()) inputs = {folder + "/in"};
  return {.tokenizer = kTokenizer, .inputs = inputs, .output = folder + "/out", .threads = 2};
}

int64_t unfinished_in(const std::string& folder) {
  return Json::parse(inspect_corpus(folder), folder)["unfinished"].as_int();
}

// Runs `action` in a child; its exit code, or 128 + the signal that ended it.
int exit_code_of(pid_t child) {
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

pid_t start_child(auto&& action) {
  const pid_t child = fork();
  if (child) return child;
  if (!freopen("/dev/null", "w", stderr)) _exit(99);
  try {
    _exit(action());
  } catch (const Error& error) {
    _exit(error.exit_code);
  } catch (...) {
    _exit(98);
  }
}

int tokenize(const CorpusOptions& options) {
  return tokenize_corpus(options).stopped ? kExitStopped : kExitDone;
}

}  // namespace

TEST(Corpus, EveryFormatGivesTheSameDocuments) {
  const Documents documents = {"one", "", "two\nlines\u00e9", "\U0001f600 <|endoftext|> inside"};
  const std::string lines = json_lines(documents), all = json_lines({documents[0], documents[1]}),
                    more = json_lines({documents[2], documents[3]});
  const std::string whole = "A text.\r\n\nOf some lines \u4e2d\n";
  const struct {
    const char* name;
    std::string bytes;
    bool is_text;
  } cases[] = {
      {"a.jsonl", lines, false},
      {"a.jsonl.gz", gzip(lines), false},
      {"a.jsonl.gz", gzip(all) + gzip("") + gzip(more), false},  // members
      {"a.jsonl.zst", zstd(lines), false},
      {"a.jsonl.zst", zstd(all) + zstd(more), false},  // frames
      {"a.txt", whole, true},
      {"a.txt.gz", gzip(whole), true},
      {"a.txt.zst", zstd(whole), true},
  };
  const std::string expected[] = {token_file(documents), token_file({whole})};
  const int standard_input = dup(0);
  for (const auto& c : cases) {
    const std::string folder = fresh_folder("corpus_formats"), path = folder + "/in/" + c.name;
    put(path, c.bytes);
    const CorpusReport report = tokenize_corpus(options_for(folder));
    EXPECT_EQ(report.documents, c.is_text ? 1 : 4) << c.name;
    EXPECT_EQ(difference(files_of(folder + "/out"), {{"a.bin", expected[c.is_text]}}), "");
    EXPECT_EQ(unfinished_in(folder + "/out"), 0);

    if (c.bytes != lines && c.bytes != whole) continue;  // a pipe is read as it is
    CorpusOptions from_pipe = options_for(folder, {"-"});
    from_pipe.output += "-pipe";
    from_pipe.format = c.is_text ? CorpusFormat::Text : CorpusFormat::Jsonl;
    ASSERT_TRUE(freopen(path.c_str(), "r", stdin));
    tokenize_corpus(from_pipe);
    EXPECT_EQ(difference(files_of(from_pipe.output), {{"stdin.bin", expected[c.is_text]}}), "");
    expect_part(error_of(kExitBadInput, [&] { tokenize_corpus(from_pipe); }),
        "stdin.bin: is there already, and standard input cannot be resumed");
  }
  dup2(standard_input, 0);
}

TEST(Corpus, LinesBecomeDocuments) {
  const std::string deep(200000, '['), end(200000, ']');
  const struct {
    std::string line;
    const char* document;
  } cases[] = {
      {"\xef\xbb\xbf{\"text\": \"byte order mark\"}\r\n", "byte order mark"},
      {"{\"text\": \"carriage return\"}\r\n", "carriage return"},
      {" \t {\"text\":\"blanks\"} \t\n", "blanks"},
      {"\n  \r\n\t\n{\"a\":{\"text\":\"inner\"},\"text\":\"outer\",\"b\":[{\"text\":1}]}\n",
          "outer"},
      {"{\"text\":\"first\",\"text\":\"last\"}\n", "last"},
      {"{\"text\":1,\"text\":\"last\"}\n", "last"},
      {"{\"te\\u0078t\":\"\\u00e9\\ud83d\\ude00\\n\\\"\\/\"}\n", "\u00e9\U0001f600\n\"/"},
      {"{\"x\":NaN,\"y\":-Infinity,\"z\":1e-999999,\"text\":\"numbers\"}\n", "numbers"},
      {"{\"x\":" + deep + end + ",\"text\":\"deep\"}\n", "deep"},
      {"{\"text\":\"\"}\n", ""},
      {"{\"text\":\"no newline at the end\"}", "no newline at the end"},
  };
  std::string lines;
  Documents documents;
  for (const auto& c : cases) {
    lines += c.line;
    documents.push_back(c.document);
  }
  const std::string folder = fresh_folder("corpus_lines");
  put(folder + "/in/a.jsonl", lines);
  put(folder + "/in/b.jsonl", "{\"text\":\"a\\u0000b\"}\n");
  EXPECT_EQ(tokenize_corpus(options_for(folder)).bad_documents, 0);
  EXPECT_EQ(
      difference(files_of(folder + "/out"),
          {{"a.bin", token_file(documents)}, {"b.bin", token_file({std::string("a\0b", 3)})}}),
      "");

  put(folder + "/key/a.jsonl", json_line("by key", "content"));
  CorpusOptions other = options_for(folder, {folder + "/key"});
  other.output += "-key";
  other.key = "content";
  tokenize_corpus(other);
  EXPECT_EQ(difference(files_of(other.output), {{"a.bin", token_file({"by key"})}}), "");
}

TEST(Corpus, MalformedDocumentsAreNamedAndStop) {
  const struct {
    const char* name;
    std::string bytes;
    const char* error;  // behind the path
  } cases[] = {
      {"a.jsonl", json_line("x") + "\r\n{\"text\": \"open\n", ":3: not valid JSON at byte 15"},
      {"a.jsonl", "{\"text\":\"a\"} {}\n", ":1: not valid JSON at byte"},
      {"a.jsonl", "{\"text\":\"a\",}\n", ":1: not valid JSON at byte"},
      {"a.jsonl", "{\"text\":\"\\q\"}\n", ":1: not valid JSON at byte"},
      {"a.jsonl", "{\"text\":\"a\",\"x\":1e999}\n", ":1: not valid JSON at byte"},
      {"a.jsonl", "hello\n", ":1: not valid JSON at byte"},
      {"a.jsonl", std::string("{\"text\":\"a\"}\0\n", 14), ":1: not valid JSON: a zero byte"},
      {"a.jsonl", std::string("\0\n", 2), ":1: not valid JSON"},
      {"a.jsonl", "{\"text\":\"tab\there\"}\n", ":1: not valid JSON at byte"},
      {"a.jsonl", "{\"x\":\"\xef\xbb\xbf\"}\n\xef\xbb\xbf{}\n", ":1: no key \"text\""},
      {"a.jsonl", "[{\"text\":\"a\"}]\n", ":1: not a JSON object"},
      {"a.jsonl", "\"text\"\n", ":1: not a JSON object"},
      {"a.jsonl", "{\"text\":null}\n", ":1: the value of \"text\" is not a string"},
      {"a.jsonl", "{\"text\":{\"text\":\"a\"}}\n", ":1: the value of \"text\" is not a string"},
      {"a.jsonl", "{\"text\":\"a\",\"text\":[]}\n", ":1: the value of \"text\" is not a string"},
      {"a.jsonl", "{\"a\":{\"text\":\"a\"}}\n", ":1: no key \"text\""},
      {"a.jsonl", "{\"text\":\"\xff\"}\n", ":1: not valid UTF-8"},
      {"a.jsonl", "{\"text\":\"\xed\xa0\x80\"}\n", ":1: not valid UTF-8"},
      {"a.jsonl", "{\"text\":\"\\ud800\"}\n", ":1: not valid JSON at byte"},
      {"a.jsonl", "{\"text\":\"\\udc00\"}\n", ":1: half of a surrogate pair in \"text\""},
      {"a.jsonl", "\n\n", ": holds no document"},
      {"a.jsonl", "", ": holds no document"},
      {"a.txt", "one\ntwo \xe4\xb8\nthree\n", ":2: not valid UTF-8"},
      {"a.txt", "\xef\xbb\xbf", ": holds no document"},
      {"a.jsonl.gz", gzip(json_line("cut short")).substr(0, 20), ": is truncated"},
      {"a.jsonl.gz", "not gzip", ": is not valid gzip data"},
      {"a.jsonl.gz", gzip(json_line("x")) + "rest", ": is not valid gzip data"},
      {"a.txt.zst", zstd("cut short").substr(0, 12), ": is truncated"},
      {"a.txt.zst", "not zstd", ": is not valid zstd data"},
      {"a.parquet", "PAR1", ": its name does not tell its format"},
      {"a.csv", "a,b", ": its name does not tell its format"},
      {"a.b", "a,b", ": its name does not tell its format"},
  };
  for (const auto& c : cases) {
    const std::string folder = fresh_folder("corpus_bad"), path = folder + "/in/" + c.name;
    put(path, c.bytes);
    for (const int threads : {1, 4}) {
      CorpusOptions options = options_for(folder);
      options.threads = threads;
      const std::string got = error_of(kExitBadInput, [&] { tokenize_corpus(options); });
      expect_part(got, path + c.error);
      expect_part(got, ". Try: ");
      if (fs::exists(folder + "/out")) {
        EXPECT_EQ(files_of(folder + "/out").size(), 0u);
      }
    }
  }
}

// Lines are counted over many batches, and a bad one leaves no file behind.
TEST(Corpus, BadLinesAreLeftOutAndListed) {
  const std::string folder = fresh_folder("corpus_skip"), path = folder + "/in/a.jsonl";
  const Documents documents = random_documents(1, 30000, 300);
  std::string lines;
  std::vector<int64_t> bad;
  int64_t line = 0;
  for (size_t i = 0; i < documents.size(); i++) {
    if (i % 1000 == 999) {
      lines += i % 2000 == 999 ? "\n{\"text\": 1}\r\n" : "\n\xff\n";
      bad.push_back(line += 2);
    }
    lines += json_line(documents[i]);
    line++;
  }
  put(path, lines);
  put(folder + "/in/b.txt", "\xff");
  put(folder + "/in/c.txt", "");
  put(folder + "/in/d.txt", "good");
  expect_part(error_of(kExitBadInput, [&] { tokenize_corpus(options_for(folder, {path})); }),
      path + ":" + std::to_string(bad[0]) + ": the value of \"text\" is not a string");
  CorpusOptions options = options_for(folder);
  options.skip_bad = true;
  testing::internal::CaptureStderr();
  const CorpusReport report = tokenize_corpus(options);
  const std::string log = testing::internal::GetCapturedStderr();
  EXPECT_EQ(report.bad_documents, 30 + 1);  // the lines, b.txt
  EXPECT_EQ(report.documents, 30001);
  EXPECT_EQ(report.files, 2);
  size_t at = 0;
  for (size_t i = 0; i < bad.size(); i++) {
    at = log.find("left out: " + path + ":" + std::to_string(bad[i]) +
                      (i % 2 ? ": not valid UTF-8\n" : ": the value of \"text\" is not a string\n"),
        at);
    ASSERT_NE(at, std::string::npos) << i;
  }
  expect_part(log, "left out: " + folder + "/in/b.txt:1: not valid UTF-8\n");
  expect_part(log, "left out: " + folder + "/in/c.txt: holds no document\n");
  EXPECT_EQ(difference(files_of(folder + "/out"),
                {{"a.bin", token_file(documents)}, {"d.bin", token_file({"good"})}}),
      "");
  EXPECT_EQ(unfinished_in(folder + "/out"), 0);

  CorpusOptions nothing = options_for(folder, {folder + "/in/b.txt"});
  nothing.output += "-none";
  nothing.skip_bad = true;
  expect_part(error_of(kExitBadInput, [&] { tokenize_corpus(nothing); }),
      "no file holds a document that can be used");
}

// Many small files, lines over many batches, and documents larger than a batch.
TEST(SlowCorpus, ThreadsDoNotChangeABit) {
  const std::string folder = fresh_folder("corpus_threads");
  Files expected;
  Documents all;
  for (int i = 0; i < 12; i++) {
    const bool large = i % 4 == 0;
    const Documents documents = random_documents(i, large ? 4000 : 20, large ? 1000 : 3000);
    const std::string name = text("d%d/f%02d", i % 3, i), lines = json_lines(documents);
    const std::string path = folder + "/in/" + name + ".jsonl";
    if (i % 3 == 0) put(path, lines);
    if (i % 3 == 1) put(path + ".gz", gzip(lines));
    if (i % 3 == 2) put(path + ".zst", zstd(lines));
    expected[name + ".bin"] = token_file(documents);
  }
  std::mt19937 random(5);
  const std::string huge = random_text(random, 5 << 20);
  put(folder + "/in/huge.jsonl", json_lines({"before", huge, huge, "behind"}));
  put(folder + "/in/huge-text.txt", huge);
  expected["huge.bin"] = token_file({"before", huge, huge, "behind"});
  expected["huge-text.bin"] = token_file({huge});
  for (const int threads : {1, 2, 3, 4}) {
    CorpusOptions options = options_for(folder);
    options.output += std::to_string(threads);
    options.threads = threads;
    const CorpusReport report = tokenize_corpus(options);
    EXPECT_EQ(report.files, 14);
    EXPECT_EQ(difference(files_of(options.output), expected), "") << threads << " threads";
    fs::remove_all(options.output);
  }
}

TEST(Corpus, FoldersPatternsAndJoining) {
  const std::string folder = fresh_folder("corpus_folders"), in = folder + "/in";
  const Files texts = {{"b.c", "int b;\n"}, {"a/z.h", "int z;\n"}, {"a/b/y.c", "int y;\n"},
      {"a/readme", "read me"}, {"a/empty.c", ""}, {"c.txt", "see\n"}, {".hidden.c", "no"},
      {".git/x.c", "no"}, {"out/x.c", "no"}};
  for (const auto& [name, bytes] : texts) put(in + "/" + name, bytes);
  fs::create_directory_symlink(in + "/a", in + "/again");
  fs::create_symlink(in + "/b.c", in + "/linked.c");
  CorpusOptions options = options_for(folder, {in});
  options.output = in + "/out";
  options.format = CorpusFormat::Text;
  options.include = {"*.c", "*.h"};
  options.join = "code";
  tokenize_corpus(options);
  const Documents documents = {"int y;\n", "int z;\n", "int b;\n", "int b;\n"};
  EXPECT_EQ(difference(files_of(options.output), {{"code.bin", token_file(documents)}}), "");

  // Without --join: a file each, by its path.
  options.join.clear();
  options.skip_bad = true;
  options.output = folder + "/each";
  options.include = {"y.c", "z.h", "c.txt", "readme"};
  tokenize_corpus(options);
  EXPECT_EQ(difference(files_of(options.output),
                {{"a/b/y.c.bin", token_file({"int y;\n"})}, {"a/z.h.bin", token_file({"int z;\n"})},
                    {"a/readme.bin", token_file({"read me"})}, {"c.bin", token_file({"see\n"})}}),
      "");
}

TEST(Corpus, SpecialTokensAsText) {
  const std::string folder = fresh_folder("corpus_special"), document = "a<|endoftext|>b";
  put(folder + "/in/a.txt", document);
  CorpusOptions options = options_for(folder);
  options.special_as_text = true;
  tokenize_corpus(options);
  EXPECT_EQ(files_of(folder + "/out").at("a.bin"), token_file({document}, false));
  EXPECT_NE(token_file({document}, false), token_file({document}, true));
}

TEST(Corpus, WhatCannotBeUsedIsRefused) {
  const std::string folder = fresh_folder("corpus_refused"), in = folder + "/in";
  put(in + "/a.jsonl", json_line("a"));
  put(in + "/sub/a.jsonl.gz", gzip(json_line("a")));
  put(folder + "/two/a.jsonl.gz", gzip(json_line("a")));
  fs::create_directories(folder + "/bare");
  const struct {
    void (*set)(CorpusOptions&, const std::string& folder);
    const char* error;
  } cases[] = {
      {[](CorpusOptions& o, const std::string& f) {
         o.inputs = {f + "/in", f + "/two"};
       },
          "two/a.jsonl.gz: would become the same token file a.bin as "},
      {[](CorpusOptions& o, const std::string& f) { o.inputs = {f + "/none"}; },
          "/none: cannot be listed (No such file or directory)"},
      {[](CorpusOptions& o, const std::string& f) { o.inputs = {f + "/bare"}; },
          "--input: no file to tokenise was found"},
      {[](CorpusOptions& o, const std::string&) { o.include = {"*.x"}; },
          "--input: no file to tokenise was found"},
      {[](CorpusOptions& o, const std::string& f) {
         o.inputs = {"-", f};
       },
          "-: standard input beside other inputs"},
      {[](CorpusOptions& o, const std::string&) { o.inputs = {"-"}; },
          "-: its name does not tell its format"},
      {[](CorpusOptions& o, const std::string&) { o.join = "a/b"; }, "--join: is \"a/b\""},
      {[](CorpusOptions& o, const std::string&) { o.eos = "2048"; }, "--eos: no such token"},
      {[](CorpusOptions& o, const std::string&) { o.eos = "</s>"; },
          "--eos: no such token (got </s>, need a token of "},
      {[](CorpusOptions& o, const std::string& f) { o.tokenizer = f + "/tokenizer.json"; },
          "/tokenizer.json"},
  };
  for (const auto& c : cases) {
    CorpusOptions options = options_for(folder);
    c.set(options, folder);
    expect_part(error_of(kExitBadInput, [&] { tokenize_corpus(options); }), c.error);
    EXPECT_FALSE(fs::exists(options.output)) << c.error;
  }
  CorpusOptions unwritable = options_for(folder);
  unwritable.output = in + "/a.jsonl/out";
  expect_part(error_of(kExitBadInput, [&] { tokenize_corpus(unwritable); }), "cannot be created");
}

TEST(Corpus, AFolderKeepsItsSettingsAndSources) {
  const std::string folder = fresh_folder("corpus_settings"), path = folder + "/in/a.jsonl";
  put(path, json_line("a"));
  put(folder + "/in/b.jsonl", json_line("b"));
  tokenize_corpus(options_for(folder));
  const Files before = files_of(folder + "/out");
  EXPECT_EQ(read_text_file(folder + "/out/tokenizer.json"), read_text_file(kTokenizer));
  put(folder + "/other/tokenizer.json", read_text_file(kTokenizer) + "\n");
  const char* const other_options =
      "a.bin: is there already, from other sources or options (names, sizes, times, --format, "
      "--key, --eos or --special-as-text differ)";
  const struct {
    void (*set)(CorpusOptions&, const std::string& folder);
    const char* error;
  } cases[] = {
      {[](CorpusOptions& o, const std::string& f) { o.tokenizer = f + "/other/tokenizer.json"; },
          "tokenizer.json: the folder was made with another tokenizer"},
      {[](CorpusOptions& o, const std::string&) { o.eos = "!"; }, other_options},
      {[](CorpusOptions& o, const std::string&) { o.key = "id"; }, other_options},
      {[](CorpusOptions& o, const std::string&) { o.special_as_text = true; }, other_options},
      {[](CorpusOptions& o, const std::string&) { o.format = CorpusFormat::Text; }, other_options},
      {[](CorpusOptions&, const std::string& f) { put(f + "/in/a.jsonl", json_line("longer")); },
          "a.bin: is there already, from other sources"},
  };
  for (const auto& c : cases) {
    CorpusOptions options = options_for(folder);
    c.set(options, folder);
    expect_part(error_of(kExitBadInput, [&] { tokenize_corpus(options); }), c.error);
    EXPECT_EQ(difference(files_of(folder + "/out"), before), "");
    EXPECT_EQ(unfinished_in(folder + "/out"), 0) << c.error;
  }
  put(folder + "/out/c.bin", before.at("a.bin"));
  put(folder + "/more/c.jsonl", json_line("c"));
  expect_part(
      error_of(kExitBadInput, [&] { tokenize_corpus(options_for(folder, {folder + "/more"})); }),
      "c.bin: is there already, but was not made by this command");
}

TEST(Corpus, FinishedFilesStayAndMissingOnesAreMade) {
  const std::string folder = fresh_folder("corpus_again"), out = folder + "/out";
  for (const char* name : {"a", "b", "c"}) put(folder + "/in/" + name + ".jsonl", json_line(name));
  EXPECT_EQ(tokenize_corpus(options_for(folder)).files, 3);
  const Files before = files_of(out);
  const auto time = fs::last_write_time(out + "/a.bin");
  fs::remove(out + "/b.bin");
  const CorpusReport again = tokenize_corpus(options_for(folder));
  EXPECT_EQ(again.files, 1);
  EXPECT_EQ(again.files_done_before, 2);
  EXPECT_EQ(again.documents, 1);
  EXPECT_EQ(difference(files_of(out), before), "");
  EXPECT_EQ(fs::last_write_time(out + "/a.bin"), time);

  // A run that fails leaves a mark, which the next one that completes takes away.
  put(folder + "/more/d.jsonl", json_line("d") + "{}\n");
  const CorpusOptions more = options_for(folder, {folder + "/more"});
  expect_part(error_of(kExitBadInput, [&] { tokenize_corpus(more); }), "d.jsonl:2: no key");
  EXPECT_EQ(unfinished_in(out), 1);
  EXPECT_EQ(tokenize_corpus(options_for(folder)).files, 0);
  EXPECT_EQ(unfinished_in(out), 0);
  EXPECT_EQ(difference(files_of(out), before), "");
}

TEST(Corpus, Inspect) {
  const std::string folder = fresh_folder("corpus_inspect"), out = folder + "/out";
  put(folder + "/in/a.jsonl", json_lines({"!", "!!!!!!!!\"", ""}));
  put(folder + "/in/b/c.jsonl", json_lines({"\"\"\"\"\"\"\"\""}));
  tokenize_corpus(options_for(folder));
  std::map<uint32_t, int64_t> counts;
  std::vector<int64_t> lengths;
  for (const char* name : {"/a.bin", "/b/c.bin"}) {
    const TokenFile file = open_token_file(out + name);
    std::vector<int32_t> ids(file.num_tokens);
    file.copy(0, file.num_tokens, 2048, ids.data());
    for (const int32_t id : ids) counts[id]++;
    for (int64_t i = 0; i < file.num_docs; i++)
      lengths.push_back(file.doc_end(i) - (i ? file.doc_end(i - 1) : 0));
  }
  const Json s = Json::parse(inspect_corpus(out, 100, 10), out);
  EXPECT_EQ(s["files"].as_int(), 2);
  EXPECT_EQ(s["documents"].as_int(), 4);
  int64_t total = 0;
  for (const int64_t n : lengths) total += n;
  EXPECT_EQ(s["tokens"].as_int(), total);
  for (int64_t bin = 0; bin < s["length_histogram"].size(); bin++)
    EXPECT_EQ(s["length_histogram"][bin]["documents"].as_int(),
        std::count_if(lengths.begin(), lengths.end(), [&](int64_t n) { return n >> bin == 1; }));
  const Json frequent = s["frequent"], samples = s["samples"];
  ASSERT_EQ(frequent.size(), static_cast<int64_t>(counts.size()));
  for (int64_t i = 0; i < frequent.size(); i++) {
    const int64_t count = frequent[i]["count"].as_int();
    EXPECT_EQ(count, counts[static_cast<uint32_t>(frequent[i]["id"].as_int())]);
    EXPECT_LE(count, frequent[std::max<int64_t>(i, 1) - 1]["count"].as_int());
  }
  ASSERT_EQ(samples.size(), 4);
  EXPECT_EQ(samples[1]["text"].as_string(), "!!!!!!!!\"<|endoftext|>");
  EXPECT_EQ(samples[3]["file"].as_string(), "b/c.bin");
  EXPECT_EQ(samples[3]["document"].as_int(), 0);

  const std::string whole = read_text_file(out + "/a.bin");
  put(out + "/a.bin", whole.substr(0, whole.size() - 1));
  expect_part(error_of(kExitBadInput, [&] { inspect_corpus(out); }), out + "/a.bin");
  expect_part(error_of(kExitBadInput, [&] { inspect_corpus(folder + "/in"); }), folder + "/in");
}

namespace {
// Files that take a run some tenths of a second, and what they become.
Files make_work(const std::string& folder, int files, int documents) {
  Files expected;
  for (int i = 0; i < files; i++) {
    const Documents all = random_documents(100 + i, documents, 400);
    put(folder + "/in/" + text("f%02d.jsonl", i), json_lines(all));
    expected[text("f%02d.bin", i)] = token_file(all);
  }
  return expected;
}

// Of what is there under its name, nothing is wrong.
void expect_whole_files(const std::string& out, const Files& expected, const std::string& when) {
  if (!fs::exists(out)) return;
  for (const auto& [name, bytes] : files_of(out))
    EXPECT_TRUE(expected.count(name) && expected.at(name) == bytes) << name << " " << when;
}

void expect_complete(const CorpusOptions& options, const Files& expected) {
  EXPECT_EQ(exit_code_of(start_child([&] { return tokenize(options); })), kExitDone);
  EXPECT_EQ(difference(files_of(options.output), expected), "");
  EXPECT_EQ(unfinished_in(options.output), 0);
  for (const auto& entry : fs::recursive_directory_iterator(options.output))
    EXPECT_NE(entry.path().extension(), ".tmp") << entry.path();
}
}  // namespace

TEST(SlowCorpus, SeveralProcessesShareAFolder) {
  const std::string folder = fresh_folder("corpus_processes");
  const Files expected = make_work(folder, 20, 500);
  int results[2];
  ASSERT_EQ(pipe(results), 0);
  std::vector<pid_t> children;
  for (int i = 0; i < 4; i++)
    children.push_back(start_child([&] {
      const CorpusReport report = tokenize_corpus(options_for(folder));
      const int64_t counts[] = {report.files, report.files_done_before, report.documents};
      return write(results[1], counts, sizeof counts) == sizeof counts ? 0 : 97;
    }));
  int64_t files = 0, documents = 0;
  for (const pid_t child : children) {
    EXPECT_EQ(exit_code_of(child), kExitDone);
    int64_t counts[3] = {};
    ASSERT_EQ(read(results[0], counts, sizeof counts), ssize_t{sizeof counts});
    EXPECT_EQ(counts[0] + counts[1], 20);  // all were complete when it left
    files += counts[0];
    documents += counts[2];
  }
  EXPECT_EQ(files, 20);  // each was made once
  EXPECT_EQ(documents, 20 * 500);
  EXPECT_EQ(difference(files_of(folder + "/out"), expected), "");
  EXPECT_EQ(unfinished_in(folder + "/out"), 0);
  close(results[0]);
  close(results[1]);
}

// One of two processes is killed: the other takes its file over.
TEST(SlowCorpus, AKilledProcessIsReplaced) {
  const std::string folder = fresh_folder("corpus_replaced");
  const Files expected = make_work(folder, 4, 6000);
  const CorpusOptions options = options_for(folder);
  const pid_t first = start_child([&] { return tokenize(options); });
  while (!fs::exists(folder + "/out/f00.bin.tmp")) usleep(200);
  const pid_t second = start_child([&] { return tokenize(options); });
  usleep(20000);
  kill(first, SIGKILL);
  EXPECT_EQ(exit_code_of(second), kExitDone);
  exit_code_of(first);
  EXPECT_EQ(difference(files_of(folder + "/out"), expected), "");
  EXPECT_EQ(unfinished_in(folder + "/out"), 0);
}

TEST(SlowCorpus, KilledAtRandomMoments) {
  const std::string folder = fresh_folder("corpus_killed");
  const Files expected = make_work(folder, 6, 3000);
  const CorpusOptions options = options_for(folder);
  std::mt19937 random(9);
  int killed = 0;
  for (int i = 0; i < 60; i++) {
    const int signal = i % 4 ? SIGKILL : SIGTERM;
    const pid_t child = start_child([&] {
      install_signal_handlers();
      return tokenize(options);
    });
    usleep(random() % 60000);
    kill(child, signal);
    const int code = exit_code_of(child);
    killed += code != kExitDone;
    // Before its handlers are there, a signal ends the process as such.
    EXPECT_TRUE(
        code == kExitDone || code == 128 + signal || (signal == SIGTERM && code == kExitStopped))
        << code;
    expect_whole_files(options.output, expected, "after kill " + std::to_string(i));
    if (files_of(folder).size() == expected.size()) fs::remove_all(options.output);
  }
  EXPECT_GT(killed, 10);
  expect_complete(options, expected);
}

// The kernel kills the process at its first call of each kind, so that every gap between two calls
// of the way to disk is met.
TEST(SlowCorpus, KilledAtEachSystemCall) {
  const std::string folder = fresh_folder("corpus_calls");
  const Files expected = make_work(folder, 3, 100);
  for (const long call : {SYS_mkdir, SYS_flock, SYS_ftruncate, SYS_write, SYS_pwrite64, SYS_fsync,
           SYS_rename, SYS_unlink, SYS_exit_group})
    for (const bool again : {false, true}) {  // in a new folder; where one file is missing
      const CorpusOptions options = options_for(folder);
      if (!again)
        fs::remove_all(options.output);
      else
        fs::remove(options.output + "/f01.bin");
      const int code = exit_code_of(start_child([&] {
        sock_filter filter[] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
            BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<uint32_t>(call), 0, 1),
            BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
            BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
        const sock_fprog program = {std::size(filter), filter};
        if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
            prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
          return 96;
        return tokenize(options);
      }));
      if (code == 96) GTEST_SKIP() << "this kernel does not let a process filter its calls";
      if (call != SYS_mkdir || !again) {
        EXPECT_EQ(code, 128 + SIGSYS) << "call " << call;
      }
      expect_whole_files(options.output, expected, "after call " + std::to_string(call));
      expect_complete(options, expected);
    }
}

// A limit on the size of files stands in for a full disk.
TEST(SlowCorpus, FullDisk) {
  const std::string folder = fresh_folder("corpus_full");
  const Files expected = make_work(folder, 2, 3000);
  const CorpusOptions options = options_for(folder);
  const size_t size = expected.at("f00.bin").size();
  for (const size_t limit : {size_t{0}, size_t{1000}, size_t{200000}, size - 30000, size - 1}) {
    const std::string error_path = folder + "/error";
    put(error_path, "");
    const int code = exit_code_of(start_child([&]() -> int {
      std::string error;
      signal(SIGXFSZ, SIG_IGN);
      rlimit old;
      getrlimit(RLIMIT_FSIZE, &old);
      const rlimit small{limit, old.rlim_max};
      setrlimit(RLIMIT_FSIZE, &small);
      try {
        tokenize(options);
      } catch (const Error& e) {
        setrlimit(RLIMIT_FSIZE, &old);
        put(error_path, e.what());
        return e.exit_code;
      }
      return 0;
    }));
    EXPECT_EQ(code, kExitFailed) << limit;
    expect_part(read_text_file(error_path), "(File too large). Try: ");
    expect_whole_files(options.output, expected, "limit " + std::to_string(limit));
    for (const auto& entry : fs::recursive_directory_iterator(options.output))
      EXPECT_NE(entry.path().extension(), ".tmp") << entry.path();
  }
  expect_complete(options, expected);
}

}  // namespace pith
