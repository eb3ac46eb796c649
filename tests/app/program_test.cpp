// The whole program as its users meet it: runs that are killed, stopped, starved of disk or crash,
// commands and files that are wrong, and the way from text to a Hugging Face folder.
#include <sys/resource.h>

#include <cmath>
#include <cstring>
#include <map>
#include <regex>

#include "app/program.h"
#include "core/log.h"
#include "core/process.h"
#include "engine/checkpoint.h"
#include "engine/small_run.h"
#include "helpers.h"
#include "observe/metrics.h"

namespace pith {
namespace {

namespace fs = std::filesystem;

// ---- a small run ----

// Two layers, four sequences a step, 4 steps, each saved.
RunConfig tiny(int64_t vocab = 64) {
  RunConfig c = small_run({.layers = 2,
      .hidden = 16,
      .experts = 2,
      .top_k = 1,
      .vocab = static_cast<int>(vocab),
      .global_batch = 4,
      .documents = 60});
  c.train.steps = 4;
  c.checkpoint.interval = 1;
  // What an earlier process of this number left.
  for (const auto& entry : fs::directory_iterator(folder_of(c.model.config)))
    if (entry.path() != c.model.config && entry.path() != c.data.path) fs::remove_all(entry.path());
  return c;
}

std::string folder_of_test(const RunConfig& c) { return folder_of(c.model.config); }
std::string output_of_test(const RunConfig& c) { return folder_of_test(c) + ".output"; }

// `pith train` of the configuration.
Words train_words(const RunConfig& c, const Words& more = {}) {
  const std::string file = folder_of_test(c) + "/run.toml";
  write_file_durably(file, to_toml(c));
  Words words = {"train", file};
  words.insert(words.end(), more.begin(), more.end());
  return words;
}

void train_to_end(const RunConfig& c, const Words& more = {}) {
  const Ran ran = run_pith(train_words(c, more), output_of_test(c));
  ASSERT_EQ(ran.exit_code, kExitDone) << ran.err;
}

// Weights and moments, bit for bit.
using State = std::map<std::string, std::vector<uint32_t>>;
State state_of(const std::string& run_folder, int64_t step) {
  const Checkpoint c =
      open_checkpoint(run_folder + text("/step-%08lld", static_cast<long long>(step)));
  verify(c);
  EXPECT_EQ(c.state.step, step);
  State state;
  for (const auto& [name, tensor] : c.tensors) {
    std::vector<uint32_t>& bits = state[name];
    bits.resize(static_cast<size_t>(tensor.numel()));
    read_elements(c, tensor, 0, tensor.numel(), reinterpret_cast<float*>(bits.data()));
  }
  EXPECT_GT(state.size(), 50u);
  return state;
}

void expect_no_leftovers(const std::string& folder) {
  for (const auto& entry : fs::recursive_directory_iterator(folder))
    EXPECT_FALSE(entry.path().string().ends_with(".tmp")) << entry.path();
}

// What is in a folder, by path. Without what says that a run was refused there.
std::map<std::string, std::string> contents(const std::string& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    const std::string name = entry.path().filename();
    if (name == ".lock" || name == "log.txt") continue;
    files[entry.path()] = entry.is_directory() ? "" : read_text_file(entry.path());
  }
  return files;
}

// ---- kills ----

// Restarts a run that was killed: it goes on and ends as if nothing had been.
void expect_same_end(const RunConfig& c, const State& whole, const Words& more) {
  const Ran ran = run_pith(train_words(c, more), output_of_test(c));
  ASSERT_EQ(ran.exit_code, kExitDone) << ran.err;
  EXPECT_EQ(state_of(c.run.folder, c.train.steps), whole);
  expect_no_leftovers(c.run.folder);
}

TEST(SlowKills, AfterEachSystemCallOfASave) {
  RunConfig c = tiny();
  c.checkpoint.keep = 1;
  const std::string output = output_of_test(c), start = folder_of_test(c) + "/start";
  train_to_end(c, {"--set", "train.steps=2"});
  fs::rename(c.run.folder, start);
  c.run.folder = folder_of_test(c) + "/whole";
  fs::copy(start, c.run.folder, fs::copy_options::recursive);
  train_to_end(c);
  const State whole = state_of(c.run.folder, 4);
  c.run.folder = folder_of_test(c) + "/killed";
  int calls = 0;
  for (bool killed = true; killed && !HasFailure(); calls++) {
    SCOPED_TRACE(text("killed after call %d", calls + 1));
    fs::remove_all(c.run.folder);
    fs::copy(start, c.run.folder, fs::copy_options::recursive);
    int status = 0;
    const pid_t pid = start_pith(train_words(c), output, CallKiller::trace_me);
    killed = CallKiller(pid, "step-00000003", calls + 1).run(status);
    if (WIFEXITED(status) && WEXITSTATUS(status) == CallKiller::kCannotTrace)
      GTEST_SKIP() << "ptrace is not allowed here";
    EXPECT_EQ(WIFSIGNALED(status), killed);
    expect_same_end(c, whole, {});
    if (killed) expect_part(read_text_file(output + ".err"), "going on from");
  }
  EXPECT_GT(calls, 80);
}

TEST(SlowKills, AtRandomMoments) {
  RunConfig c = tiny();
  c.train.steps = 10;
  c.checkpoint.keep = 2;
  const Words ranks = {"--ranks", "2"};
  const double began = now_s();
  train_to_end(c, ranks);
  const double seconds = now_s() - began;
  const State whole = state_of(c.run.folder, c.train.steps);
  for (int i = 0; i < 30 && !testing::Test::HasFailure(); i++) {
    SCOPED_TRACE(text("moment %d", i));
    fs::remove_all(c.run.folder);
    const pid_t pid = start_pith(train_words(c, ranks), output_of_test(c));
    const double wait = seconds * uniform_at(11, static_cast<uint64_t>(i));
    std::this_thread::sleep_for(std::chrono::duration<double>(wait));
    kill(pid, SIGKILL);
    wait_for(pid, output_of_test(c));
    expect_same_end(c, whole, ranks);
  }
}

// ---- signals, locks, crashes ----

// A run without end in sight, once it has done two steps.
pid_t start_long_run(const RunConfig& c, const Words& more = {}) {
  Words words = {"--set", "train.steps=1400", "--set", "checkpoint.interval=0"};
  words.insert(words.end(), more.begin(), more.end());
  const pid_t pid = start_pith(train_words(c, words), output_of_test(c));
  EXPECT_TRUE(wait_until(output_of_test(c) + ".err", "step 00000002/"));
  return pid;
}

TEST(Program, StopsAtASignalAndGoesOn) {
  for (const int signal : {SIGTERM, SIGINT}) {
    RunConfig c = tiny();
    c.run.folder += text("-%d", signal);
    const pid_t pid = start_long_run(c);
    // A second run in its folder.
    const Ran second = run_pith(train_words(c), output_of_test(c) + "2");
    EXPECT_EQ(second.exit_code, kExitBadInput);
    expect_part(second.err, c.run.folder + ": another run writes there");
    kill(pid, signal);
    const Ran ran = wait_for(pid, output_of_test(c));
    ASSERT_EQ(ran.exit_code, kExitStopped) << ran.err;
    const std::map<int64_t, std::string> list = list_checkpoints(c.run.folder);
    ASSERT_EQ(list.size(), 1u);
    expect_part(ran.err, text("stopped at step %lld; the same command goes on",
                             static_cast<long long>(list.begin()->first)));
    c.train.steps = list.begin()->first + 2;
    c.checkpoint.interval = 0;
    train_to_end(c);
    const State resumed = state_of(c.run.folder, c.train.steps);
    c.run.folder += "-whole";
    train_to_end(c);
    EXPECT_EQ(resumed, state_of(c.run.folder, c.train.steps));
  }
}

TEST(Program, LeavesAtTheSecondSignal) {
  RunConfig c = tiny();
  c.train.global_batch_size = 20000;  // a step takes long
  c.data.max_epochs = 10000;
  const pid_t pid = start_pith(train_words(c), output_of_test(c));
  ASSERT_TRUE(wait_until(output_of_test(c) + ".err", "parameters"));
  kill(pid, SIGINT);
  ASSERT_TRUE(wait_until(output_of_test(c) + ".err", "stopping after this step"));
  kill(pid, SIGTERM);
  EXPECT_EQ(wait_for(pid, output_of_test(c)).exit_code, 128 + SIGTERM);
}

TEST(Program, ACrashSaysWhereEveryRankWas) {
  for (const int signal : {SIGSEGV, SIGABRT}) {
    const RunConfig c = tiny();
    const pid_t pid = start_long_run(c, {"--ranks", "2"});
    std::vector<int> threads;
    for (const auto& entry : fs::directory_iterator(text("/proc/%d/task", pid)))
      threads.push_back(std::stoi(entry.path().filename().string()));
    std::sort(threads.begin(), threads.end());
    ASSERT_GE(threads.size(), 3u);  // the main one, rank 0, rank 1
    syscall(SYS_tgkill, pid, threads[1], signal);
    const Ran ran = wait_for(pid, output_of_test(c));
    EXPECT_EQ(ran.exit_code, 1) << "signal " << signal;
    expect_part(ran.err, text("error: crash: signal %d (", signal));
    const std::string place =
        "step \\d+, layer -?\\d+, stage -?\\d+, micro-batch -?\\d+, last op [a-z_ ]+ called "
        "at [^ ]+[.](h|cpp):\\d+";
    EXPECT_TRUE(std::regex_search(ran.err, std::regex("rank 0 [(]crashed here[)]: " + place)))
        << ran.err;
    EXPECT_TRUE(std::regex_search(ran.err, std::regex("rank 1: " + place))) << ran.err;
    fs::remove_all(c.run.folder);
  }
}

// ---- disk full ----

void limit_file_size() {
  rlimit limit = {};
  getrlimit(RLIMIT_FSIZE, &limit);
  limit.rlim_cur = 40000;
  setrlimit(RLIMIT_FSIZE, &limit);
}

TEST(Program, ASaveWithoutSpaceIsTriedAgain) {
  RunConfig c = tiny();
  train_to_end(c, {"--set", "train.steps=2"});
  const auto good = contents(c.run.folder + "/step-00000002");
  c.train.steps = 1400;
  c.checkpoint.keep = 0;
  c.checkpoint.interval = 20;
  const std::string output = output_of_test(c);
  const pid_t pid = start_pith(train_words(c), output, limit_file_size);
  ASSERT_TRUE(wait_until(output + ".err", "step-00000020 was not saved"));
  EXPECT_EQ(contents(c.run.folder + "/step-00000002"), good);
  const rlimit none = {RLIM_INFINITY, RLIM_INFINITY};
  ASSERT_EQ(prlimit(pid, RLIMIT_FSIZE, &none, nullptr), 0);
  ASSERT_TRUE(wait_until(output + ".err", "saved " + c.run.folder + "/step-0"));
  kill(pid, SIGTERM);
  EXPECT_EQ(wait_for(pid, output).exit_code, kExitStopped);
  const Ran verified = run_pith({"checkpoint", "verify", c.run.folder}, output);
  EXPECT_EQ(verified.exit_code, kExitDone) << verified.out;
  expect_no_leftovers(c.run.folder);
}

TEST(Program, ALastSaveWithoutSpaceIsAFailure) {
  RunConfig c = tiny();
  train_to_end(c, {"--set", "train.steps=2"});
  const auto good = contents(c.run.folder + "/step-00000002");
  const std::string output = output_of_test(c);
  const Ran ran = wait_for(start_pith(train_words(c), output, limit_file_size), output);
  EXPECT_EQ(ran.exit_code, kExitFailed);
  expect_part(ran.err, "WARNING");
  expect_part(ran.err, "step-00000003 was not saved");
  expect_part(ran.err, c.run.folder + ": the last checkpoint could not be saved. Try: free");
  EXPECT_EQ(contents(c.run.folder + "/step-00000002"), good);
  EXPECT_EQ(list_checkpoints(c.run.folder).size(), 2u);  // of steps 1 and 2
  expect_no_leftovers(c.run.folder);
  const State whole = [&] {
    RunConfig other = c;
    other.run.folder += "-whole";
    train_to_end(other);
    return state_of(other.run.folder, 4);
  }();
  expect_same_end(c, whole, {});
}

// ---- not finite ----

TEST(Program, ANonfiniteStepEndsTheRun) {
  RunConfig c = tiny();
  train_to_end(c, {"--set", "train.steps=2"});
  const Ran ran = run_pith(train_words(c, {"--set", "optimizer.lr=1e30"}), output_of_test(c));
  EXPECT_EQ(ran.exit_code, kExitFailed);
  const std::regex message(
      "error: rank 0: step 4: loss or gradient is not finite [(]got loss .*, gradient norm "
      ".*[)]: [^ ]*qwen3_moe[.]cpp:\\d+: [a-z_]+: non-finite value .*layer -?\\d+, stage \\d.*"
      "[.] Try: a lower optimizer[.]lr, or ");
  EXPECT_TRUE(std::regex_search(ran.err, message)) << ran.err;
  // The checkpoints of the steps before, the one under way included.
  EXPECT_EQ(list_checkpoints(c.run.folder).rbegin()->first, 3);
  EXPECT_EQ(run_pith({"checkpoint", "verify", c.run.folder}, output_of_test(c)).exit_code, 0);
  expect_no_leftovers(c.run.folder);
}

TEST(Program, NonfiniteStepsAreSkippedAndCounted) {
  RunConfig c = tiny();
  c.model.init_std = 1e30;
  c.train.on_nonfinite = "skip";
  const Ran ran = run_pith(train_words(c), output_of_test(c));
  EXPECT_EQ(ran.exit_code, kExitDone);
  expect_part(ran.err, "UPDATE SKIPPED: not finite");
  expect_part(read_text_file(c.run.folder + "/report.html"), "updates skipped: not finite");
  EXPECT_EQ(open_checkpoint(c.run.folder + "/step-00000004").state.updates, 0);
  EXPECT_EQ(state_of(c.run.folder, 4), state_of(c.run.folder, 2));
}

// ---- another run's folder ----

TEST(Program, GoesOnOnlyAsTheSameRun) {
  RunConfig c = tiny();
  const std::string folder = folder_of_test(c), output = output_of_test(c);
  train_to_end(c);
  const auto file = [&](const std::string& name, std::string bytes, const std::string& from,
                        const std::string& to) {
    bytes.replace(bytes.find(from), from.size(), to);
    write_file_durably(folder + name, bytes);
    return folder + name;
  };
  const std::string model =
      file("/other.json", read_text_file(c.model.config), "10000.0", "20000.0");
  std::string corpus = read_text_file(c.data.path);
  corpus[200] ^= 1;
  const std::string data = file("/other.bin", corpus, "NUMPY", "NUMPY");
  const auto before = contents(c.run.folder);
  const struct {
    std::string set, differs;
  } refused[] = {
      {"model.config=" + model,
          "the model's rope_theta differs from the saved run's (got "
          "20000.0, need 10000.0)"},
      {"data.path=" + data, "the data set (its fingerprint) differs"},
      {"data.seed=5", "data.seed differs from the saved run's (got 5, need 1234)"},
      {"data.sequence_length=16", "data.sequence_length differs"},
      {"train.global_batch_size=8", "train.global_batch_size differs"},
      {"optimizer.beta1=0.8", "optimizer.beta1 differs"},
  };
  for (const auto& one : refused) {
    const Ran ran = run_pith(train_words(c, {"--set", one.set, "--set", "train.steps=6"}), output);
    EXPECT_EQ(ran.exit_code, kExitBadInput) << one.set;
    expect_part(ran.err, one.differs);
    EXPECT_EQ(contents(c.run.folder), before) << one.set;
  }
  const Words changes = {"optimizer.lr=2e-3", "checkpoint.interval=2", "train.log_interval=3",
      "lr_schedule.kind=cosine", "parallel.gather=layer", "parallel.ep=2"};
  for (const std::string& change : changes) {
    c.train.steps++;
    train_to_end(c, {"--set", change});
    EXPECT_EQ(list_checkpoints(c.run.folder).rbegin()->first, c.train.steps) << change;
  }
}

// ---- wrong input ----

// Exactly one line of `err` is an error, and it has the one form.
void expect_one_error(const std::string& err, const std::string& part) {
  std::istringstream lines(err);
  std::string error, line;
  int errors = 0;
  while (std::getline(lines, line)) {
    if (!line.starts_with("error: ")) {
      EXPECT_TRUE(std::regex_search(line, std::regex("[|] (INFO|WARNING) [|]"))) << line;
      continue;
    }
    error = line;
    errors++;
  }
  EXPECT_EQ(errors, 1) << err;
  EXPECT_TRUE(std::regex_match(error, std::regex("error: [^ ].*: .+[.] Try: .+"))) << error;
  expect_part(error, part);
}

struct BadCase {
  Words words;
  std::string part;  // of the message
};

// Each ends with exit code 2 and one error, and leaves the test's folder as it was.
void expect_refused(const RunConfig& c, const std::vector<BadCase>& cases) {
  const auto before = contents(folder_of_test(c));
  for (const BadCase& one : cases) {
    const Ran ran = run_pith(one.words, output_of_test(c));
    SCOPED_TRACE(testing::PrintToString(one.words));
    EXPECT_EQ(ran.exit_code, kExitBadInput) << ran.err;
    expect_one_error(ran.err, one.part);
    const auto after = contents(folder_of_test(c));
    for (const auto& [path, bytes] : after)
      EXPECT_TRUE(before.contains(path) && before.at(path) == bytes) << path;
    EXPECT_EQ(after.size(), before.size());
  }
}

// Writes FOLDER/name: the first `size` bytes of `bytes`.
void write_part(const std::string& path, const std::string& bytes, size_t size) {
  write_file_durably(path, bytes.substr(0, size));
}

TEST(BadInput, OfTraining) {
  const RunConfig c = tiny();
  const std::string f = folder_of_test(c) + "/", corpus = read_text_file(c.data.path),
                    config = read_text_file(c.model.config);
  train_words(c);
  const std::string run = read_text_file(f + "run.toml");
  write_part(f + "empty", "", 0);
  write_part(f + "empty.bin", "", 0);
  write_part(f + "header.bin", corpus, 40);
  write_part(f + "short.bin", corpus, 1000);
  write_part(f + "ends.bin", corpus, corpus.size() - 8);
  write_part(f + "text.bin", std::string(500, 'x'), 500);
  write_part(f + "short.json", config, config.size() / 2);
  write_part(f + "text.json", "hello", 5);
  write_part(f + "list.json", "[1]", 3);
  write_part(f + "short.toml", run, run.find("folder") + 12);
  write_part(f + "section.toml", "[tran]\nsteps = 1\n", 99);
  write_part(f + "binary.toml", corpus, 300);
  std::string ends = corpus;
  ends[ends.size() - 3] ^= 1;
  write_part(f + "corrupt.bin", ends, ends.size());
  const std::string no_tokens = npy_header(FileDType::U16, {0}) + npy_header(FileDType::U64, {0});
  write_part(f + "none.bin", no_tokens, no_tokens.size());
  fs::create_directories(f + "nothing");
  const auto small = [&](const std::string& from, const std::string& to) {
    std::string other = config;
    other.replace(other.find(from), from.size(), to);
    const std::string path = f + "model-" + std::to_string(fs::file_size(f + "run.toml")) +
                             std::to_string(std::hash<std::string>()(to) % 100000) + ".json";
    write_part(path, other, other.size());
    return path;
  };
  const auto set = [&](const std::string& assignment, const std::string& part) {
    return BadCase{{"train", f + "run.toml", "--set", assignment}, part};
  };
  expect_refused(c,
      {
          {{"train"}, "pith train: run is required"},
          {{"train", f + "run.toml", "more"}, "more"},
          {{"train", f + "run.toml", "--nonsense"}, "--nonsense"},
          {{"train", f + "run.toml", "--ranks", "many"}, "many"},
          {{"train", f + "run.toml", "--ranks", "3", "--set", "parallel.ep=2"}, "3"},
          {{"train", f + "run.toml", "--device", "tpu"}, "--device: "},
          {{"train", f + "run.toml", "--device", "cuda"}, "--device cuda: there is no GPU to use"},
          {{"train", f + "run.toml", "--profile-step", "0"}, "--profile-step"},
          {{"train", f + "run.toml", "--profile-step", "1", "--device", "cpu"},
              "--profile-step: needs a GPU and a step from 1 to "},
          {{"train", f + "run.toml", "--profile-step", "9999"}, "(got 9999 on the CPU)"},
          {{"trian", f + "run.toml"}, "unknown command (got \"trian\")"},
          {{"train", f + "absent.toml"}, "absent.toml: cannot be opened"},
          {{"train", f + "nothing"}, "Is a directory"},
          {{"train", f + "empty"}, "is required and not set"},
          {{"train", f + "short.toml"}, "short.toml:2:"},
          {{"train", f + "section.toml"}, "section.toml:1: tran: is an unknown key. Try: [train]"},
          {{"train", f + "binary.toml"}, "binary.toml:"},
          set("train.setps=3", "--set train.setps: is an unknown key. Try: train.steps"),
          set("train.steps", "--set train.steps: has no value"),
          set("train.steps=many", "(got many, need a whole number)"),
          set("train.steps=1.5", "(got 1.5, need a whole number)"),
          set("train.steps=-1", "train.steps: is out of range (got -1, need 1 or more"),
          set("data.shuffle=1", "(got 1, need true or false)"),
          set("train.on_nonfinite=ignore", "(got \"ignore\", need \"stop\", \"skip\")"),
          set("data.path=" + f + "absent.bin", "absent.bin"),
          set("data.path=" + f + "nothing", "holds no token file"),
          set("data.path=" + f + "empty.bin", "empty.bin: is not an NPY array"),
          set("data.path=" + f + "header.bin", "header.bin: "),
          set("data.path=" + f + "short.bin", "short.bin: is cut short"),
          set("data.path=" + f + "ends.bin", "ends.bin (document ends): is cut short"),
          set("data.path=" + f + "text.bin", "text.bin: is not an NPY array"),
          set("data.path=" + f + "corrupt.bin", "corrupt.bin: "),
          set("data.path=" + f + "none.bin", "corpus"),
          set("train.steps=100000", "data.max_epochs: the corpus is smaller than the run"),
          set("train.eval_interval=2", "data.heldout_fraction"),
          set("model.config=" + f + "absent.json", "absent.json: cannot be opened"),
          set("model.config=" + f + "empty", "empty: is empty"),
          set("model.config=" + f + "short.json", "short.json: is not valid JSON"),
          set("model.config=" + f + "text.json", "text.json: is not valid JSON"),
          set("model.config=" + f + "list.json", "list.json: "),
          set("model.config=" + small("\"vocab_size\": 64", "\"vocab_size\": 50"),
              "holds a token id beyond the vocabulary"),
          set("model.config=" + small("qwen3_moe", "qwen9"), "model_type: is not implemented"),
          set("model.config=" + small("\"hidden_size\": 16", "\"hidden_size\": \"16\""),
              "hidden_size"),
          set("model.config=" + small("\"hidden_size\": 16, ", ""), "hidden_size"),
          set("model.config=" +
                  small("\"rms_norm_eps\"", "\"use_sliding_window\": true, \"rms_norm_eps\""),
              "sliding_window"),
          set("model.init_from=" + f + "absent", "absent: cannot be opened"),
          set("model.init_from=" + f + "nothing", "nothing: "),
          set("model.init_from=" + f + "empty", "empty: is no safetensors file"),
          {{"train", f + "run.toml", "--ranks", "2", "--set", "parallel.cp=2", "--set",
               "data.sequence_length=30"},
              "data.sequence_length: does not split into 2 * parallel.cp blocks (got 30"},
          set("data.sequence_length=5000", "data.sequence_length: is beyond the model's"),
          set("train.micro_batch_size=3", "does not split into micro-batches over the mesh"),
      });
}

TEST(BadInput, OfCheckpointsAndFolders) {
  RunConfig c = tiny();
  c.checkpoint.keep = 0;
  train_to_end(c);
  const std::string f = folder_of_test(c) + "/", good = c.run.folder + "/step-00000004";
  const std::string output = output_of_test(c);
  ASSERT_EQ(run_pith({"convert", "export-hf", good, f + "hf", "--dtype", "fp32"}, output).exit_code,
      kExitDone);
  const auto copy = [&](const std::string& from, const std::string& to, const std::string& file,
                        auto change) {
    fs::copy(from, f + to, fs::copy_options::recursive);
    std::string bytes = read_text_file(f + to + file);
    change(bytes);
    write_file_durably(f + to + file, bytes);
  };
  const auto halve = [](std::string& bytes) { bytes.resize(bytes.size() / 2); };
  const auto flip = [](std::string& bytes) { bytes[bytes.size() - 99] ^= 4; };
  const auto flip_weight = [](std::string& bytes) {  // the first, behind the header
    bytes[8 + *reinterpret_cast<const uint64_t*>(bytes.data())] ^= 4;
  };
  const auto clear = [](std::string& bytes) { bytes.clear(); };
  const auto nan = [](std::string& bytes) { memset(&bytes[bytes.size() - 4], -1, 4); };
  const auto inf = [](std::string& bytes) { memcpy(&bytes[bytes.size() - 4], "\0\0\x80\x7f", 4); };
  const std::string shard = "/rank-00000.safetensors", manifest = "/manifest.json";
  copy(good, "cut-shard", shard, halve);
  copy(good, "flipped-shard", shard, flip_weight);
  copy(good, "empty-shard", shard, clear);
  copy(good, "cut-manifest", manifest, halve);
  copy(good, "flipped-manifest", manifest, flip);
  copy(good, "empty-manifest", manifest, clear);
  copy(c.run.folder, "none-good", "/step-00000004/manifest.json", flip);
  for (const char* step : {"1", "2", "3"}) fs::remove_all(f + "none-good/step-0000000" + step);
  const std::string weights = "/model.safetensors";
  copy(f + "hf", "cut-hf", weights, halve);
  copy(f + "hf", "empty-hf", weights, clear);
  copy(f + "hf", "nan-hf", weights, nan);
  copy(f + "hf", "inf-hf", weights, inf);
  copy(f + "hf", "cut-config", "/config.json", halve);
  copy(f + "hf", "other-config", "/config.json", [](std::string& bytes) {
    bytes.replace(bytes.find("\"vocab_size\": 64"), 16, "\"vocab_size\": 65");
  });
  copy(f + "hf", "no-config", "/config.json", clear);
  fs::remove(f + "no-config/config.json");
  fs::create_directories(f + "nothing");
  fs::create_directories(f + "bad");
  write_part(f + "bad/tokenizer.json", "{\"model\": {\"type\": \"BPE\", \"vo", 99);
  write_part(f + "text.txt", "hello", 5);
  write_part(f + "empty.json", "", 0);
  write_part(f + "empty.bin", "", 0);
  train_words(c);
  std::vector<BadCase> cases = {
      {{"eval"}, "pith eval: model is required"},
      {{"eval", f + "absent"}, "absent: cannot be opened"},
      {{"eval", f + "nothing"}, "nothing: "},
      {{"eval", f + "hf"}, "pith eval: no data"},
      {{"eval", c.run.folder}, "data.heldout_fraction: nothing is held out"},
      {{"eval", good, "--data", f + "empty.bin"}, "empty.bin: is not an NPY array"},
      {{"eval", good, "--batch", "0"}, "--batch"},
      {{"generate"}, "pith generate: model is required"},
      {{"generate", good}, "has no tokenizer.json"},
      {{"generate", good, "--tokenizer", f + "bad"}, "tokenizer.json: is not valid JSON"},
      {{"generate", good, "--tokenizer", f + "empty.json"}, "empty.json: is empty"},
      {{"generate", good, "--tokenizer", std::string(SOURCE_DIR) + "/configs/quickstart"},
          "has a smaller vocabulary than the tokenizer (got 64, need at least 2048)"},
      {{"convert"}, "pith convert: "},
      {{"convert", "sideways", good, f + "out"}, "sideways"},
      {{"convert", "import-hf", f + "nan-hf", f + "out"},
          "1 tensors with NaN or Inf: lm_head.weight"},
      {{"convert", "import-hf", f + "inf-hf", f + "out"},
          "1 tensors with NaN or Inf: lm_head.weight"},
      {{"convert", "import-hf", f + "no-config", f + "out"}, "has no config.json"},
      {{"convert", "export-hf", good, f + "hf"}, "is there already"},
      {{"checkpoint", "polish", good}, "polish"},
      {{"tokenize"}, "pith tokenize: needs --tokenizer, --input and --output"},
      {{"tokenize", "--tokenizer", f + "bad", "--input", f + "text.txt", "--output", f + "out"},
          "tokenizer.json: is not valid JSON"},
      {{"tokenize", "--tokenizer", f + "empty.json", "--input", f + "text.txt", "--output",
           f + "out"},
          "empty.json: is empty"},
      {{"tokenize", "--tokenizer", f + "absent.json", "--input", f + "text.txt", "--output",
           f + "out"},
          "absent.json: cannot be opened"},
      {{"corpus", "inspect", f + "nothing"}, "nothing: "},
      {{"plan"}, "pith plan: "},
      {{"doctor", "more"}, "more"},
      {{"train", f + "run.toml", "--set", "run.folder=" + f + "none-good"},
          "none-good: none of its checkpoints is good"},
  };
  for (const char* name : {"cut-shard", "flipped-shard", "empty-shard", "cut-manifest",
           "flipped-manifest", "empty-manifest", "none-good"}) {
    cases.push_back({{"eval", f + name, "--data", c.data.path}, name});
    cases.push_back({{"convert", "export-hf", f + name, f + "out"}, name});
  }
  for (const char* name :
      {"cut-hf", "empty-hf", "nan-hf", "inf-hf", "cut-config", "other-config", "no-config"}) {
    cases.push_back({{"eval", f + name, "--data", c.data.path}, name});
    if (name == std::string("cut-config") || name == std::string("no-config")) continue;
    if (name == std::string("other-config")) continue;  // training brings its own
    cases.push_back({{"train", f + "run.toml", "--set", "run.folder=" + f + "new", "--set",
                         "model.init_from=" + f + name},
        name});
  }
  expect_refused(c, cases);
}

// ---- from text to a Hugging Face folder ----

TEST(Program, FromTextToAnExportedModel) {
  RunConfig c = tiny(2048);
  const std::string f = folder_of_test(c) + "/", output = output_of_test(c);
  const auto run = [&](const Words& words) {
    const Ran ran = run_pith(words, output);
    EXPECT_EQ(ran.exit_code, kExitDone) << testing::PrintToString(words) << ran.err;
    return ran.out;
  };
  const Json tokens =
      Json::parse(run({"tokenize", "--tokenizer", std::string(SOURCE_DIR) + "/configs/quickstart",
                      "--input", std::string(SOURCE_DIR) + "/src/core", "--format", "text",
                      "--output", f + "tokens", "--json"}),
          "tokenize");
  EXPECT_GT(tokens["tokens"].as_int(), 5000);
  c.data.path = f + "tokens";
  c.data.heldout_fraction = 0.3;
  c.train.eval_interval = 4;
  train_to_end(c);
  const std::string checkpoint = c.run.folder + "/step-00000004";
  run({"convert", "export-hf", c.run.folder, f + "hf", "--dtype", "fp32"});
  EXPECT_EQ(static_cast<int64_t>(open_safetensors(f + "hf").tensors.size()),
      Json::parse(run({"checkpoint", "verify", checkpoint, "--json"}), "json")[0]["tensors"]
              .as_int() /
          3);
  run({"convert", "import-hf", f + "hf", f + "imported"});
  const std::string as_trained = run({"eval", checkpoint, "--json"});
  const Json eval = Json::parse(as_trained, "eval");
  EXPECT_GT(eval["labels"].as_int(), 1000);
  EXPECT_NEAR(eval["perplexity"].as_double(), std::exp(eval["loss"].as_double()), 1e-9);
  EXPECT_GT(eval["bits_per_byte"].as_double(), 1);
  const std::vector<Json> steps = read_metrics(c.run.folder + "/metrics.jsonl");
  EXPECT_NEAR(eval["loss"].as_double(), steps.back()["eval_loss"].as_double(), 1e-5);
  for (const char* name : {"hf", "imported"})
    EXPECT_EQ(run({"eval", f + name, "--json", "--data", c.data.path, "--heldout-fraction", "0.3",
                  "--sequence-length", "32"}),
        as_trained)
        << name;
  const auto generate = [&](const Words& options) {
    Words words = {"generate", checkpoint, "--prompt", "int main", "--max-new-tokens", "20"};
    words.insert(words.end(), options.begin(), options.end());
    return run(words);
  };
  const std::string sample = generate({"--seed", "7", "--temperature", "1"});
  EXPECT_TRUE(sample.starts_with("int main")) << sample;
  EXPECT_EQ(sample, generate({"--seed", "7", "--temperature", "1"}));
  EXPECT_NE(sample, generate({"--seed", "8", "--temperature", "1"}));
  const std::string greedy = generate({"--temperature", "0"});
  EXPECT_EQ(greedy, generate({"--temperature", "0", "--seed", "9"}));
  EXPECT_EQ(greedy, generate({"--temperature", "1", "--top-p", "1e-6", "--seed", "9"}));
}

}  // namespace
}  // namespace pith
