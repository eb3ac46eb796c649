#pragma once
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace pith {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i64 = std::int64_t;
using std::max, std::min, std::string, std::string_view, std::vector;

// The model's line that called an op.
struct At {
  const char* file = "";
  int line = 0;
  static constexpr At here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

enum ExitCode : int {
  kExitDone = 0,
  kExitFailed = 1,
  kExitBadInput = 2,
  kExitStopped = 3,
};

struct Error : std::runtime_error {
  Error(int code, const string& message) : std::runtime_error(message), exit_code(code) {}
  int exit_code;
};

[[gnu::format(printf, 1, 2)]] string text(const char* format, ...);
string vtext(const char* format, va_list args);
// "1,234,567"; "3 min 20 s"; "1.50 GiB".
string with_commas(i64 value);
string duration_text(double seconds);
string bytes_text(double bytes);

[[noreturn]] void bad_input(const string& place, const string& what, const string& remedy);
[[noreturn]] void failed(const string& place, const string& what, const string& remedy = "");

struct Tensor;
struct Rank;

struct Need {
  const char* what;
  bool holds;
};

// failed() unless every need holds.
void check(const Rank& rank, const char* op, At at, std::initializer_list<Need> needs,
    std::initializer_list<const Tensor*> tensors);
[[noreturn]] void op_failed(
    const Rank& rank, const char* op, At at, const string& what, const string& got);

}
