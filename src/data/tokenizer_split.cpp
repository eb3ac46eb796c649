#define XXH_INLINE_ALL
#include <emmintrin.h>
#include <xxhash.h>

#include <algorithm>

#include "data/tokenizer_parts.h"

namespace pith {

// ---- runs of characters ----

// How many of the 16 bytes at `p` are letters (only lower case; only upper case) before the first
// that is not.
static inline uint32_t leading_letters(const char* p, uint8_t fold, char first) {
  const __m128i bytes =
      _mm_or_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), _mm_set1_epi8(char(fold)));
  const __m128i offset = _mm_sub_epi8(bytes, _mm_set1_epi8(first));
  const __m128i in = _mm_cmpeq_epi8(_mm_min_epu8(offset, _mm_set1_epi8(25)), offset);
  return uint32_t(__builtin_ctz((uint32_t(_mm_movemask_epi8(in)) ^ 0xffff) | 0x10000));
}

namespace {
// Splits text between `p` and `end`. Each pattern's function returns the end of the word at `p`; in
// comments, the pattern's alternatives in order.
struct Splitter {
  const CharTable& chars;
  const char* end;

  // Flags of the character at `p` and its size; at the end of the text 0 and 0.
  struct At {
    uint32_t flags, size;
  };
  At at(const char* p) const {
    if (p >= end) return {0, 0};
    const auto byte = uint8_t(*p);
    if (byte < 0x80) return {chars.ascii(byte), 1};
    const Char c = decode_char(p);
    return {chars[c.code], c.size};
  }

  // The end of the characters with a flag of `mask` (without any flag of it).
  const char* run(const char* p, uint32_t mask) const {
    for (At c; (c = at(p)).flags & mask;) p += c.size;
    return p;
  }
  const char* run_without(const char* p, uint32_t mask) const {
    for (At c; !((c = at(p)).flags & mask) && c.size;) p += c.size;
    return p;
  }
  // As run(), for a mask that holds every ASCII letter from `first` on (with `fold` set in it)
  // and nothing else of ASCII.
  const char* letters(const char* p, uint32_t mask, uint8_t fold = 0x20, char first = 'a') const {
    for (;;) {
      uint32_t size = 0;
      while (end - p >= 16 && (size = leading_letters(p, fold, first)) == 16) p += 16;
      if (end - p < 16) return run(p, mask);
      p += size;
      if (uint8_t(*p) < 0x80) return p;
      for (At c; uint8_t(*p) >= 0x80;) {
        if (!((c = at(p)).flags & mask)) return p;
        p += c.size;
        if (p == end) return p;
      }
    }
  }

  static bool is_newline(const char* p) { return *p == '\n' || *p == '\r'; }
  // [\r\n]*, or [\r\n/]*
  const char* newlines(const char* p, bool slash = false) const {
    while (p < end && (is_newline(p) || (slash && *p == '/'))) p++;
    return p;
  }
  const char* digits(const char* p, int most) const {
    for (At c; most-- > 0 && (c = at(p)).flags & kNumber;) p += c.size;
    return p;
  }
  // 's|'t|'re|'ve|'m|'ll|'d, or with any_case (?i:...), which knows the long s too.
  const char* contraction(const char* p, bool any_case) const {
    if (end - p < 2 || *p != '\'') return nullptr;
    const char fold = any_case ? 0x20 : 0;
    const char a = char(p[1] | fold);
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return p + 2;
    if (end - p < 3) return nullptr;
    const char b = char(p[2] | fold);
    if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return p + 3;
    return any_case && p[1] == '\xc5' && p[2] == '\xbf' ? p + 3 : nullptr;
  }
  // \s*[\r\n]+ (if lines), \s+(?!\S), \s+. Characters with a flag of `stop` are an end too.
  const char* spaces(const char* p, bool lines, uint32_t stop = 0) const {
    const char *q = p, *last = p, *line_end = nullptr;
    At c;
    while ((c = at(q)).flags & kSpace) {
      last = q;
      q += c.size;
      if (is_newline(last)) line_end = q;
    }
    if (lines && line_end) return line_end;
    return q == end || (c.flags & stop) || last == p ? q : last;
  }

  // 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
  const char* gpt2(const char* p) const {
    if (const char* q = contraction(p, false)) return q;
    const char* q = p + (*p == ' ');
    const At c = at(q);
    if (c.flags & kLetter) return letters(q, kLetter);
    if (c.flags & kNumber) return run(q, kNumber);
    if (c.size && !(c.flags & kSpace)) return run_without(q, kSpace | kLetter | kNumber);
    return spaces(p, false);
  }

  // (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|
  // \s*[\r\n]+|\s+(?!\S)|\s+   with up to Digits digits, and \p{L} or [\p{L}\p{M}] as Word
  template <uint32_t Word, int Digits>
  const char* cl100k(const char* p) const {
    const At c = at(p);
    if (c.flags & Word) return letters(p + c.size, Word);
    if (c.flags & kNumber) return digits(p, Digits);
    if (const char* q = contraction(p, true)) return q;
    if (!is_newline(p)) {
      const At next = at(p + c.size);
      if (next.flags & Word) return letters(p + c.size, Word);
    }
    const char* q = p + (*p == ' ');
    const char* others = run_without(q, kSpace | Word | kNumber);
    return others > q ? newlines(others) : spaces(p, true);
  }

  // U*W+ of the pattern below: U letters that are not lower case, W those that are not upper
  // case, and some are both. Null if there is none.
  const char* cased(const char* p) const {
    const char* upper = letters(p, kUpper, 0, 'A');
    const char* lower = letters(upper, kLower, 0, 'a');
    if (lower > upper) return lower;
    while (upper > p) {  // the last that is both ends it
      const char* last = upper - 1;
      while ((*last & 0xc0) == 0x80) last--;
      if (at(last).flags & kLower) return upper;
      upper = last;
    }
    return nullptr;
  }
  const char* with_contraction(const char* p) const {
    const char* q = contraction(p, true);
    return q ? q : p;
  }
  // [^\r\n\p{L}\p{N}]?U*W+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?U+W*(?i:'s|...)?|
  // \p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+
  const char* o200k(const char* p) const {
    const At c = at(p);
    if (c.flags & kNumber) return digits(p, 3);
    const bool prefix = !(c.flags & kLetter) && !is_newline(p);
    const char* word = p + c.size;
    const bool follows = prefix && (at(word).flags & (kUpper | kLower));
    if (follows)
      if (const char* q = cased(word)) return with_contraction(q);
    if (c.flags & (kUpper | kLower))
      if (const char* q = cased(p)) return with_contraction(q);
    if (follows) return with_contraction(letters(word, kUpper, 0, 'A'));
    if (c.flags & kUpper) return with_contraction(letters(p, kUpper, 0, 'A'));
    const char* q = p + (*p == ' ');
    const char* others = run_without(q, kSpace | kLetter | kNumber);
    return others > q ? newlines(others, true) : spaces(p, true);
  }

  // \p{N}{1,3}, then [U+4E00-U+9FA5 U+3040-U+30FF]+, then in each of the pieces
  // [!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|
  // ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+   and what none of them matches
  const char* deepseek_v3(const char* p) const {
    const At c = at(p);
    if (c.flags & kNumber) return digits(p, 3);
    const uint32_t cjk = c.flags & kCjk;
    const uint32_t letter = cjk ? kCjkWord : kDeepSeekWord;
    const uint32_t punct = cjk ? kCjkPunct : kDeepSeekPunct;
    const char* second = p + c.size;
    const bool follows = (at(second).flags & letter) != 0;
    if (c.flags & letter) return cjk ? run(second, letter) : letters(second, letter);
    if (c.flags & punct) {
      const char* q = second;
      while (c.size == 1 && q < end && uint8_t((*q | 0x20) - 'a') < 26) q++;
      if (q > second) return q;
    } else if (follows && !is_newline(p)) {
      return cjk ? run(second, letter) : letters(second, letter);
    }
    const char* q = p + (*p == ' ');
    const char* others = run(q, punct);
    if (others > q) return cjk ? others : newlines(others);
    if (c.flags & kSpace) return spaces(p, true, kNumber | kCjk);
    for (;;) {
      const At next = at(second);
      if (next.size == 0 || next.flags & (kNumber | letter | punct | kSpace) ||
          (next.flags & kCjk) != cjk || at(second + next.size).flags & letter)
        return second;
      second += next.size;
    }
  }

  // Words from `p` on, each ended by `next`.
  template <class Next>
  size_t fill(const char*& p, string_view* words, size_t capacity, Next&& next) const {
    size_t count = 0;
    const char* begin = p;
    while (count < capacity && begin < end) {
      const char* word_end = next(begin);
      words[count++] = string_view(begin, size_t(word_end - begin));
      begin = word_end;
    }
    p = begin;
    return count;
  }
};
}  // namespace

size_t fast_split(FastPattern pattern, const CharTable& chars, const char*& p, const char* end,
                  string_view* words, size_t capacity) {
  const Splitter s{chars, end};
  const auto fill = [&](auto&& next) { return s.fill(p, words, capacity, next); };
  switch (pattern) {
    case FastPattern::None:
    case FastPattern::DeepSeekV2: break;
    case FastPattern::Gpt2: return fill([&](const char* q) { return s.gpt2(q); });
    case FastPattern::Qwen2: return fill([&](const char* q) { return s.cl100k<kLetter, 1>(q); });
    case FastPattern::Cl100k: return fill([&](const char* q) { return s.cl100k<kLetter, 3>(q); });
    case FastPattern::Qwen35:
      return fill([&](const char* q) { return s.cl100k<kLetter | kMark, 1>(q); });
    case FastPattern::O200k: return fill([&](const char* q) { return s.o200k(q); });
    case FastPattern::DeepSeekV3: return fill([&](const char* q) { return s.deepseek_v3(q); });
  }
  return 0;
}

// ---- patterns that are known ----

const char* const kGpt2Pattern =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

static const string kContractions = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
static const string kSpaces = "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
static const string kUpperLetters = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]";
static const string kLowerLetters = "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]";
static const string kPrefix = "[^\\r\\n\\p{L}\\p{N}]?";
static const string kOthers = "| ?[^\\s\\p{L}\\p{N}]+";

static FastPattern known_pattern(const string& pattern) {
  const struct {
    FastPattern fast;
    string pattern;
  } known[] = {
      {FastPattern::Gpt2, kGpt2Pattern},
      {FastPattern::Qwen2,
       kContractions + "|" + kPrefix + "\\p{L}+|\\p{N}" + kOthers + "[\\r\\n]*" + kSpaces},
      {FastPattern::Cl100k,
       kContractions + "|" + kPrefix + "\\p{L}+|\\p{N}{1,3}" + kOthers + "[\\r\\n]*" + kSpaces},
      {FastPattern::Qwen35, kContractions + "|" + kPrefix +
                                "[\\p{L}\\p{M}]+|\\p{N}| ?[^\\s\\p{L}\\p{M}\\p{N}]+[\\r\\n]*" +
                                kSpaces},
      {FastPattern::O200k, kPrefix + kUpperLetters + "*" + kLowerLetters + "+" + kContractions +
                               "?|" + kPrefix + kUpperLetters + "+" + kLowerLetters + "*" +
                               kContractions + "?|\\p{N}{1,3}" + kOthers + "[\\r\\n/]*" + kSpaces},
  };
  for (const auto& each : known)
    if (each.pattern == pattern) return each.fast;
  return FastPattern::None;
}

static const string kDeepSeekV3[] = {
    "\\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?"
    "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*" +
        kSpaces};

// A pattern with \r and \n written in one way.
static string canonical(const string& pattern) {
  string out;
  for (const char c : pattern) out += c == '\r' ? "\\r" : c == '\n' ? "\\n" : string(1, c);
  return out;
}

static void use_fast_patterns(vector<SplitStep>& steps) {
  const auto isolates = [](const SplitStep& step) {
    return step.kind == SplitStep::Pattern && step.behavior == SplitBehavior::Isolated;
  };
  for (SplitStep& step : steps) {
    // Patterns that match every character leave nothing to remove between matches.
    const bool keeps_all =
        step.kind == SplitStep::Pattern && step.invert && step.behavior == SplitBehavior::Removed;
    if (isolates(step) || keeps_all) step.fast = known_pattern(canonical(step.pattern));
  }
  const size_t count = std::size(kDeepSeekV3);
  for (size_t i = 0; i + count <= steps.size(); i++) {
    bool same = true;
    for (size_t j = 0; j < count; j++)
      same = same && isolates(steps[i + j]) && canonical(steps[i + j].pattern) == kDeepSeekV3[j];
    if (!same) continue;
    steps[i].fast = FastPattern::DeepSeekV3;
    steps.erase(steps.begin() + int64_t(i) + 1, steps.begin() + int64_t(i + count));
  }
}

// [\r\n], then letters of some scripts, ASCII and full-width punctuation, \s+$, CJK, single digits.
// The pattern of the letters is long, so all of them are recognised by their hash.
static bool is_deepseek_v2(const vector<SplitStep>& steps) {
  string patterns;
  for (const SplitStep& step : steps)
    if (step.behavior != SplitBehavior::Isolated || step.invert) return false;
  for (const SplitStep& step : steps) patterns += canonical(step.pattern) + '\0';
  return steps.size() == 6 && steps.back().kind == SplitStep::Digits &&
         XXH3_64bits(patterns.data(), patterns.size()) == 0xc11ed6c5b8b22b9f;
}

void prepare(vector<SplitStep>& steps, bool use_fast) {
  if (use_fast) use_fast_patterns(steps);
  for (SplitStep& step : steps)
    if (step.kind == SplitStep::Pattern && step.fast == FastPattern::None)
      step.regex.emplace_back(step.pattern, step.place);
  if (use_fast && is_deepseek_v2(steps)) steps[0].fast = FastPattern::DeepSeekV2;
}

// ---- any steps ----

// Turns matches and what is between them into pieces; a piece with is_match set is left out.
static void apply(SplitBehavior behavior, const vector<Match>& matches, vector<Match>& pieces) {
  pieces.clear();
  const bool forward = behavior != SplitBehavior::MergedWithNext;
  bool previous = false;
  for (size_t i = 0; i < matches.size(); i++) {
    const Match& m = matches[forward ? i : matches.size() - 1 - i];
    const bool joins = behavior == SplitBehavior::Contiguous           ? m.is_match == previous
                       : behavior >= SplitBehavior::MergedWithPrevious ? m.is_match && !previous
                                                                       : false;
    previous = m.is_match;
    if (joins && !pieces.empty())
      (forward ? pieces.back().end : pieces.back().begin) = forward ? m.end : m.begin;
    else
      pieces.push_back({m.begin, m.end, m.is_match && behavior == SplitBehavior::Removed});
  }
  if (!forward) std::reverse(pieces.begin(), pieces.end());
}

static void find_digits(const CharTable& chars, string_view text, vector<Match>& out) {
  out.clear();
  size_t done = 0;
  for (size_t at = 0; at < text.size();) {
    const Char c = decode_char(text.data() + at);
    if (chars[c.code] & kNumber) {
      if (done < at) out.push_back({done, at, false});
      done = at + c.size;
      out.push_back({at, done, true});
    }
    at += c.size;
  }
  if (done < text.size()) out.push_back({done, text.size(), false});
}

static void split_piece(const SplitStep& step, const CharTable& chars, string_view piece,
                        SplitBuffers& buffers) {
  if (step.fast != FastPattern::None) {
    string_view words[64];
    const char *p = piece.data(), *end = p + piece.size();
    while (p < end) {
      const size_t count = fast_split(step.fast, chars, p, end, words, std::size(words));
      buffers.next.insert(buffers.next.end(), words, words + count);
    }
    return;
  }
  const bool isolated = step.behavior == SplitBehavior::Isolated;
  if (step.kind == SplitStep::Digits) {
    find_digits(chars, piece, buffers.matches);
  } else if (isolated && !step.regex[0].may_match(piece)) {
    buffers.next.push_back(piece);
    return;
  } else {
    step.regex[0].matches(piece, buffers.match_data, buffers.matches);
  }
  if (step.invert)
    for (Match& m : buffers.matches) m.is_match = !m.is_match;
  if (!isolated) {
    apply(step.behavior, buffers.matches, buffers.merged);
    buffers.matches.swap(buffers.merged);
  }
  for (const Match& m : buffers.matches)
    if ((isolated || !m.is_match) && m.begin < m.end)
      buffers.next.push_back(piece.substr(m.begin, m.end - m.begin));
}

// Puts a space before every piece that does not start with one, into another text. (At most one
// step does this, so no piece lies in that text yet.)
static void prefix_spaces(SplitBuffers& buffers) {
  size_t size = 0;
  for (const string_view piece : buffers.pieces) size += piece.size() + 1;
  buffers.text.clear();
  buffers.text.reserve(size);
  for (const string_view piece : buffers.pieces) {
    const size_t begin = buffers.text.size();
    if (piece[0] != ' ') buffers.text += ' ';
    buffers.text += piece;
    buffers.next.emplace_back(buffers.text.data() + begin, buffers.text.size() - begin);
  }
}

// Cuts buffers.pieces by the steps from `first` on.
static void apply_steps(const vector<SplitStep>& steps, size_t first, const CharTable& chars,
                        SplitBuffers& buffers) {
  for (size_t i = first; i < steps.size(); i++) {
    buffers.next.clear();
    if (steps[i].kind == SplitStep::PrefixSpace)
      prefix_spaces(buffers);
    else
      for (const string_view piece : buffers.pieces) split_piece(steps[i], chars, piece, buffers);
    buffers.pieces.swap(buffers.next);
  }
}

// What DeepSeek-V2's steps come to in a line of printable ASCII and white space: \s?[A-Za-z]+, \s?
// and a run of other characters, single digits, and what white space is left over.
static void split_ascii_line(const CharTable& chars, string_view line, vector<string_view>& words) {
  enum Class : uint8_t { Space, Letter, Digit, Other };
  const auto class_at = [&](size_t i) {
    const uint16_t flags = chars.ascii(uint8_t(line[i]));
    return flags & kSpace ? Space : flags & kLetter ? Letter : flags & kNumber ? Digit : Other;
  };
  const auto run_end = [&](size_t i) {
    const Class first = class_at(i);
    do i++;
    while (i < line.size() && class_at(i) == first);
    return i;
  };
  for (size_t begin = 0; begin < line.size();) {
    size_t word = class_at(begin) == Space ? run_end(begin) : begin;
    const bool joins = word < line.size() && class_at(word) != Digit;
    if (word > begin && (!joins || word - begin > 1)) {
      words.push_back(line.substr(begin, word - begin - joins));
      begin = word - joins;
      continue;
    }
    word = class_at(word) == Digit ? word + 1 : run_end(word);
    words.push_back(line.substr(begin, word - begin));
    begin = word;
  }
}

static void split_lines(const vector<SplitStep>& steps, const CharTable& chars, string_view text,
                        SplitBuffers& buffers) {
  buffers.words.clear();
  for (size_t begin = 0; begin < text.size();) {
    size_t end = begin;
    bool plain = true;
    for (; end < text.size() && text[end] != '\n' && text[end] != '\r'; end++) {
      const auto byte = uint8_t(text[end]);
      plain &= (byte >= 0x20 && byte < 0x7f) || byte == '\t';
    }
    if (end == begin) {
      buffers.words.push_back(text.substr(begin, 1));
      end = begin + 1;
    } else if (plain) {
      split_ascii_line(chars, text.substr(begin, end - begin), buffers.words);
    } else {
      buffers.pieces.assign(1, text.substr(begin, end - begin));
      apply_steps(steps, 1, chars, buffers);
      buffers.words.insert(buffers.words.end(), buffers.pieces.begin(), buffers.pieces.end());
    }
    begin = end;
  }
  buffers.pieces.swap(buffers.words);
}

void split(const vector<SplitStep>& steps, const CharTable& chars, string_view text,
           SplitBuffers& buffers) {
  if (!steps.empty() && steps[0].fast == FastPattern::DeepSeekV2)
    return split_lines(steps, chars, text, buffers);
  buffers.pieces.assign(1, text);
  apply_steps(steps, 0, chars, buffers);
}

}  // namespace pith
