// process: the program's only mutable globals, because signal handlers and callbacks need them.
#pragma once
#include <cstdio>
#include <mutex>

#include "core/rank.h"

namespace pith {

constexpr int kMaxRanks = 256;

// The board of rank `id` of this process, never freed.
Status& status_board(int id);
// "\n  rank 3 runs: step 7, layer 2, ..., last op linear called at x.cpp:10", for signal handlers
// too; `doing` follows the number. Returns the length.
size_t status_line(char* out, size_t size, const Status& s, const char* doing);

// SIGINT and SIGTERM set the stop flag; a second one leaves at once with 128 + signal. A crash
// prints every board and leaves with 1.
void install_signal_handlers();
bool stop_requested();
int stop_signal();  // or 0
void request_stop();

struct LogSink {
  std::mutex mutex;
  FILE* file = nullptr;         // beside standard error
  bool progress_drawn = false;  // the terminal's last line is to be redrawn
};
LogSink& log_sink();

}  // namespace pith
