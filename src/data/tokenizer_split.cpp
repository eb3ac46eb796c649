#include "data/tokenizer.h"

namespace pith {

namespace {
constexpr const char* kO200k =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+)"
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)?|)"
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*)"
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)?|)"
    R"(\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

// Each pattern's function returns the end of the word at `p`.
struct Splitter {
  const u16* flags;
  const char* end;

  // 0 and 0 at the end of the text.
  Char at(const char* p) const {
    if (p >= end) return {0, 0};
    if (u8(*p) < 0x80) return {flags[u8(*p)], 1};
    const Char c = decode_char(p);
    return {flags[c.code], c.size};
  }

  // The end of the characters with a flag of `mask`, or without any.
  const char* run(const char* p, u32 mask) const {
    for (Char c; (c = at(p)).code & mask;) p += c.size;
    return p;
  }
  const char* run_without(const char* p, u32 mask) const {
    for (Char c; !((c = at(p)).code & mask) && c.size;) p += c.size;
    return p;
  }

  static bool is_newline(const char* p) { return *p == '\n' || *p == '\r'; }
  // [\r\n]*, or [\r\n/]*
  const char* newlines(const char* p, bool slash = false) const {
    while (p < end && (is_newline(p) || (slash && *p == '/'))) p++;
    return p;
  }
  // (?i:'s|'t|'re|'ve|'m|'ll|'d), which knows the long s too; `p` if there is none.
  const char* contraction(const char* p) const {
    if (end - p < 2 || *p != '\'') return p;
    char a = char(p[1] | 0x20);
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return p + 2;
    if (end - p < 3) return p;
    char b = char(p[2] | 0x20);
    bool two = ((a == 'r' || a == 'v') && b == 'e') || (a == 'l' && b == 'l');
    return two || (p[1] == '\xc5' && p[2] == '\xbf') ? p + 3 : p;
  }
  // \s*[\r\n]+|\s+(?!\S)|\s+
  const char* spaces(const char* p) const {
    const char *q = p, *last = p, *line_end = nullptr;
    for (Char c; (c = at(q)).code & kSpace;) {
      last = q;
      q += c.size;
      if (is_newline(last)) line_end = q;
    }
    if (line_end) return line_end;
    return q == end || last == p ? q : last;
  }

  // \p{N}{1,most}
  const char* digits(const char* p, int most) const {
    for (Char c; most-- > 0 && (c = at(p)).code & kNumber;) p += c.size;
    return p;
  }

  // Qwen2, cl100k and Qwen3.5: what a word consists of, and how many digits stay together.
  template <u32 kWord, int kDigits>
  const char* cl100k(const char* p) const {
    const Char c = at(p);
    const char* second = p + c.size;
    if (c.code & kNumber) return digits(p, kDigits);
    if (c.code & kWord) return run(second, kWord);
    if (const char* q = contraction(p); q > p) return q;
    if (!is_newline(p) && at(second).code & kWord) return run(second, kWord);
    const char* q = p + (*p == ' ');
    const char* others = run_without(q, kSpace | kWord | kNumber);
    return others > q ? newlines(others) : spaces(p);
  }

  // O200k's U*W+: U letters that are not lower case, W those that are not upper case; some are
  // both. Null if there is none.
  const char* cased(const char* p) const {
    const char* upper = run(p, kUpper);
    const char* lower = run(upper, kLower);
    if (lower > upper) return lower;
    while (upper > p) {  // the last that is both ends it
      const char* last = char_before(upper);
      if (at(last).code & kLower) return upper;
      upper = last;
    }
    return nullptr;
  }
  const char* o200k(const char* p) const {
    const Char c = at(p);
    const char* second = p + c.size;
    if (c.code & kNumber) return digits(p, 3);
    bool in_word = c.code & (kUpper | kLower);
    bool prefix = !(c.code & kLetter) && !is_newline(p) && at(second).code & (kUpper | kLower);
    const char* word = prefix ? cased(second) : nullptr;
    if (!word && in_word) word = cased(p);
    if (!word && prefix) word = run(second, kUpper);
    if (!word && in_word) word = run(p, kUpper);
    if (word) return contraction(word);
    const char* q = p + (*p == ' ');
    const char* others = run_without(q, kSpace | kLetter | kNumber);
    return others > q ? newlines(others, true) : spaces(p);
  }
};

template <const char* (Splitter::*Word)(const char*) const>
const char* word_end(const char* begin, const char* end) {
  return (Splitter{char_flags(), end}.*Word)(begin);
}

string cl100k_pattern(bool marks, const char* digits) {
  return text(R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?%s+|\p{N}%s)"
              R"(| ?[^\s\p{L}%s\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)",
      marks ? R"([\p{L}\p{M}])" : R"(\p{L})", digits, marks ? R"(\p{M})" : "");
}
}

WordEnd fast_word_end(const string& pattern) {
  const std::pair<string, WordEnd> all[] = {
      {cl100k_pattern(false, ""), word_end<&Splitter::cl100k<kLetter, 1>>},  // Qwen2
      {cl100k_pattern(false, "{1,3}"), word_end<&Splitter::cl100k<kLetter, 3>>},
      {cl100k_pattern(true, ""), word_end<&Splitter::cl100k<kLetter | kMark, 1>>},  // Qwen3.5
      {kO200k, word_end<&Splitter::o200k>},
  };
  for (const auto& [known, word] : all)
    if (pattern == known) return word;
  return nullptr;
}

void split(const vector<SplitStep>& steps, string_view text, SplitBuffers& buffers) {
  buffers.pieces.assign(1, text);
  for (const SplitStep& step : steps) {
    buffers.next.clear();
    for (const string_view piece : buffers.pieces) step.split(piece, buffers.room, buffers.next);
    buffers.pieces.swap(buffers.next);
  }
}

}
