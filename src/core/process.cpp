#include "core/process.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

namespace pith {

// The globals of this file are the program's only ones; handlers may run at any instruction, so
// what they use is plain words, preallocated.
static Status boards[kMaxRanks];
static pthread_t board_thread[kMaxRanks];
static int boards_used = 0;
static volatile sig_atomic_t stop_signal_number = 0;
static LogSink sink;

LogSink& log_sink() { return sink; }

int status_boards() { return __atomic_load_n(&boards_used, __ATOMIC_RELAXED); }

Status& status_board(int id) {
  if (id < 0 || id >= kMaxRanks) failed("status_board", text("rank %d (need < %d)", id, kMaxRanks));
  if (id >= status_boards()) __atomic_store_n(&boards_used, id + 1, __ATOMIC_RELAXED);
  boards[id].rank = id;
  return boards[id];
}

void set_thread_status(Status* status) { board_thread[status->rank] = pthread_self(); }

bool stop_requested() { return stop_signal_number != 0; }
int stop_signal() { return stop_signal_number; }
void request_stop() { stop_signal_number = SIGTERM; }

static void on_stop(int signal_number) {
  if (stop_signal_number) _exit(128 + signal_number);
  stop_signal_number = signal_number;
  const char note[] = "\nstopping after this step; again to leave at once\n";
  if (write(2, note, sizeof note - 1) < 0) return;
}

// snprintf is not async-signal-safe by the letter, but allocates nothing for these formats; a crash
// report that can fail is better than none.
static void print_boards() {
  for (int i = 0; i < status_boards(); i++) {
    const Status& s = boards[i];
    const bool mine = pthread_equal(board_thread[i], pthread_self());
    char line[512];
    const int n =
        snprintf(line, sizeof line,
                 "  rank %d%s: step %d, layer %d, stage %d, micro-batch %d, last op "
                 "%s called at %s:%d%s%s\n",
                 s.rank, mine ? " (crashed here)" : "", s.step, s.layer, s.stage, s.micro_batch,
                 s.op, s.file, s.line, s.waiting[0] ? ", waiting in " : "", s.waiting);
    if (n > 0 && write(2, line, std::min<size_t>(n, sizeof line - 1)) < 0) return;
  }
}

static void on_crash(int signal_number) {
  signal(signal_number, SIG_DFL);
  char line[128];
  const int n = snprintf(line, sizeof line, "error: crash: signal %d (%s)\n", signal_number,
                         sigdescr_np(signal_number));
  if (n > 0 && write(2, line, n) > 0) print_boards();
  _exit(kExitFailed);
}

static void on_terminate() {
  try {
    if (const std::exception_ptr e = std::current_exception()) std::rethrow_exception(e);
    fprintf(stderr, "error: crash: std::terminate was called\n");
  } catch (const std::exception& e) {
    fprintf(stderr, "error: uncaught exception: %s\n", e.what());
  } catch (...) {
    fprintf(stderr, "error: uncaught exception of unknown type\n");
  }
  print_boards();
  _exit(kExitFailed);
}

void install_signal_handlers() {
  struct sigaction stop = {};
  stop.sa_handler = on_stop;
  sigaction(SIGINT, &stop, nullptr);
  sigaction(SIGTERM, &stop, nullptr);
  // The crash handler runs on its own stack: a stack overflow is a crash too.
  static char alternate[64 * 1024];
  const stack_t stack = {.ss_sp = alternate, .ss_flags = 0, .ss_size = sizeof alternate};
  sigaltstack(&stack, nullptr);
  struct sigaction crash = {};
  crash.sa_handler = on_crash;
  crash.sa_flags = SA_ONSTACK;
  for (const int s : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) sigaction(s, &crash, nullptr);
  std::set_terminate(on_terminate);
  // Writes that fail say so by errno: a file at the size limit as well as a closed pipe.
  signal(SIGPIPE, SIG_IGN);
  signal(SIGXFSZ, SIG_IGN);
}

}  // namespace pith
