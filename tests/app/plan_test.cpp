#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <regex>
#include <sstream>

#include "app/commands.h"
#include "core/json.h"
#include "engine/schedule.h"

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

size_t count(const std::string& all, const std::string& part) {
  size_t n = 0;
  for (size_t at = all.find(part); at != std::string::npos; at = all.find(part, at + 1)) n++;
  return n;
}

}  // namespace

TEST(Plan, TimelineInTheTerminal) {
  const PlanOutput dual = plan({"--schedule", "--pp", "2", "--micro-batches", "4"});
  EXPECT_EQ(dual.code, kExitDone);
  EXPECT_EQ(dual.out,
      "dualpipev, pp = 2, 4 micro-batches: bubble 7.7%\n"
      "  26 units of time, 24 of them busy on each rank; at most 5 micro-batches' activations on "
      "a rank\n"
      "  F forward, B backward, W weight gradients, f b w of chunk 1, F5b3 both at once "
      "(overlapped), . idle; number: micro-batch\n"
      "\n         time 0\n"
      "rank 0  |F0F1F2f0b0..w0f1F3b1--f2B0--b2--..f3B1--b3--B2W2B3W3|\n"
      "rank 1  |..F0f0F1f1F2b0--f2B0--F3b1--f3B1--b2--B2--..b3B3w3W3|\n");
  // Long ones are cut; labels of three characters stand in cells that hold them.
  const PlanOutput wide =
      plan({"--schedule", "--kind", "1f1b", "--pp", "1", "--micro-batches", "12"});
  EXPECT_EQ(wide.out.substr(wide.out.find("\n\n")),
      "\n\n         time 0\n"
      "rank 0  |F0-B0----F1-B1----F2-B2----F3-B3----F4-B4----F5-B5----F6-B6----F7-B7----"
      "F8-B8----F9-|\n"
      "\n         time 28\n"
      "rank 0  |B9----F10B10---F11B11---|\n");
}

// It shows what the terminal does.
TEST(Plan, TimelineAsSvg) {
  const std::string path = scratch("timeline.svg");
  const PlanOutput shown = plan({"--schedule", "--pp", "3", "--micro-batches", "8", "--svg", path});
  EXPECT_EQ(shown.code, kExitDone);
  const std::string svg = read_text_file(path);
  EXPECT_TRUE(svg.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\""));
  EXPECT_TRUE(svg.ends_with("</svg>\n"));
  EXPECT_EQ(count(svg, "<text"), count(svg, "</text>"));
  EXPECT_EQ(count(svg, "href"), 0u);
  // Without its tags, and cut as for a terminal.
  const std::string bare =
      std::regex_replace(svg.substr(svg.find("<text")), std::regex("<[^>]*>"), "");
  std::istringstream rows(bare);
  int ranks = 0;
  for (std::string row; std::getline(rows, row);) {
    EXPECT_NE(shown.out.find(row.substr(0, 85)), std::string::npos) << row;
    ranks += row.starts_with("rank ");
  }
  EXPECT_EQ(ranks, 3);
}

// The actions of the schedule, with the times of the picture.
TEST(Plan, ListsAsJson) {
  const PlanOutput run = plan({"--schedule", "--pp", "2", "--micro-batches", "4", "--json"});
  ASSERT_EQ(run.code, kExitDone) << run.error;
  const Json all = Json::parse(run.out, "plan");
  EXPECT_EQ(all["kind"].as_string(), "dualpipev");
  EXPECT_EQ(all["time"].as_int(), 26);
  EXPECT_NEAR(all["bubble"].as_double(), 1 - 24.0 / 26, 1e-12);
  const auto lists = make_schedules({.kind = ScheduleKind::DualPipeV, .pp = 2, .micro_batches = 4});
  ASSERT_EQ(all["ranks"].size(), 2);
  for (int r = 0; r < 2; r++) {
    ASSERT_EQ(all["ranks"][r].size(), static_cast<int64_t>(lists[r].size()));
    for (int i = 0, now = 0; i < all["ranks"][r].size(); i++) {
      const Json action = all["ranks"][r][i];
      EXPECT_EQ(action["action"].as_string(), to_text(lists[r][i]));
      if (!action.has("begin")) continue;
      EXPECT_GE(action["begin"].as_int(), now);
      now = int(action["begin"].as_int() + action["duration"].as_int());
      EXPECT_LE(now, 26);
    }
  }
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
  };
  for (const auto& c : cases) {
    const PlanOutput run = plan(c.words);
    EXPECT_EQ(run.code, kExitBadInput) << c.error;
    EXPECT_NE(run.error.find(c.error), std::string::npos) << run.error;
  }
}

}  // namespace pith
