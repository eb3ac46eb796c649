// process: the program's only mutable globals, because signal handlers and callbacks need them: the
// stop flag, a status board per rank, the crash handler that prints them, and where log lines go.
#pragma once
#include <cstdio>
#include <mutex>

#include "core/rank.h"

namespace pith {

constexpr int kMaxRanks = 256;

// The status board of rank `id` (of this process). Boards are preallocated and never freed.
Status& status_board(int id);
// Number of boards in use (one more than the highest id asked for).
int status_boards();

// Installs handlers: SIGINT and SIGTERM set the stop flag once (a second one leaves at once with
// 128 + signal); SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT and std::terminate print rank, layer,
// stage, micro-batch and the last op's caller of the thread that crashed, and the other boards, and
// leave with 1.
void install_signal_handlers();
// Tells the crash handler which board belongs to the calling thread.
void set_thread_status(Status* status);

// Where log lines go: one a process, because every rank's thread writes to it. Guarded by `mutex`.
struct LogSink {
  std::mutex mutex;
  FILE* file = nullptr;         // beside standard error, once opened
  bool progress_drawn = false;  // the terminal's last line is to be redrawn
};
LogSink& log_sink();

bool stop_requested();
int stop_signal();    // the signal that asked, or 0
void request_stop();  // as if a signal had asked (tests)

}  // namespace pith
