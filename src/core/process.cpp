#include "core/process.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>

namespace pith {

// Handlers may run at any instruction: what they use is plain words, preallocated.
static Status boards[kMaxRanks];
static pthread_t board_thread[kMaxRanks];
static int boards_used = 0;  // one more than the highest id asked for
static volatile sig_atomic_t stop_signal_number = 0;
static LogSink sink;

LogSink& log_sink() { return sink; }

Status& status_board(int id) {
  if (id < 0 || id >= kMaxRanks) failed("status_board", text("rank %d (need < %d)", id, kMaxRanks));
  if (id >= __atomic_load_n(&boards_used, __ATOMIC_RELAXED))
    __atomic_store_n(&boards_used, id + 1, __ATOMIC_RELAXED);
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

// snprintf is not async-signal-safe by the letter, but allocates nothing for these formats. Fields
// of a board that is being written can be of different moments; each is whole.
[[gnu::no_sanitize("thread")]] size_t status_line(char* out, size_t size, const Status& s,
                                                  const char* doing, const char* waiting) {
  const int n = snprintf(out, size,
                         "  rank %d%s: step %d, layer %d, stage %d, micro-batch %d, last op %s "
                         "called at %s:%d%s\n",
                         s.rank, doing, s.step, s.layer, s.stage, s.micro_batch, s.op, s.at.file,
                         s.at.line, waiting);
  return std::min(size_t(std::max(n, 0)), size - 1);
}

static void print_boards() {
  for (int i = 0; i < boards_used; i++) {
    const Status& s = boards[i];
    char waiting[128] = "", line[512];
    if (s.waiting[0]) snprintf(waiting, sizeof waiting, ", waiting in %s", s.waiting);
    const bool mine = pthread_equal(board_thread[i], pthread_self());
    const size_t n = status_line(line, sizeof line, s, mine ? " (crashed here)" : "", waiting);
    if (write(2, line, n) < 0) return;
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
