#include "core/log.h"

#include <unistd.h>

#include <chrono>
#include <ctime>

#include "core/process.h"

namespace pith {

static void log_line(const char* level, const string& message) {
  const time_t now = time(nullptr);
  tm parts;
  localtime_r(&now, &parts);
  char stamp[32];
  strftime(stamp, sizeof stamp, "%Y-%m-%d %H:%M:%S", &parts);
  const string line = text("%s | %s | ", stamp, level) + message + "\n";
  LogSink& sink = log_sink();
  const std::lock_guard lock(sink.mutex);
  fprintf(stderr, "%s%s", sink.progress_drawn ? "\r\033[K" : "", line.c_str());
  sink.progress_drawn = false;
  if (!sink.file) return;
  fputs(line.c_str(), sink.file);
  fflush(sink.file);
}

void log_info(const char* format, ...) {
  va_list args;
  va_start(args, format);
  log_line("INFO", vtext(format, args));
  va_end(args);
}

void log_warning(const char* format, ...) {
  va_list args;
  va_start(args, format);
  log_line("WARNING", vtext(format, args));
  va_end(args);
}

void log_to_file(const string& path) {
  LogSink& sink = log_sink();
  const std::lock_guard lock(sink.mutex);
  if (sink.file) fclose(sink.file);
  sink.file = path.empty() ? nullptr : fopen(path.c_str(), "a");
  if (!sink.file && !path.empty())
    failed(path, "cannot be opened for the log", "a folder that can be written to");
}

double now_s() {
  const auto t = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(t).count();
}

void Progress::update(double done, const string& extra) {
  const bool terminal = isatty(2);
  const double now = now_s();
  if (now - last_s_ < (terminal ? 0.2 : 10.0)) return;
  last_s_ = now;
  const double rate = done / (now - start_s_);
  string line = text("%s %.1f", what_.c_str(), done);
  if (total_ > 0) line += text("/%.1f", total_);
  line += text(" %s (%.1f/s", unit_.c_str(), rate);
  if (total_ > done && rate > 0) line += ", " + duration_text((total_ - done) / rate) + " left";
  line += ")" + (extra.empty() ? "" : " " + extra);
  if (!terminal) return log_info("%s", line.c_str());
  LogSink& sink = log_sink();
  const std::lock_guard lock(sink.mutex);
  fprintf(stderr, "\r\033[K%s", line.c_str());
  sink.progress_drawn = true;
}

string with_commas(i64 value) {
  string digits = std::to_string(value);
  for (i64 at = i64(digits.size()) - 3; at > (value < 0); at -= 3) digits.insert(at, ",");
  return digits;
}

string duration_text(double seconds) {
  const i64 s = std::llround(seconds);
  if (s < 60) return text("%ld s", s);
  if (s < 3600) return text("%ld min %ld s", s / 60, s % 60);
  return text("%ld h %ld min", s / 3600, s / 60 % 60);
}

string bytes_text(double bytes) {
  const char* unit[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int i = 0;
  for (; bytes >= 1024 && i < 4; i++) bytes /= 1024;
  return text(i ? "%.2f %s" : "%.0f %s", bytes, unit[i]);
}

}
