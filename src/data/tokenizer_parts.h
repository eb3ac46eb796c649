// tokenizer_parts: what the tokenizer is made of; only the tokenizer's own files use it directly.
#pragma once
#include <array>
#include <memory>
#include <optional>
#include <span>
#include <unordered_map>

#include "core/check.h"

namespace pith {

// tokenizer_unicode.cpp

// What a character is, in the Unicode version of Hugging Face's regular expressions, 16.0.
enum CharFlag : u16 {
  kLetter = 1,          // L
  kMark = 2,            // M
  kNumber = 4,          // N
  kSpace = 8,           // White_Space, which is \s
  kUpper = 16,          // Lu Lt Lm Lo M: o200k's first half of a word
  kLower = 32,          // Ll Lm Lo M: its second half
  kWordChar = 64,       // \w of added tokens' single_word
  kPunct = 128,         // P S
  kUnknownToNfc = 256,  // newer than Hugging Face's NFC, which leaves it alone
  kUnstable = 512,      // NFC may change it, move it, or join it to what is before it
};
const u16* char_flags();  // by code point

// General categories of code points that libraries may be too old to know, as "1c89 a7cb-a7cc".
struct NewerCodes {
  const char *category, *ranges;
};
std::span<const NewerCodes> newer_codes();

struct Char {
  u32 code, size;
};
// The character at `p`, in valid UTF-8.
inline Char decode_char(const char* p) {
  const auto* b = reinterpret_cast<const u8*>(p);
  if (b[0] < 0x80) return {b[0], 1};
  if (b[0] < 0xe0) return {(b[0] & 31u) << 6 | (b[1] & 63u), 2};
  if (b[0] < 0xf0) return {(b[0] & 15u) << 12 | (b[1] & 63u) << 6 | (b[2] & 63u), 3};
  return {(b[0] & 7u) << 18 | (b[1] & 63u) << 12 | (b[2] & 63u) << 6 | (b[3] & 63u), 4};
}
// The character that ends at `p`.
inline const char* char_before(const char* p) {
  do p--;
  while ((*p & 0xc0) == 0x80);
  return p;
}
void append_char(string& out, u32 code);
// Bytes of the valid UTF-8 at the front of `bytes`: its size if all of it is valid.
size_t valid_utf8_prefix(string_view bytes);
// `text` in NFC, into `out`. False, leaving `out` alone, when `text` is in NFC already.
bool to_nfc(string_view text, string& out);

// tokenizer_regex.cpp

struct Match {
  size_t begin, end;
  bool is_match;
};

// A regular expression in Oniguruma's Ruby syntax, as Hugging Face compiles it.
class Regex {
 public:
  // Throws bad_input at `place` for what is malformed or what PCRE2 would read in another way.
  Regex(const string& pattern, const string& place);
  // Cuts `text` into matches and what is between them, into `out`. `room` belongs to one thread.
  void matches(string_view text, std::shared_ptr<void>& room, vector<Match>& out) const;

 private:
  std::shared_ptr<void> code_;  // pcre2_code
  string place_;
  bool may_be_empty_ = false;
  std::array<bool, 256> starts_{};  // bytes that a match may start with
};

// tokenizer_split.cpp

// Splits by hand-written code: the next words of `text`, at most `most`, are appended to `words`
// and taken off `text`.
using FastSplit = void (*)(string_view& text, vector<string_view>& words, size_t most);
enum class SplitBehavior : u8 { Removed, Isolated, MergedWithPrevious, MergedWithNext, Contiguous };

// One step of the pre-tokenizer: cuts every piece of text at the matches of a pattern; without one,
// puts a space before those that do not start with one.
struct SplitStep {
  SplitStep() = default;
  SplitStep(const string& pattern, const string& place, SplitBehavior how = SplitBehavior::Isolated,
            bool inverted = false);
  SplitBehavior behavior = SplitBehavior::Isolated;
  bool invert = false;
  FastSplit fast = nullptr;
  std::optional<Regex> regex;  // of a pattern that is not fast
};

struct SplitBuffers {
  vector<string_view> pieces, next;
  vector<Match> matches;
  std::shared_ptr<void> room;
  string text;
};
// All words of `text`, into buffers.pieces; they lie in `text` or in buffers.text.
void split(const vector<SplitStep>& steps, string_view text, SplitBuffers& buffers);

// tokenizer.cpp

struct NormalizerStep {
  enum Kind : u8 { Nfc, Prepend, Replace } kind = Nfc;
  string text;                 // put before the text, or in a match's place
  std::optional<Regex> regex;  // of Replace
};

struct AddedToken {
  string content;  // in the form to be found
  u32 id = 0;
  bool single_word = false, lstrip = false, rstrip = false, special = false;
};

// Finds added tokens, leftmost first, the longest of those that start at one place.
class AddedTokens {
 public:
  explicit AddedTokens(vector<AddedToken> tokens = {});
  // The first one at or after `from`, and its place in `begin`; null at the end.
  const AddedToken* find(string_view text, size_t from, size_t& begin) const;

 private:
  vector<AddedToken> tokens_;  // sorted by content
  std::array<bool, 256> starts_{};
};

// tokenizer_bpe.cpp

constexpr u32 kNoId = UINT32_MAX;
constexpr int kIdBits = 21, kRankBits = 64 - 2 * kIdBits;  // of a packed merge

// What one thread needs to encode, the cache of words included. Any scratch may be used with any
// tokenizer; ids never depend on what it holds.
class EncodeScratch {
 public:
  explicit EncodeScratch(size_t cache_bytes = size_t{1} << 23);
  EncodeScratch(EncodeScratch&&) = default;

 private:
  friend class Bpe;
  friend class Tokenizer;
  void use(u64 tokenizer);  // by fingerprint: empties the cache of another
  struct Entry {
    u64 key[4];  // the bytes of a word of less than 32, its size in the last one; 0: unused
    u32 ids[7], count;
  };
  size_t entries_;
  vector<Entry> cache_;  // a power of two; of a word's two places the older is given up
  u64 owner_ = 0;
  vector<u32> ids_, ranks_;  // of the word at hand
  SplitBuffers split_;
  string normalized_, next_;
};

class Bpe {
 public:
  struct Merge {
    u32 left, right, joined;
  };
  Bpe() = default;
  // Merges, best first. `bytes` are the tokens' bytes by id, empty if it has none; they outlive
  // this. With `ignore_merges` a word that is a token always becomes that token.
  Bpe(const vector<Merge>& merges, const vector<string_view>& bytes, bool ignore_merges);
  // Appends the ids of each word to `out`. The cache of `scratch` must belong to this.
  void encode(const vector<string_view>& words, EncodeScratch& scratch, vector<u32>& out) const;

 private:
  size_t slot_of(u32 left, u32 right) const;
  u32 rank_of(u32 left, u32 right) const;
  void merge(vector<u32>& ids, vector<u32>& ranks) const;
  void merge_long(vector<u32>& ids, vector<u32>& ranks) const;
  void encode_word(string_view word, EncodeScratch& scratch) const;

  vector<u64> pairs_;   // left, right, rank; open addressing; packed for one cache miss
  vector<u32> joined_;  // by rank
  std::array<u32, 256> byte_ids_{};
  vector<u32> byte_pairs_ = vector<u32>(1 << 16, kNoId);  // ranks, by two bytes
  std::unordered_map<string_view, u32> whole_;            // words that become one token
};

}
