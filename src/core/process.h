// process: the only mutable globals, which signal handlers and callbacks need.
#pragma once
#include "core/rank.h"

namespace pith {

constexpr int kMaxRanks = 256;

Status& status_board(int id);
// "\n  rank 3 runs: step 7, ...", `doing` being " runs"; for signal handlers too. Its length.
size_t status_line(char* out, size_t size, const Status& s, const char* doing);

// SIGINT and SIGTERM ask to stop, the second at once. A crash prints every board.
void install_signal_handlers();
bool stop_requested();
void request_stop();

// What main() does: handles signals, runs `run`, and says on standard error what it failed with.
int run_program(int argc, char** argv, int (*run)(int argc, char** argv));

}
