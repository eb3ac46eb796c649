// child: this test program again, in a process of its own.
// defines: child_role, Child, run_child
#pragma once
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

namespace pith {

// What run_child() asked of this process; empty in the process that ctest started.
inline std::string child_role() {
  const char* role = getenv("PITH_TEST_CHILD");
  return role ? role : "";
}

struct Child {
  int exit_code = -1;  // 128 + signal if one ended it
  std::string output;  // stdout and stderr
  double seconds = 0;
};

// Runs the current test in a new process, in which child_role() is `role`, a word.
inline Child run_child(const std::string& role) {
  const auto* test = testing::UnitTest::GetInstance()->current_test_info();
  const std::string command =
      "PITH_TEST_CHILD=" + role + " '" + std::filesystem::read_symlink("/proc/self/exe").string() +
      "' '--gtest_filter=" + test->test_suite_name() + "." + test->name() + "' 2>&1";
  const auto began = std::chrono::steady_clock::now();
  Child child;
  FILE* pipe = popen(command.c_str(), "r");
  if (!pipe) return child;
  char part[4096];
  while (const size_t n = fread(part, 1, sizeof part, pipe)) child.output.append(part, n);
  const int status = pclose(pipe);
  child.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  child.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  return child;
}

}  // namespace pith
