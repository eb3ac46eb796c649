// program: the real `pith`, as a process of its own.
// defines: Words, Ran, start_pith, wait_for, run_pith, wait_until, CallKiller
#pragma once
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "core/json.h"

namespace pith {

using Words = std::vector<std::string>;

struct Ran {
  int exit_code = -1;  // 128 + signal if one ended it
  std::string out, err;
};

// Starts `pith words...`; its output goes to OUTPUT.out and OUTPUT.err. `before` runs in the child.
template <class Before>
pid_t start_pith(const Words& words, const std::string& output, Before before) {
  for (const char* suffix : {".out", ".err"}) unlink((output + suffix).c_str());
  const pid_t pid = fork();
  if (pid != 0) return pid;
  const auto to = [&](int fd, const char* suffix) {
    dup2(open((output + suffix).c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666), fd);
  };
  to(1, ".out");
  to(2, ".err");
  for (const char* name : {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}) setenv(name, "1", 1);
  std::string program = PITH_BINARY;
  std::vector<char*> argv = {program.data()};
  for (const std::string& word : words) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  before();
  execv(PITH_BINARY, argv.data());
  _exit(127);
}
inline pid_t start_pith(const Words& words, const std::string& output) {
  return start_pith(words, output, [] {});
}

inline Ran wait_for(pid_t pid, const std::string& output) {
  int status = 0;
  EXPECT_EQ(waitpid(pid, &status, 0), pid);
  return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status),
      read_text_file(output + ".out"), read_text_file(output + ".err")};
}

inline Ran run_pith(const Words& words, const std::string& output) {
  return wait_for(start_pith(words, output), output);
}

// Waits until `file` holds `part`, for a minute at most.
inline bool wait_until(const std::string& file, const std::string& part) {
  for (int i = 0; i < 30000; i++) {
    if (access(file.c_str(), F_OK) == 0 && read_text_file(file).find(part) != std::string::npos)
      return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return false;
}

// Kills a process after one of its system calls: the k-th, from 1, of the threads that have named a
// path with `mark` in it. Calls about memory, locks and threads do not count.
class CallKiller {
 public:
  CallKiller(pid_t pid, const std::string& mark, int k) : pid_(pid), mark_(mark), k_(k) {}

  static constexpr int kCannotTrace = 126;  // exit code
  // For the child, before it executes.
  static void trace_me() {
    if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(kCannotTrace);
    raise(SIGSTOP);
  }

  // Whether it was killed; false: it ended before, in the way that `status` tells.
  bool run(int& status) {
    if (waitpid(pid_, &status, 0) != pid_ || !WIFSTOPPED(status)) return false;
    ptrace(PTRACE_SETOPTIONS, pid_, nullptr,
        PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACECLONE | PTRACE_O_EXITKILL);
    ptrace(PTRACE_SYSCALL, pid_, nullptr, nullptr);
    for (;;) {
      const pid_t thread = waitpid(-1, &status, __WALL);
      const bool over = WIFEXITED(status) || WIFSIGNALED(status);
      if (thread < 0 || (over && thread == pid_)) return killed_;
      if (over) continue;
      int deliver = WSTOPSIG(status);
      if (deliver == (SIGTRAP | 0x80)) after_call(thread);
      if (deliver == (SIGTRAP | 0x80) || deliver == SIGTRAP || deliver == SIGSTOP) deliver = 0;
      ptrace(PTRACE_SYSCALL, thread, nullptr, deliver);
    }
  }

 private:
  bool names_mark(pid_t thread, uint64_t address) const {
    char path[512] = "";
    const iovec to = {path, sizeof path - 1};
    // The page behind the string's may not be there: then only what is before it is read.
    const size_t here = std::min<size_t>(to.iov_len, 4096 - address % 4096);
    const iovec from[] = {{reinterpret_cast<void*>(address), here},
        {reinterpret_cast<void*>(address + here), to.iov_len - here}};
    return process_vm_readv(thread, &to, 1, from, 2, 0) > 0 &&
           std::string(path).find(mark_) != std::string::npos;
  }

  void after_call(pid_t thread) {
    constexpr uint64_t kPathFirst[] = {SYS_mkdir, SYS_rename, SYS_access, SYS_unlink, SYS_stat};
    constexpr uint64_t kPathSecond[] = {SYS_openat, SYS_newfstatat, SYS_mkdirat, SYS_statx};
    constexpr uint64_t kNoEffect[] = {SYS_futex, SYS_mmap, SYS_munmap, SYS_brk, SYS_mprotect,
        SYS_rseq, SYS_madvise, SYS_exit, SYS_rt_sigprocmask, SYS_clone3, SYS_sched_yield};
    __ptrace_syscall_info info = {};
    ptrace(static_cast<__ptrace_request>(PTRACE_GET_SYSCALL_INFO), thread, sizeof info, &info);
    if (info.op == PTRACE_SYSCALL_INFO_ENTRY) {
      const uint64_t call = info.entry.nr;
      const bool first = std::ranges::count(kPathFirst, call) > 0;
      if (first || std::ranges::count(kPathSecond, call))
        if (names_mark(thread, info.entry.args[first ? 0 : 1])) marked_.insert(thread);
      if (marked_.contains(thread) && !std::ranges::count(kNoEffect, call))
        counting_.insert(thread);
    } else if (counting_.erase(thread) && ++calls_ == k_) {
      killed_ = true;
      kill(pid_, SIGKILL);
    }
  }

  pid_t pid_;
  std::string mark_;
  int k_, calls_ = 0;
  bool killed_ = false;
  std::set<pid_t> marked_, counting_;  // threads; those within a call that counts
};

}  // namespace pith
