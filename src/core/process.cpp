#include "core/process.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <new>

namespace pith {

static Status boards[kMaxRanks];
static volatile sig_atomic_t boards_used = 0, stop_signal_number = 0;
static LogSink sink;

LogSink& log_sink() { return sink; }

Status& status_board(int id) {
  if (id >= boards_used) boards_used = id + 1;
  return boards[id];
}

bool stop_requested() { return stop_signal_number != 0; }
int stop_signal() { return stop_signal_number; }
void request_stop() { stop_signal_number = SIGTERM; }

static void on_stop(int signal_number) {
  if (stop_signal_number) _exit(128 + signal_number);
  stop_signal_number = signal_number;
  const char note[] = "\nstopping after this step; again to leave at once\n";
  if (write(2, note, sizeof note - 1) < 0) return;
}

// Fields of a board may be of different moments.
[[gnu::no_sanitize("thread")]] size_t status_line(char* out, size_t size, const Status& s,
                                                  const char* doing) {
  const int n = snprintf(out, size,
                         "\n  rank %d%s: step %d, layer %d, stage %d, micro-batch %d, last op %s "
                         "called at %s:%d%s%s",
                         s.rank, doing, s.step, s.layer, s.stage, s.micro_batch, s.op, s.at.file,
                         s.at.line, s.waiting[0] ? ", waits in " : "", s.waiting);
  return min(size_t(n), size - 1);
}

[[noreturn]] static void crash(const char* what, const char* detail) {
  constexpr size_t kLine = 512;
  static char report[(kMaxRanks + 2) * kLine];
  size_t n = snprintf(report, kLine, "error: crash: %.200s%.200s", what, detail);
  for (const Status* s = boards; s < boards + boards_used; s++)
    n += status_line(report + n, kLine, *s, s->thread == gettid() ? " (crashed here)" : "");
  report[n] = '\n';
  [[maybe_unused]] const ssize_t written = write(2, report, n + 1);
  _exit(kExitFailed);
}

static void on_crash(int signal_number) {
  char what[64];
  signal(signal_number, SIG_DFL);
  snprintf(what, sizeof what, "signal %d (%s)", signal_number, sigdescr_np(signal_number));
  crash(what, "");
}

static void on_terminate() {
  try {
    if (std::current_exception()) throw;
  } catch (const std::exception& e) {
    crash("uncaught exception: ", e.what());
  } catch (...) {
  }
  crash("std::terminate was called", "");
}

void install_signal_handlers() {
  struct sigaction stop = {};
  stop.sa_handler = on_stop;
  for (const int s : {SIGINT, SIGTERM}) sigaction(s, &stop, nullptr);
  // For a stack overflow.
  static char alternate[64 * 1024];
  const stack_t stack = {.ss_sp = alternate, .ss_flags = 0, .ss_size = sizeof alternate};
  sigaltstack(&stack, nullptr);
  struct sigaction on = {};
  on.sa_handler = on_crash;
  on.sa_flags = SA_ONSTACK;
  for (const int s : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) sigaction(s, &on, nullptr);
  std::set_terminate(on_terminate);
  // Failing writes say so by errno.
  for (const int s : {SIGPIPE, SIGXFSZ}) signal(s, SIG_IGN);
}

int run_program(const char* name, int argc, char** argv, int (*run)(int argc, char** argv)) {
  install_signal_handlers();
  try {
    return run(argc, argv);
  } catch (const Error& e) {
    fprintf(stderr, "error: %s\n", e.what());
    return e.exit_code;
  } catch (const std::bad_alloc&) {
    fprintf(stderr, "error: %s: out of memory. Try: a smaller input or batch\n", name);
  } catch (const std::exception& e) {
    fprintf(stderr, "error: %s: %s\n", name, e.what());
  }
  return kExitFailed;
}

}
