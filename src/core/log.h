#pragma once
#include "core/check.h"

namespace pith {

// On standard error and, once opened, in the log file.
[[gnu::format(printf, 1, 2)]] void log_info(const char* format, ...);
[[gnu::format(printf, 1, 2)]] void log_warning(const char* format, ...);

void log_to_file(const string& path);

double now_s();

// Redrawn on a terminal, else a line every 10 s. A total of 0 is unknown.
struct Progress {
  string what;
  double total;
  string unit;
  double start_s = now_s(), last_s = start_s;
  void update(double done);
};

}
