// process: the program's only mutable globals, because signal handlers and callbacks need them.
#pragma once
#include <cstdio>
#include <mutex>

#include "core/rank.h"

namespace pith {

constexpr int kMaxRanks = 256;

// The status board of rank `id` of this process: preallocated, never freed.
Status& status_board(int id);
// Tells the crash handler that the board is the calling thread's.
void set_thread_status(Status* status);
// "  rank 3 DOING: step 7, layer 2, ..., last op linear called at x.cpp:10WAITING\n", in `out`, cut
// to `size`; returns its length. For signal handlers too.
size_t status_line(char* out, size_t size, const Status& s, const char* doing,
                   const char* waiting = "");

// SIGINT and SIGTERM set the stop flag once; a second one leaves at once with 128 + signal. Crashes
// and std::terminate print every board and leave with 1.
void install_signal_handlers();
bool stop_requested();
int stop_signal();    // the signal that asked, or 0
void request_stop();  // as if a signal had asked (tests)

// Where log lines go. Guarded by `mutex`.
struct LogSink {
  std::mutex mutex;
  FILE* file = nullptr;         // beside standard error, once opened
  bool progress_drawn = false;  // the terminal's last line is to be redrawn
};
LogSink& log_sink();

}  // namespace pith
