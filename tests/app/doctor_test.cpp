#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <regex>

#include "app/commands.h"
#include "core/json.h"
#include "helpers.h"

namespace pith {

namespace fs = std::filesystem;

static int doctor(std::vector<const char*> words, std::string& out) {
  words.insert(words.begin(), "doctor");
  testing::internal::CaptureStdout();
  int code = 0;
  try {
    code = run_doctor(static_cast<int>(words.size()), const_cast<char**>(words.data()));
  } catch (const Error& error) {
    code = error.exit_code;
  }
  out = testing::internal::GetCapturedStdout();
  return code;
}

TEST(Doctor, CommandSaysTheSameInLinesAndJson) {
  const std::string folder = fresh_folder("doctor");
  std::string lines, json;
  EXPECT_EQ(doctor({"--folder", folder.c_str()}, lines), kExitDone) << lines;
  EXPECT_EQ(doctor({"--json", "--folder", folder.c_str()}, json), kExitDone);
  EXPECT_TRUE(fs::is_empty(folder));
  const Json parsed = Json::parse(json, "doctor");
  EXPECT_TRUE(parsed["works"].as_bool());
  for (int64_t i = 0; i < parsed["findings"].size(); i++) {
    const Json f = parsed["findings"][i];
    EXPECT_NE(lines.find("  " + f["name"].as_string() + " "), std::string::npos) << lines;
    EXPECT_FALSE(f["value"].as_string().empty());
  }
  EXPECT_GE(parsed["findings"].size(), 6);
  EXPECT_TRUE(std::regex_search(lines, std::regex("PASS  cores      [0-9]+ usable\n")));
  EXPECT_TRUE(std::regex_search(lines, std::regex("PASS  memory     [0-9.]+ .iB available\n")));
  EXPECT_NE(lines.find("AVX2, FMA\n"), std::string::npos);
  EXPECT_NE(lines.find("PASS  gpu        "), std::string::npos);
}

TEST(Doctor, FailsWhereNothingCanBeWritten) {
  std::string out;
  EXPECT_EQ(doctor({"--folder", "/no/such/folder"}, out), kExitFailed);
  EXPECT_NE(out.find("FAIL  disk       /no/such/folder: cannot be written (No such file or "
                     "directory)\n"),
      std::string::npos)
      << out;
  EXPECT_EQ(doctor({"--folder", "/no/such/folder", "--json"}, out), kExitFailed);
  EXPECT_FALSE(Json::parse(out, "doctor")["works"].as_bool());
  EXPECT_EQ(doctor({"--jsn"}, out), kExitBadInput);
}

}  // namespace pith
