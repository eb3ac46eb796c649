#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <regex>

#include "data/tokenizer.h"

namespace pith {

static constexpr const char* kSpaces =
    "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}"
    "\\x{205f}\\x{3000}";

// Makes classes of \s and categories, for which PCRE2's tables may be too old. Refuses what it may
// read in another way.
static string translate(const string& pattern, const string& place) {
  static const std::regex kOutside(
      R"(\\(?:([pP])\{([LMNPSZ][a-z]?)\}|([sS])|[rntf]|[^a-zA-Z0-9])|\[\^?(?!\])|)"
      R"(\((?!\?)|\(\?(?:[:=!>]|<[=!]|-?i[:)])|\{\d+(?:,\d*)?\}(?!\+)|[^\\\[({])");
  static const std::regex kInClass(
      R"(\\(?:(p)\{([LMNPSZ][a-z]?)\}|(s)|[rntf]|[^a-zA-Z0-9])|&(?!&)|[^\\\[&])");
  string out;
  bool in_class = false;
  std::smatch part;
  for (auto at = pattern.begin(); at != pattern.end(); at = part[0].second) {
    if (!std::regex_search(at, pattern.end(), part, in_class ? kInClass : kOutside,
            std::regex_constants::match_continuous))
      bad_input(place,
          text("has a regular expression that is not supported at byte %zd (got \"%s\")",
              at - pattern.begin(), pattern.c_str()),
          "another tokenizer");
    string got = part[0];
    if (part[1].matched || part[3].matched) {
      string category = part[2];
      string members =
          part[3].matched ? kSpaces : "\\p{" + category + "}" + newer_members(category);
      bool negated = got[1] == 'P' || got[1] == 'S';
      out += in_class ? members : (negated ? "[^" : "[") + members + "]";
    } else {
      out += got;
      in_class = in_class ? got != "]" : got[0] == '[';
    }
  }
  return out;
}

SplitStep::SplitStep(const string& pattern, const string& place)
    : fast(fast_word_end(pattern)), place_(place) {
  string translated = translate(pattern, place_);
  int error = 0;
  PCRE2_SIZE offset = 0;
  // In Ruby's syntax ^ and $ are those of lines, which only \n ends.
  pcre2_compile_context* context = pcre2_compile_context_create(nullptr);
  pcre2_set_newline(context, PCRE2_NEWLINE_LF);
  pcre2_code* code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
          PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NO_UTF_CHECK, &error, &offset, context);
  pcre2_compile_context_free(context);
  code_.reset(code, pcre2_code_free);
  u32 may_be_empty = 0;
  if (code) pcre2_pattern_info(code, PCRE2_INFO_MATCHEMPTY, &may_be_empty);
  if (!code || may_be_empty)
    bad_input(place_,
        text("has a regular expression that is malformed or matches nothing (PCRE2 error %d "
             "at byte %zu)",
            error, offset),
        "fetch the file again");
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);  // which pcre2_match uses, if it succeeds
}

void SplitStep::split(
    string_view text, std::shared_ptr<void>& room, vector<string_view>& words) const {
  while (fast && !text.empty()) {
    words.emplace_back(text.begin(), fast(text.begin(), text.end()));
    text.remove_prefix(words.back().size());
  }
  if (text.empty()) return;
  if (!room) room.reset(pcre2_match_data_create(1, nullptr), pcre2_match_data_free);
  auto* data = static_cast<pcre2_match_data*>(room.get());
  const PCRE2_SIZE* found = pcre2_get_ovector_pointer(data);
  size_t done = 0;
  auto match = [&](u32 options) {
    return pcre2_match(static_cast<const pcre2_code*>(code_.get()),
        reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), done, PCRE2_NO_UTF_CHECK | options,
        data, nullptr);
  };
  while (done < text.size()) {
    int result = match(0);
    if (result == PCRE2_ERROR_JIT_STACKLIMIT) result = match(PCRE2_NO_JIT);
    if (result == PCRE2_ERROR_NOMATCH) break;
    if (result < 0)
      failed(place_, pith::text("a regular expression cannot be matched (PCRE2 error %d)", result));
    if (done < found[0]) words.push_back(text.substr(done, found[0] - done));
    words.push_back(text.substr(found[0], found[1] - found[0]));
    done = found[1];
  }
  if (done < text.size()) words.push_back(text.substr(done));
}

}
