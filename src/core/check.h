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

// A caller's source position, of the model's line and not the op's: the last parameter of every op.
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
  kExitStopped = 3,   // by a signal, state saved
};

// Its message is final: `PLACE: WHAT (got ..., need ...). Try: ...`.
struct Error : std::runtime_error {
  Error(int code, const string& message) : std::runtime_error(message), exit_code(code) {}
  int exit_code;
};

// printf into a string.
[[gnu::format(printf, 1, 2)]] string text(const char* format, ...);
string vtext(const char* format, va_list args);

// Exit code 2: the user's command, configuration or file is wrong; exit code 1: the run is.
[[noreturn]] void bad_input(const string& place, const string& what, const string& remedy);
[[noreturn]] void failed(const string& place, const string& what, const string& remedy = "");

struct Tensor;
struct Rank;

// One condition of an op's contract: {"x.dim[1] == w.dim[1]", x.dim[1] == w.dim[1]}.
struct Need {
  const char* what;
  bool holds;
};

// An op begins. Throws Error (exit code 1), naming caller, tensors and the rank's place, unless
// every need holds.
void check(const Rank& rank, const char* op, At at, std::initializer_list<Need> needs,
           std::initializer_list<const Tensor*> tensors);
[[noreturn]] void op_failed(const Rank& rank, const char* op, At at, const string& what,
                            const string& got);

}  // namespace pith
