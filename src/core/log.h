// log: one line on the terminal and in the run's log.txt; never from two threads at once.
#pragma once
#include "core/check.h"

namespace pith {

// "2026-11-22 10:00:00 | INFO | ..." on standard error and, once opened, in the log file.
[[gnu::format(printf, 1, 2)]] void log_info(const char* format, ...);
[[gnu::format(printf, 1, 2)]] void log_warning(const char* format, ...);

// Appends later lines to `path` too, until called with "".
void log_to_file(const string& path);

// Seconds of a monotonic clock.
double now_s();

// Of long work: on a terminal one line that is redrawn, else a plain line every 10 s. A total of 0
// is unknown.
class Progress {
 public:
  Progress(string what, double total, string unit);
  void update(double done, const string& extra = "");

 private:
  string what_, unit_;
  double total_, start_s_, last_s_;
};

// "1,234,567"; "3 min 20 s"; "1.50 GiB".
string with_commas(int64_t value);
string duration_text(double seconds);
string bytes_text(double bytes);

}  // namespace pith
