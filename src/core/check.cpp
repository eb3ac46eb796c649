#include "core/check.h"

#include <cstdarg>
#include <cstdio>

#include "core/rank.h"

namespace pith {

string text(const char* format, ...) {
  va_list args, again;
  va_start(args, format);
  va_copy(again, args);
  string out(vsnprintf(nullptr, 0, format, args), '\0');
  va_end(args);
  vsnprintf(out.data(), out.size() + 1, format, again);
  va_end(again);
  return out;
}

void bad_input(const string& place, const string& what, const string& remedy) {
  throw Error(kExitBadInput, place + ": " + what + ". Try: " + remedy);
}

void failed(const string& place, const string& what, const string& remedy) {
  throw Error(kExitFailed, place + ": " + what + (remedy.empty() ? "" : ". Try: " + remedy));
}

string describe(const Tensor& t) {
  if (!t.defined()) return "undefined tensor";
  string s = "[";
  for (int i = 0; i < t.dim.rank; i++) s += (i ? "," : "") + std::to_string(t.dim[i]);
  s += text("] %s %s, ", name_of(t.dtype), name_of(t.device));
  if (t.name[0]) return s + t.name;
  return s + text("made at %s:%d", t.made.file, t.made.line);
}

// Where the rank stands, for the end of an op's error.
static string standing(const Rank& rank) {
  const Status* s = rank.status;
  if (!s || s->layer < 0) return text("rank %d", rank.id);
  return text("rank %d, layer %d, stage %d, micro-batch %d", rank.id, s->layer, s->stage,
              s->micro_batch);
}

void check(const Rank& rank, const char* op, At at, std::initializer_list<Need> needs,
           std::initializer_list<const Tensor*> tensors) {
  if (rank.status) {
    rank.status->op = op;
    rank.status->file = at.file;
    rank.status->line = at.line;
  }
  for (const Need& need : needs) {
    if (need.holds) continue;
    string got;
    for (const Tensor* t : tensors) got += (got.empty() ? "" : "; ") + describe(*t);
    failed(text("%s:%d: %s", at.file, at.line, op),
           text("need %s (got %s; %s)", need.what, got.c_str(), standing(rank).c_str()));
  }
}

}  // namespace pith
