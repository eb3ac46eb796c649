#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <cstring>
#include <utility>

#include "core/check.h"
#include "data/tokenizer_parts.h"

namespace pith {

// ---- Oniguruma's patterns as PCRE2's ----

// Oniguruma has Unicode 16; PCRE2's own tables may be older, and its \s and \w differ. So
// properties and these escapes become members of a class.

namespace {
constexpr const char* kSpaces =
    "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}"
    "\\x{205f}\\x{3000}";
// What \w has besides letters, marks and numbers: some of Latin-1, and letters in circles.
constexpr const char* kMoreOfWords =
    "\\x{b2}\\x{b3}\\x{b9}\\x{bc}-\\x{be}\\x{24b6}-\\x{24e9}\\x{1f130}-\\x{1f149}\\x{1f150}-"
    "\\x{1f169}\\x{1f170}-\\x{1f189}";

// Members of a class: what has a general category that starts with `category`.
string in_category(const string& category) {
  string out = "\\p{" + category + "}";
  for (const CategoryRange& range : newer_code_points())
    if (!strncmp(range.category, category.c_str(), category.size()))
      out += text("\\x{%x}-\\x{%x}", range.first, range.last);
  return out;
}

class Translator {
 public:
  Translator(const string& pattern, const string& place) : pattern_(pattern), place_(place) {}

  string run() {
    while (at_ < pattern_.size()) {
      const char c = pattern_[at_];
      if (c == '\\') {
        escape();
      } else if (c == '[') {
        open_class();
      } else if (c == ']' && in_class_) {
        in_class_ = false;
        keep(1);
      } else if (in_class_) {
        if (pattern_.compare(at_, 2, "&&") == 0) refuse("&&");
        keep(1);
      } else if (c == '(' && pattern_.compare(at_, 2, "(?") == 0) {
        group();
      } else if (c == '{') {
        repeat();
      } else {
        keep(1);
      }
    }
    return out_;
  }

 private:
  [[noreturn]] void refuse(const string& what) {
    bad_input(place_, "uses " + what + " in a regular expression, which is not supported",
              "another tokenizer");
  }

  void keep(size_t count) {
    out_ += pattern_.substr(at_, count);
    at_ += count;
  }

  void open_class() {
    if (in_class_) refuse("a class inside a class");
    in_class_ = true;
    keep(pattern_.compare(at_, 2, "[^") == 0 ? 2 : 1);
    if (at_ < pattern_.size() && pattern_[at_] == ']') refuse("a class that starts with ]");
  }

  // (?: (?= (?! (?> (?<= (?<! (?i) (?i: (?-i: and so on; (?m) and (?x) mean other things here.
  void group() {
    static const char* const kSame[] = {
        "(?:", "(?=", "(?!", "(?>", "(?<=", "(?<!", "(?i)", "(?i:", "(?-i)", "(?-i:"};
    for (const char* group : kSame)
      if (pattern_.compare(at_, strlen(group), group) == 0) return keep(strlen(group));
    refuse("the group " + pattern_.substr(at_, 4));
  }

  // {n}, {n,} and {n,m}, not followed by +, which Oniguruma reads as another repetition.
  void repeat() {
    size_t end = at_ + 1;
    while (end < pattern_.size() && (isdigit(pattern_[end]) || pattern_[end] == ',')) end++;
    if (end == at_ + 1 || pattern_[at_ + 1] == ',' || pattern_.compare(end, 1, "}") != 0 ||
        pattern_.compare(end + 1, 1, "+") == 0)
      refuse("the repetition " + pattern_.substr(at_, end + 2 - at_));
    keep(end + 1 - at_);
  }

  void members(const string& inside, bool negated) {
    if (in_class_ && negated) refuse("\\S, \\W, \\D or \\P inside a class");
    out_ += in_class_ ? inside : (negated ? "[^" : "[") + inside + "]";
  }

  void property() {
    const bool negated = pattern_[at_ + 1] == 'P';
    string name = pattern_.substr(at_ + 2, 1);
    size_t size = 3;
    if (name == "{") {
      const size_t end = pattern_.find('}', at_);
      if (end == string::npos) refuse("an unclosed \\p{");
      name = pattern_.substr(at_ + 3, end - at_ - 3);
      size = end + 1 - at_;
    }
    static const char* const kMinors[] = {"Lultmo", "Mnce", "Ndlo", "Pcdseifo", "Smcko", "Zslp"};
    bool known = false;
    for (const char* minors : kMinors)
      known |= minors[0] == name[0] &&
               (name.size() == 1 || (name.size() == 2 && strchr(minors + 1, name[1])));
    if (!known) refuse("\\p{" + name + "}");
    members(in_category(name), negated);
    at_ += size;
  }

  void escape() {
    if (at_ + 1 == pattern_.size()) refuse("a \\ at the end");
    const char c = pattern_[at_ + 1];
    if (c == 'p' || c == 'P') return property();
    const bool is_class = strchr("sSdDwW", c) != nullptr;
    if (!is_class) {
      if (isalnum(static_cast<unsigned char>(c)) && !strchr("rntfaexAz", c))
        refuse(string("\\") + c);
      return keep(2);
    }
    const char lower = char(c | 0x20);
    string inside = lower == 's' ? kSpaces : in_category("Nd");
    if (lower == 'w') inside += kMoreOfWords;
    for (const char* category : {"L", "M", "Nl", "Pc"})
      if (lower == 'w') inside += in_category(category);
    members(inside, c != lower);
    at_ += 2;
  }

  const string& pattern_;
  const string& place_;
  string out_;
  size_t at_ = 0;
  bool in_class_ = false;
};
}  // namespace

string escape_regex(const string& literal) {
  string out;
  for (const char c : literal) {
    if (strchr("\\.+*?()|[]{}^$#&-~", c) && c) out += '\\';
    out += c;
  }
  return out;
}

// ---- matching ----

static string pcre2_message(int code) {
  char message[256] = "";
  pcre2_get_error_message(code, reinterpret_cast<PCRE2_UCHAR*>(message), sizeof message);
  return message;
}

Regex::Regex(const string& pattern, const string& place) : place_(place) {
  const string translated = Translator(pattern, place).run();
  int error = 0;
  PCRE2_SIZE offset = 0;
  // In Ruby's syntax ^ and $ are those of lines, which only \n ends.
  pcre2_compile_context* context = pcre2_compile_context_create(nullptr);
  pcre2_set_newline(context, PCRE2_NEWLINE_LF);
  code_ = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                        PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NO_UTF_CHECK, &error,
                        &offset, context);
  pcre2_compile_context_free(context);
  if (!code_)
    bad_input(place, "has a malformed regular expression: " + pcre2_message(error),
              "fetch the file again");
  auto* code = static_cast<pcre2_code*>(code_);
  jit_ = pcre2_jit_compile(code, PCRE2_JIT_COMPLETE) == 0;
  const uint8_t* bitmap = nullptr;
  pcre2_pattern_info(code, PCRE2_INFO_FIRSTBITMAP, &bitmap);
  for (size_t byte = 0; byte < starts_.size(); byte++)
    starts_[byte] = !bitmap || (bitmap[byte / 8] >> byte % 8 & 1);
}

Regex::Regex(Regex&& o) noexcept
    : code_(std::exchange(o.code_, nullptr)), place_(o.place_), jit_(o.jit_), starts_(o.starts_) {}
Regex::~Regex() { pcre2_code_free(static_cast<pcre2_code*>(code_)); }

MatchData::~MatchData() { pcre2_match_data_free(static_cast<pcre2_match_data*>(data)); }

void Regex::matches(string_view text, MatchData& scratch, vector<Match>& out) const {
  out.clear();
  const auto* code = static_cast<const pcre2_code*>(code_);
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  if (!scratch.data) scratch.data = pcre2_match_data_create(1, nullptr);
  auto* data = static_cast<pcre2_match_data*>(scratch.data);
  const PCRE2_SIZE* found = pcre2_get_ovector_pointer(data);
  size_t from = 0, done = 0;
  bool any = false;
  int result = 0;
  while (from <= text.size()) {
    while (from < text.size() && !starts_[subject[from]]) from++;
    result = PCRE2_ERROR_JIT_STACKLIMIT;
    if (jit_) result = pcre2_jit_match(code, subject, text.size(), from, 0, data, nullptr);
    if (result == PCRE2_ERROR_JIT_STACKLIMIT)
      result = pcre2_match(code, subject, text.size(), from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                           data, nullptr);
    if (result < 0) break;
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
  if (result < 0 && result != PCRE2_ERROR_NOMATCH)
    failed(place_, "the regular expression could not be matched: " + pcre2_message(result));
  if (done < text.size()) out.push_back({done, text.size(), false});
}

}  // namespace pith
