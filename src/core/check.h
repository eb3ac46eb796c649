// check: where code was called from, the one form of every error, and its exit code.
// defines: At, Error, text, bad_input, failed, check
#pragma once
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

// Exit codes of the program.
enum ExitCode : int {
  kExitDone = 0,      // the work was finished
  kExitFailed = 1,    // failed while running: disk full, NaN, lost rank
  kExitBadInput = 2,  // bad usage, configuration or input
  kExitStopped = 3,   // stopped early by a signal, state saved
};

// An error that reached its final wording, `PLACE: WHAT (got ..., need ...). Try: ...`; main prints
// it behind "error: " and leaves with `exit_code`.
class Error : public std::runtime_error {
 public:
  Error(int code, const string& message) : std::runtime_error(message), exit_code(code) {}
  int exit_code;
};

// printf into a string; the compiler checks the arguments against the format.
[[gnu::format(printf, 1, 2)]] string text(const char* format, ...);

// Throws Error with exit code 2: the user's command, configuration or file is wrong. `place` is the
// file, key, or command; `what` ends in "(got ..., need ...)" where there are values; `remedy` is
// one thing to try.
[[noreturn]] void bad_input(const string& place, const string& what, const string& remedy);

// Throws Error with exit code 1: the input was fine, the run was not.
[[noreturn]] void failed(const string& place, const string& what, const string& remedy = "");

struct Tensor;
struct Rank;

// One condition of an op's contract, with its wording: {"x.dim[1] == w.dim[1]", x.dim[1] == ...}.
struct Need {
  const char* what;
  bool holds;
};

// Throws Error (exit code 1) unless every need holds. The message names the caller's file:line, the
// op, the need, each tensor's shape, dtype, device and where it was made, and the rank, layer,
// stage and micro-batch.
void check(const Rank& rank, const char* op, At at, std::initializer_list<Need> needs,
           std::initializer_list<const Tensor*> tensors);

}  // namespace pith
