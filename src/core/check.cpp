#include "core/check.h"

#include "core/rank.h"

namespace pith {

string vtext(const char* format, va_list args) {
  va_list again;
  va_copy(again, args);
  string out(vsnprintf(nullptr, 0, format, again), '\0');
  va_end(again);
  vsnprintf(out.data(), out.size() + 1, format, args);
  return out;
}

string text(const char* format, ...) {
  va_list args;
  va_start(args, format);
  string out = vtext(format, args);
  va_end(args);
  return out;
}

string with_commas(i64 value) {
  string digits = std::to_string(value);
  for (i64 at = i64(digits.size()) - 3; at > (value < 0); at -= 3) digits.insert(at, ",");
  return digits;
}

string duration_text(double seconds) {
  i64 s = std::llround(seconds);
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

void bad_input(const string& place, const string& what, const string& remedy) {
  throw Error(kExitBadInput, place + ": " + what + ". Try: " + remedy);
}

void failed(const string& place, const string& what, const string& remedy) {
  throw Error(kExitFailed, place + ": " + what + (remedy.empty() ? "" : ". Try: " + remedy));
}

void op_failed(const Rank& rank, const char* op, At at, const string& what, const string& got) {
  string where = text("rank %d", rank.id);
  if (const Status* s = rank.status; s && s->micro_batch >= 0)
    where += text(", layer %d, stage %d, micro-batch %d", s->layer, s->stage, s->micro_batch);
  failed(text("%s:%d: %s", at.file, at.line, op), what + " (got " + got + "; " + where + ")");
}

void check(const Rank& rank, const char* op, At at, std::initializer_list<Need> needs,
    std::initializer_list<const Tensor*> tensors) {
  if (rank.status) rank.status->begin(op, at);
  for (const Need& need : needs) {
    if (need.holds) continue;
    string got;
    for (const Tensor* t : tensors) got += (got.empty() ? "" : "; ") + describe(*t);
    op_failed(rank, op, at, string("need ") + need.what, got);
  }
}

}
