#include "core/process.h"

#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <ctime>
#include <mutex>

#include "core/log.h"

namespace pith {

static Status boards[kMaxRanks];
static volatile sig_atomic_t boards_used = 0, stop_asked = 0;
static std::mutex log_mutex;
static FILE* log_file = nullptr;
static bool progress_drawn = false;
static Profile* opened_profiler = nullptr;

Status& status_board(int id) {
  if (id >= boards_used) boards_used = id + 1;
  return boards[id];
}

Profile*& profiler() { return opened_profiler; }
bool stop_requested() { return stop_asked; }
void request_stop() { stop_asked = 1; }

static void on_stop(int signal_number) {
  if (stop_asked) _exit(128 + signal_number);
  stop_asked = 1;
  const char note[] = "\nstopping after this step; again to leave at once\n";
  if (write(2, note, sizeof note - 1) < 0) return;
}

// Fields of a board may be of different moments.
[[gnu::no_sanitize("thread")]] size_t status_line(
    char* out, size_t size, const Status& s, const char* doing) {
  int n = snprintf(out, size,
      "\n  rank %d%s: step %d, layer %d, stage %d, micro-batch %d, last op %s "
      "called at %s:%d%s%s",
      s.rank, doing, s.step, s.layer, s.stage, s.micro_batch, s.op, s.at.file, s.at.line,
      s.waiting[0] ? ", waits in " : "", s.waiting);
  return min(size_t(n), size - 1);
}

static void on_crash(int signal_number) {
  constexpr size_t kLine = 512;
  static char report[(kMaxRanks + 2) * kLine];
  signal(signal_number, SIG_DFL);
  size_t n = snprintf(
      report, kLine, "error: crash: signal %d (%s)", signal_number, sigdescr_np(signal_number));
  for (const Status* s = boards; s < boards + boards_used; s++)
    n += status_line(report + n, kLine, *s, s->thread == gettid() ? " (crashed here)" : "");
  report[n] = '\n';
  [[maybe_unused]] const ssize_t written = write(2, report, n + 1);
  _exit(kExitFailed);
}

void install_signal_handlers() {
  struct sigaction on = {};
  on.sa_handler = on_stop;
  for (const int s : {SIGINT, SIGTERM}) sigaction(s, &on, nullptr);
  on.sa_handler = on_crash;
  for (const int s : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) sigaction(s, &on, nullptr);
  // Failing writes say so by errno.
  for (const int s : {SIGPIPE, SIGXFSZ}) signal(s, SIG_IGN);
}

int run_program(int argc, char** argv, int (*run)(int argc, char** argv)) {
  install_signal_handlers();
  try {
    return run(argc, argv);
  } catch (const Error& e) {
    fprintf(stderr, "error: %s\n", e.what());
    return e.exit_code;
  } catch (const std::exception& e) {
    fprintf(stderr, "error: pith: %s\n", e.what());
  }
  return kExitFailed;
}

static void log_line(const char* level, const char* format, va_list args) {
  const time_t now = time(nullptr);
  tm parts;
  localtime_r(&now, &parts);
  char stamp[32];
  strftime(stamp, sizeof stamp, "%Y-%m-%d %H:%M:%S", &parts);
  string line = text("%s | %s | ", stamp, level) + vtext(format, args) + "\n";
  const std::lock_guard lock(log_mutex);
  fprintf(stderr, "%s%s", progress_drawn ? "\r\033[K" : "", line.c_str());
  progress_drawn = false;
  if (!log_file) return;
  fputs(line.c_str(), log_file);
  fflush(log_file);
}

void log_info(const char* format, ...) {
  va_list args;
  va_start(args, format);
  log_line("INFO", format, args);
  va_end(args);
}

void log_warning(const char* format, ...) {
  va_list args;
  va_start(args, format);
  log_line("WARNING", format, args);
  va_end(args);
}

void log_to_file(const string& path) {
  const std::lock_guard lock(log_mutex);
  if (log_file) fclose(log_file);
  log_file = path.empty() ? nullptr : fopen(path.c_str(), "a");
  if (!log_file && !path.empty())
    failed(path, "cannot be opened for the log", "a folder that can be written to");
}

double now_s() {
  auto t = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(t).count();
}

void Progress::update(double done) {
  bool terminal = isatty(2);
  double now = now_s();
  if (now - last_s < (terminal ? 0.2 : 10.0)) return;
  last_s = now;
  double rate = done / (now - start_s);
  string line = text("%s %.1f", what.c_str(), done);
  if (total > 0) line += text("/%.1f", total);
  line += text(" %s (%.1f/s", unit.c_str(), rate);
  if (total > done && rate > 0) line += ", " + duration_text((total - done) / rate) + " left";
  line += ")";
  if (!terminal) return log_info("%s", line.c_str());
  const std::lock_guard lock(log_mutex);
  fprintf(stderr, "\r\033[K%s", line.c_str());
  progress_drawn = true;
}

}
