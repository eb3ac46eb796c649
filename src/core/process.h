// The only mutable globals, which signal handlers need.
#pragma once
#include "core/rank.h"

namespace pith {

constexpr int kMaxRanks = 256;

Status& status_board(int id);
// `doing`: " runs". For signal handlers too. Returns its length.
size_t status_line(char* out, size_t size, const Status& s, const char* doing);

// SIGINT and SIGTERM ask to stop, the second at once. A crash prints every board.
void install_signal_handlers();
bool stop_requested();
void request_stop();

struct Profile;
Profile*& profiler();  // for CUPTI's callbacks; null without --profile-step

// Handles signals; says on standard error what `run` failed with.
int run_program(int argc, char** argv, int (*run)(int argc, char** argv));

}
