// pith tokenize and pith corpus, as commands.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>

#include "app/commands.h"
#include "core/check.h"
#include "core/json.h"
#include "core/process.h"
#include "helpers.h"

namespace pith {
namespace {

namespace fs = std::filesystem;

const std::string kTokenizer = SOURCE_DIR "/configs/quickstart/tokenizer.json";

struct Output {
  int code = -1;
  std::string out, error, log;  // log: of standard error
};

Output call(int (*command)(int, char**), std::vector<std::string> words) {
  words.insert(words.begin(), "command");
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  Output run;
  testing::internal::CaptureStdout();
  testing::internal::CaptureStderr();
  try {
    run.code = command(static_cast<int>(argv.size()), argv.data());
  } catch (const Error& e) {
    run.code = e.exit_code;
    run.error = e.what();
  }
  run.log = testing::internal::GetCapturedStderr();
  run.out = testing::internal::GetCapturedStdout();
  return run;
}

Output tokenize(std::vector<std::string> words) { return call(run_tokenize, std::move(words)); }

// Texts that a terminal, a line, or a careless decoder would change.
const std::vector<std::string> kDocuments = {"Plain words.\n", "",
    "h\u00e9 \u4e2d\u6587 \u0645\U0001f600\u200b\ufeff\n\n  \t ",
    std::string("zero \0 byte\r\n", 13), "<|endoftext|> in the \"middle\" \\n"};

std::string json_lines() {
  std::string lines;
  for (const std::string& document : kDocuments)
    lines += JsonWriter().object().key("text").value(document).end().str() + "\n";
  return lines;
}

}  // namespace

TEST(Tokenize, AndBack) {
  const std::string folder = fresh_folder("tokenize"), out = folder + "/out";
  put(folder + "/in/a.jsonl", json_lines());
  const std::vector<std::string> words = {
      "--tokenizer", kTokenizer, "--output", out, "--json", "--input", folder + "/in"};
  const Output made = tokenize(words);
  EXPECT_EQ(made.code, kExitDone) << made.error;
  const Json report = Json::parse(made.out, "report");
  EXPECT_EQ(report["files"].as_int(), 1);
  EXPECT_EQ(report["documents"].as_int(), 5);
  EXPECT_FALSE(report["stopped"].as_bool());
  EXPECT_EQ(report["bad_documents"].as_int(), 0);
  expect_part(made.log, "1 of 1 files: 5 documents, ");
  const Output again = tokenize(words);
  EXPECT_EQ(Json::parse(again.out, "report")["files_done_before"].as_int(), 1);
  expect_part(again.log, "1 files were there before");

  // All documents, each with the end-of-text that follows it.
  const std::string file = out + "/a.bin";
  std::string all;
  for (const std::string& document : kDocuments) all += document + "<|endoftext|>";
  EXPECT_EQ(tokenize({"--decode", file}).out, all);
}

TEST(Tokenize, Options) {
  const std::string folder = fresh_folder("tokenize_options"), in = folder + "/in";
  put(in + "/a.c", "int a;\n");
  put(in + "/b.h", "int b;<|endoftext|>\n");
  put(in + "/c.py", "print\n");
  const auto run = [&](const std::string& name, std::vector<std::string> words) {
    words.insert(words.begin(), {"--tokenizer", kTokenizer, "--format", "text", "--output",
                                    folder + "/" + name, "--input", in});
    const Output got = tokenize(words);
    EXPECT_EQ(got.code, kExitDone) << got.error;
    return tokenize({"--decode", folder + "/" + name + "/x.bin"}).out;
  };
  const std::string a = "int a;\n<|endoftext|>", b = "int b;<|endoftext|>\n<|endoftext|>",
                    c = "print\n<|endoftext|>";
  EXPECT_EQ(run("all", {"--join", "x"}), a + b + c);
  EXPECT_EQ(run("some", {"--join", "x", "--include", "*.c,*.h", "--threads", "3"}), a + b);
  EXPECT_EQ(run("eos", {"--join", "x", "--eos", "!"}), "int a;\n!int b;<|endoftext|>\n!print\n!");
  EXPECT_EQ(run("text", {"--join", "x", "--special-as-text"}), a + b + c);
  EXPECT_GT(fs::file_size(folder + "/text/x.bin"), fs::file_size(folder + "/all/x.bin"));
  put(folder + "/bad/a.jsonl", "{\"body\":\"good\"}\n{\"body\":1}\n");
  const Output skipped = tokenize({"--tokenizer", kTokenizer, "--output", folder + "/bad-out",
      "--input", folder + "/bad", "--key", "body", "--skip-bad"});
  EXPECT_EQ(skipped.code, kExitDone) << skipped.error;
  expect_part(skipped.log, "left out: " + folder + "/bad/a.jsonl:2: the value of \"body\"");
}

TEST(Tokenize, WrongUseIsRefused) {
  const std::string folder = fresh_folder("tokenize_wrong"), file = folder + "/out/a.bin";
  put(folder + "/in/a.txt", "text");
  tokenize({"--tokenizer", kTokenizer, "--output", folder + "/out", "--input", folder + "/in"});
  put(folder + "/alone/a.bin", read_text_file(file));
  const struct {
    std::vector<std::string> words;
    std::string error;
  } cases[] = {
      {{}, "pith tokenize: needs --tokenizer, --input and --output"},
      {{"--tokenizer", "t", "--input", "i"}, "needs --tokenizer, --input and --output"},
      {{"--threads", "-1"}, "--threads"},
      {{"--format", "csv"}, "--format"},
      {{"--no-such-option"}, "--no-such-option"},
      {{"--decode", folder + "/none.bin"}, "/none.bin"},
      {{"--decode", folder + "/alone/a.bin"}, "has no tokenizer.json in its folder or above"},
  };
  for (const auto& c : cases) {
    const Output run = tokenize(c.words);
    EXPECT_EQ(run.code, kExitBadInput) << c.error;
    expect_part(run.error, c.error);
  }
}

// A signal ends it with exit code 3; the same command then finishes what is left.
TEST(Tokenize, StopsAtASignalAndGoesOn) {
  const std::string folder = fresh_folder("tokenize_stop"), out = folder + "/out";
  std::string lines;
  for (int i = 0; i < 4000; i++) lines += json_lines();
  for (const char* name : {"a", "b", "c"}) put(folder + "/in/" + name + ".jsonl", lines);
  const std::vector<std::string> words = {
      "--tokenizer", kTokenizer, "--output", out, "--input", folder + "/in"};
  const pid_t child = fork();
  if (child == 0) {
    request_stop();
    _exit(tokenize(words).code);
  }
  int status = 0;
  waitpid(child, &status, 0);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), kExitStopped);
  EXPECT_FALSE(fs::exists(out + "/c.bin"));
  EXPECT_EQ(tokenize(words).code, kExitDone);
  const std::string a = read_text_file(out + "/a.bin");
  EXPECT_EQ(read_text_file(out + "/b.bin"), a);
  EXPECT_EQ(read_text_file(out + "/c.bin"), a);
}

TEST(Tokenize, CorpusIsInspected) {
  const std::string folder = fresh_folder("tokenize_inspect"), out = folder + "/out";
  put(folder + "/in/a.jsonl", json_lines());
  tokenize({"--tokenizer", kTokenizer, "--output", out, "--input", folder + "/in"});
  const Output table = call(run_corpus, {"inspect", out, "--samples", "5", "--top", "3"});
  EXPECT_EQ(table.code, kExitDone) << table.error;
  for (const char* part : {"documents: 5\n", "files: 1\n", "\ntokens: ",
           "\nlength_histogram:\n  {\"below\":2,\"documents\":1}\n",  // the empty document
           "\n  {\"document\":0,\"file\":\"a.bin\",\"text\":\"Plain words.\\n<|endoftext|>\"}\n",
           "zero \\u0000 byte\\r\\n"})
    expect_part(table.out, part);
  EXPECT_EQ(table.log.find("not all of it is there"), std::string::npos) << table.log;
  const Json j =
      Json::parse(call(run_corpus, {"inspect", out, "--json", "--top", "1"}).out, "inspect");
  EXPECT_EQ(j["documents"].as_int(), 5);
  EXPECT_EQ(j["unfinished"].as_int(), 0);
  EXPECT_EQ(j["frequent"].size(), 1);
  EXPECT_EQ(j["length_histogram"][0]["below"].as_int(), 2);
  EXPECT_EQ(j["length_histogram"][0]["documents"].as_int(), 1);

  put(folder + "/more/b.jsonl", "{}\n");
  tokenize({"--tokenizer", kTokenizer, "--output", out, "--input", folder + "/more"});
  expect_part(call(run_corpus, {"inspect", out}).log, "not all of it is there");
  const Output wrong = call(run_corpus, {"inspect", folder + "/none"});
  EXPECT_EQ(wrong.code, kExitBadInput);
  expect_part(wrong.error, folder + "/none");
}

}  // namespace pith
