#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "app/commands.h"
#include "core/json.h"
#include "helpers.h"

namespace pith {

namespace fs = std::filesystem;

static Finding finding(const std::vector<Finding>& all, const std::string& name) {
  for (const Finding& f : all)
    if (f.name == name) return f;
  ADD_FAILURE() << "no finding " << name;
  return {};
}

TEST(Doctor, ReadsTheMachine) {
  const std::string meminfo =
      "MemTotal:       8388608 kB\nMemFree: 1 kB\nMemAvailable:  4194304 kB\n";
  struct {
    const char* what;
    std::vector<std::pair<std::string, std::string>> files;
    const char* name;
    bool good;
    const char* value;
  } cases[] = {
      {"no limit", {}, "memory", true, "4.00 GiB available of 8.00 GiB"},
      {"almost full",
       {{"proc/meminfo", "MemTotal:       8388608 kB\nMemAvailable:  51200 kB\n"}},
       "memory",
       false,
       "50.00 MiB available of 8.00 GiB"},
      {"cores", {}, "cores", true, "usable"},
      {"cpu",
       {{"proc/cpuinfo", "processor\t: 0\nmodel name\t: Made Up 9000\n"}},
       "cpu",
       true,
       "Made Up 9000; AVX2, FMA"},
      {"driver",
       {{"proc/driver/nvidia/version",
         "NVRM version: NVIDIA UNIX x86_64  570.1\nGCC version: x\n"}},
       "gpu driver",
       true,
       "NVIDIA UNIX x86_64  570.1"},
  };
  for (const auto& c : cases) {
    const std::string root = fresh_folder("doctor_root");
    fs::create_directories(root + "/proc");
    std::ofstream(root + "/proc/meminfo") << meminfo;
    for (const auto& [path, bytes] : c.files) {
      fs::create_directories(fs::path(root + "/" + path).parent_path());
      std::ofstream(root + "/" + path) << bytes;
    }
    const Finding got = finding(examine_machine(root, root), c.name);
    EXPECT_EQ(got.good, c.good) << c.what << ": " << got.value;
    EXPECT_NE(got.value.find(c.value), std::string::npos) << c.what << ": " << got.value;
  }
}

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
