// check: where code was called from, the one form of every error, and its exit code.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace pith {

using std::string, std::string_view, std::vector;

// A caller's source position. Every op ends in a defaulted parameter `At at = At::here()`, so that
// its errors name the line of the model, not of the op.
struct At {
  const char* file = "";
  int line = 0;
  static constexpr At here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

enum ExitCode : int {
  kExitDone = 0,
  kExitFailed = 1,    // while running: disk full, NaN, lost rank
  kExitBadInput = 2,  // bad usage, configuration or input
  kExitStopped = 3,   // stopped early by a signal, state saved
};

// Its message is final, `PLACE: WHAT (got ..., need ...). Try: ...`.
class Error : public std::runtime_error {
 public:
  Error(int code, const string& message) : std::runtime_error(message), exit_code(code) {}
  int exit_code;
};

// printf into a string.
[[gnu::format(printf, 1, 2)]] string text(const char* format, ...);
string vtext(const char* format, va_list args);

// The user's command, configuration or file is wrong (exit code 2), or the run went wrong (1).
[[noreturn]] void bad_input(const string& place, const string& what, const string& remedy);
[[noreturn]] void failed(const string& place, const string& what, const string& remedy = "");

struct Tensor;
struct Rank;

// One condition of an op's contract, with its wording: {"x.dim[1] == w.dim[1]", x.dim[1] == ...}.
struct Need {
  const char* what;
  bool holds;
};

// An op begins: noted on the status board. Throws Error (exit code 1) unless every need holds; the
// message names caller, op, need, tensors, and where the rank stands.
void check(const Rank& rank, const char* op, At at, std::initializer_list<Need> needs,
           std::initializer_list<const Tensor*> tensors);
// The same form of error for what `op` finds later; `got` says what it met.
[[noreturn]] void op_failed(const Rank& rank, const char* op, At at, const string& what,
                            const string& got);

}  // namespace pith
