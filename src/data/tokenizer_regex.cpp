#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "data/tokenizer_parts.h"

namespace pith {

// Oniguruma has Unicode 16; PCRE2's own tables may be older, and its \s and \w differ. So
// properties, \s, \d and \w become members of a class.

// Members of a class: what has a general category that starts with `category`.
static string in_category(const string& category) {
  string out = "\\p{" + category + "}";
  for (const NewerCodes& newer : newer_codes()) {
    if (!string_view(newer.category).starts_with(category)) continue;
    out += "\\x{";
    for (const char* c = newer.ranges; *c; c++)
      out += *c == ' ' ? "}\\x{" : *c == '-' ? "}-\\x{" : string(1, *c);
    out += "}";
  }
  return out;
}

static constexpr const char* kSpaces =
    "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}"
    "\\x{205f}\\x{3000}";

// What \w has besides letters, marks and numbers: some of Latin-1, and letters in circles.
static constexpr const char* kMoreOfWords =
    "\\x{b2}\\x{b3}\\x{b9}\\x{bc}-\\x{be}\\x{24b6}-\\x{24e9}\\x{1f130}-\\x{1f149}\\x{1f150}-"
    "\\x{1f169}\\x{1f170}-\\x{1f189}";

static string translate(const string& pattern, const string& place) {
  static const char* const kGroups[] = {
      "(?:", "(?=", "(?!", "(?>", "(?<=", "(?<!", "(?i)", "(?i:", "(?-i)", "(?-i:"};
  string out;
  bool in_class = false;
  for (size_t at = 0, size = 1; at < pattern.size(); at += size) {
    const string_view rest = string_view(pattern).substr(at);
    const char c = rest[0], next = rest.size() > 1 ? rest[1] : '\0';
    const auto refuse = [&](size_t length) {
      bad_input(place,
                "uses " + string(rest.substr(0, length)) +
                    " in a regular expression, which is not supported",
                "another tokenizer");
    };
    string members;  // of a class, that stand for an escape
    bool negated = false;
    size = 1;
    if (c == '\\') {
      size = 2;
      if (next == 'p' || next == 'P') {
        const bool braces = rest.substr(2).starts_with("{");
        size = braces ? rest.find('}') + 1 : 3;
        if (rest.size() < size || size < (braces ? 5 : 3)) refuse(3);
        const string name(braces ? rest.substr(3, size - 4) : rest.substr(2, 1));
        if (name.size() > 2 || !strchr("LMNPSZ", name[0]) ||
            (name.size() == 2 && !strchr("ultmoncedsifkp", name[1])))
          refuse(size);
        members = in_category(name);
        negated = next == 'P';
      } else if (next && strchr("sSdDwW", next)) {
        const char lower = char(next | 0x20);
        members = lower == 's' ? kSpaces : in_category("Nd");
        for (const char* category : {"L", "M", "Nl", "Pc"})
          if (lower == 'w') members += in_category(category);
        if (lower == 'w') members += kMoreOfWords;
        negated = isupper(next);
      } else if (!next || (isalnum(u8(next)) && !strchr("rntfaexAz", next))) {
        refuse(2);
      }
    } else if (in_class) {
      if (c == '[' || rest.starts_with("&&")) refuse(2);
      in_class = c != ']';
    } else if (c == '[') {
      in_class = true;
      size = next == '^' ? 2 : 1;
      if (rest.substr(size).starts_with("]")) refuse(size + 1);
    } else if (rest.starts_with("(?")) {
      size = 0;
      for (const char* group : kGroups)
        if (rest.starts_with(group)) size = strlen(group);
      if (!size) refuse(4);
    } else if (c == '{') {
      // {n}, {n,} and {n,m}, not followed by +, which Oniguruma reads as another repetition.
      size = rest.find_first_not_of("0123456789,", 1) + 1;
      if (size < 3 || next == ',' || rest[size - 1] != '}' || rest.substr(size).starts_with("+"))
        refuse(size + 1);
    }
    if (members.empty())
      out += rest.substr(0, size);
    else if (in_class && negated)
      refuse(size);
    else
      out += in_class ? members : (negated ? "[^" : "[") + members + "]";
  }
  return out;
}

Regex::Regex(const string& pattern, const string& place) : place_(place) {
  const string translated = translate(pattern, place);
  int error = 0;
  PCRE2_SIZE offset = 0;
  // In Ruby's syntax ^ and $ are those of lines, which only \n ends.
  pcre2_compile_context* context = pcre2_compile_context_create(nullptr);
  pcre2_set_newline(context, PCRE2_NEWLINE_LF);
  pcre2_code* code = pcre2_compile(
      reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
      PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NO_UTF_CHECK, &error, &offset, context);
  pcre2_compile_context_free(context);
  if (!code)
    bad_input(
        place,
        text("has a malformed regular expression (PCRE2 error %d at byte %zu)", error, offset),
        "fetch the file again");
  code_.reset(code, pcre2_code_free);
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);  // which pcre2_match uses, if it succeeds
  const u8* bitmap = nullptr;
  pcre2_pattern_info(code, PCRE2_INFO_FIRSTBITMAP, &bitmap);
  may_be_empty_ = !bitmap;
  for (size_t byte = 0; byte < starts_.size(); byte++)
    starts_[byte] = !bitmap || (bitmap[byte / 8] >> byte % 8 & 1);
}

void Regex::matches(string_view text, std::shared_ptr<void>& room, vector<Match>& out) const {
  out.clear();
  if (!room) room.reset(pcre2_match_data_create(1, nullptr), pcre2_match_data_free);
  const auto* code = static_cast<const pcre2_code*>(code_.get());
  auto* data = static_cast<pcre2_match_data*>(room.get());
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  const PCRE2_SIZE* found = pcre2_get_ovector_pointer(data);
  size_t from = 0, done = 0;
  const auto match = [&](u32 options) {
    return pcre2_match(code, subject, text.size(), from, options, data, nullptr);
  };
  for (bool any = false;;) {
    while (from < text.size() && !starts_[subject[from]]) from++;
    if (from > text.size() || (from == text.size() && !may_be_empty_)) break;
    int result = match(PCRE2_NO_UTF_CHECK);
    if (result == PCRE2_ERROR_JIT_STACKLIMIT) result = match(PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT);
    if (result == PCRE2_ERROR_NOMATCH) break;
    if (result < 0)
      failed(place_,
             pith::text("a regular expression could not be matched (PCRE2 error %d)", result));
    const size_t begin = found[0], end = found[1];
    // An empty match right behind the last one does not count.
    if (begin == end && any && end == done) {
      from = end + (end < text.size() ? decode_char(text.data() + end).size : 1);
      continue;
    }
    if (done < begin) out.push_back({done, begin, false});
    out.push_back({begin, end, true});
    from = done = end;
    any = true;
  }
  if (done < text.size()) out.push_back({done, text.size(), false});
}

}
