#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>

#include "app/commands.h"
#include "app/plan_schedule.h"
#include "core/json.h"

namespace pith {

namespace {

struct PlanOutput {
  int code = -1;
  std::string out, error;
};

// pith plan with these arguments; what it printed, and the error it ended with.
PlanOutput plan(std::vector<std::string> words) {
  words.insert(words.begin(), "plan");
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  PlanOutput run;
  testing::internal::CaptureStdout();
  try {
    run.code = run_plan(static_cast<int>(argv.size()), argv.data());
  } catch (const Error& e) {
    run.code = e.exit_code;
    run.error = e.what();
  }
  run.out = testing::internal::GetCapturedStdout();
  return run;
}

std::string scratch(const std::string& name) {
  const std::string folder = text("/tmp/pith-plan-test-%d", static_cast<int>(getpid()));
  std::filesystem::create_directories(folder);
  return folder + "/" + name;
}

std::string write(const std::string& name, const std::string& content) {
  const std::string path = scratch(name);
  std::ofstream(path) << content;
  return path;
}

size_t count(const std::string& all, const std::string& part) {
  size_t n = 0;
  for (size_t at = all.find(part); at != std::string::npos; at = all.find(part, at + 1)) n++;
  return n;
}

}  // namespace

TEST(Plan, TimelineInTheTerminal) {
  const PlanOutput dual =
      plan({"--schedule", "--pp", "2", "--micro-batches", "4", "--columns", "90"});
  EXPECT_EQ(dual.code, kExitDone);
  EXPECT_EQ(
      dual.out,
      "dualpipev, pp = 2, 4 micro-batches: bubble 7.7%\n"
      "  26 units of time, 24 of them busy on each rank; at most 5 micro-batches' activations on "
      "a rank, 2 with deferred weight gradients\n"
      "  F forward, B backward, W weight gradients, f b w of chunk 1, F5b3 both at once "
      "(overlapped), . idle; number: micro-batch\n"
      "\n         time 0\n"
      "rank 0  |F0F1F2f0b0..w0f1F3b1--f2B0--b2--..f3B1--b3--B2W2B3W3|  8% idle\n"
      "rank 1  |..F0f0F1f1F2b0--f2B0--F3b1--f3B1--b2--B2--..b3B3w3W3|  8% idle\n");
  const PlanOutput narrow = plan(
      {"--schedule", "--kind", "1f1b", "--pp", "2", "--micro-batches", "4", "--columns", "20"});
  EXPECT_EQ(narrow.out.substr(narrow.out.find("\n\n")),
            "\n\n         time 0\n"
            "rank 0  |F0F1....B0--F2B1|\n"
            "rank 1  |..F0B0--F1B1--F2|\n"
            "\n         time 8\n"
            "rank 0  |--F3B2--..B3--| 20% idle\n"
            "rank 1  |B2--F3B3--....| 20% idle\n");
  // Labels of three characters stand in cells that hold them.
  const PlanOutput wide =
      plan({"--schedule", "--kind", "1f1b", "--pp", "1", "--micro-batches", "12"});
  EXPECT_NE(wide.out.find("F10B10---F11B11---|"), std::string::npos) << wide.out;
}

TEST(Plan, TimelineAsSvg) {
  for (const bool forward_only : {false, true}) {
    const ScheduleOptions o{
        .kind = ScheduleKind::DualPipeV, .pp = 3, .micro_batches = 8, .forward_only = forward_only};
    const std::vector<ActionList> lists = make_schedules(o);
    size_t compute = 0, overlapped = 0;
    for (const ActionList& list : lists)
      for (const Action& a : list) {
        compute += a.what != Do::Send && a.what != Do::Recv;
        overlapped += a.what == Do::FB;
      }
    const std::string svg = draw_svg(o, lists, check_schedule(o, lists));
    EXPECT_EQ(count(svg, "<title>"), compute);
    EXPECT_EQ(count(svg, "class=\"n\""), compute + overlapped);
    EXPECT_EQ(count(svg, "<g>"), count(svg, "</g>"));
    EXPECT_EQ(count(svg, "<text"), count(svg, "</text>"));
    EXPECT_EQ(count(svg, "idle</text>"), 3u + 1);
    EXPECT_EQ(svg.substr(svg.size() - 7), "</svg>\n");
    EXPECT_EQ(count(svg, "href"), 0u);
  }
  const std::string path = scratch("timeline.svg");
  EXPECT_EQ(plan({"--schedule", "--svg", path}).code, kExitDone);
  const std::string written = read_text_file(path);
  EXPECT_EQ(written.rfind("<svg xmlns=\"http://www.w3.org/2000/svg\"", 0), 0u);
  EXPECT_NE(written.find("dualpipev, pp = 4, 10 micro-batches: bubble 9.1%"), std::string::npos);
}

TEST(Plan, Json) {
  const PlanOutput run = plan({"--schedule", "--pp", "2", "--micro-batches", "5", "--json"});
  const Json j = Json::parse(run.out, "plan");
  EXPECT_EQ(j["kind"].as_string(), "dualpipev");
  EXPECT_TRUE(j["ok"].as_bool());
  EXPECT_EQ(j["time"].as_double(), 32);
  EXPECT_EQ(j["busy"].as_double(), 60);
  EXPECT_EQ(j["peak_live"].as_int(), 5);
  EXPECT_EQ(j["ranks"].size(), 2);
  EXPECT_EQ(j["ranks"][1][1]["action"].as_string(), "F0.0");
  EXPECT_EQ(j["ranks"][1][1]["begin"].as_double(), 1);
  EXPECT_EQ(j["ranks"][1][1]["end"].as_double(), 2);
}

// What --lists prints, --check proves.
TEST(Plan, ListsReadBack) {
  const std::vector<std::vector<std::string>> cases = {
      {"--pp", "3", "--micro-batches", "7"},
      {"--kind", "1f1b", "--pp", "4", "--micro-batches", "3", "--weight-grad-batch", "2"},
      {"--pp", "2", "--micro-batches", "3", "--forward-only"},
      {"--kind", "dualpipev", "--pp", "1"},
  };
  for (std::vector<std::string> words : cases) {
    words.insert(words.begin(), {"--schedule"});
    const PlanOutput shown = plan(words);
    words.push_back("--lists");
    const std::string path = write("lists.txt", plan(words).out);
    const PlanOutput checked = plan({"--schedule", "--check", path});
    EXPECT_EQ(checked.code, kExitDone) << checked.error;
    EXPECT_EQ(checked.out, shown.out + "\n" + path + ": right\n");
  }
}

TEST(Plan, FaultyListsAreNamed) {
  const struct {
    const char* lists;
    const char* error;  // behind the file's name
  } cases[] = {
      {"# two ranks\nrank 0\nF0.0\nsend F0.0 > 1  # the activation\nrecv B0.0 < 1\nB0.0\n"
       "\nrank 1\nrecv F0.0 < 0\nF0.0\nsend B0.0 > 0\nB0.0\n",
       ":11: rank 1, action 2 (send B0.0 > 0): B0.0 has not run. Try: pith plan --schedule"},
      {"rank 0\nF0.0\nsend F0.0 > 1\nrecv B0.0 < 1\nB0.0\nrank 1\nrecv F0.0 < 0\nF0.0\nB0.0\n",
       ":9: rank 1, at the end: send B0.0 has not run"},
      {"rank 0\nF0.0\nB0.1\n", ":3: rank 0, action 1 (B0.1): F0.1 has not run"},
      {"rank 0\nF0.0\nrank 2\n", ":3: begins another rank (got \"rank 2\", need \"rank 1\")"},
      {"F0.0\n", ":1: stands before the first rank (got \"F0.0\"). Try: \"rank 0\" as"},
      {"rank 0\nF0.x\n", ":2: is not an action (got \"F0.x\", need one such as F0.3,"},
      {"\n# nothing\n", ": holds no list. Try: pith plan --schedule --lists"},
      {"rank 0\n", ":1: rank 0, at the end: F0.0 has not run"},
  };
  for (const auto& c : cases) {
    const std::string path = write("faulty.txt", c.lists);
    const PlanOutput run = plan({"--schedule", "--check", path, "--svg", scratch("faulty.svg")});
    EXPECT_EQ(run.code, kExitBadInput);
    EXPECT_EQ(run.error.rfind(path + c.error, 0), 0u) << run.error;
    EXPECT_FALSE(std::filesystem::exists(scratch("faulty.svg")));
  }
  const std::string path = write("faulty.txt", cases[0].lists);
  const PlanOutput run = plan({"--schedule", "--check", path, "--json"});
  const Json j = Json::parse(run.out, "plan");
  EXPECT_EQ(run.code, kExitBadInput);
  EXPECT_FALSE(j["ok"].as_bool());
  EXPECT_EQ(j["rank"].as_int(), 1);
  EXPECT_EQ(j["action"].as_int(), 2);
  EXPECT_EQ(j["line"].as_int(), 11);
}

TEST(Plan, WrongUseIsRefused) {
  const struct {
    std::vector<std::string> words;
    const char* error;
  } cases[] = {
      {{}, "pith plan: does not say what to plan (need --schedule)"},
      {{"--schedule", "--pp", "4", "--micro-batches", "7"},
       "schedule: dualpipev at pp = 4 gets too few micro-batches (got 7, need at least 8). Try: "
       "more micro-batches in a step"},
      {{"--schedule", "--kind", "gpipe"}, "--kind"},
      {{"--schedule", "--pp", "0"}, "--pp"},
      {{"--schedule", "--check", "/nowhere/lists.txt"}, "/nowhere/lists.txt"},
  };
  for (const auto& c : cases) {
    const PlanOutput run = plan(c.words);
    EXPECT_EQ(run.code, kExitBadInput) << c.error;
    EXPECT_NE(run.error.find(c.error), std::string::npos) << run.error;
  }
}

}  // namespace pith
