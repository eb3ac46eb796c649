// Byte-level BPE with Hugging Face's ids.
#pragma once
#include <array>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <unordered_map>

#include "core/check.h"

namespace pith {

// What a character is in Unicode 16.0, as in Hugging Face's regular expressions.
enum CharFlag : u16 {
  kLetter = 1,
  kMark = 2,
  kNumber = 4,
  kSpace = 8,           // \s
  kUpper = 16,          // Lu Lt Lm Lo M
  kLower = 32,          // Ll Lm Lo M
  kWordChar = 64,       // \w of added tokens' single_word
  kUnknownToNfc = 128,  // newer than Hugging Face's NFC, which leaves it alone
  kUnstable = 256,      // NFC may change or move it, or join it to what is before it
};
const u16* char_flags();  // by code point
// "\x{1c8a}\x{a7cd}": what is in a category, such as "Ll", but may be newer than a library.
string newer_members(string_view category);

struct Char {
  u32 code, size;
};
inline Char decode_char(const char* p) {
  const auto* b = reinterpret_cast<const u8*>(p);
  if (b[0] < 0x80) return {b[0], 1};
  if (b[0] < 0xe0) return {(b[0] & 31u) << 6 | (b[1] & 63u), 2};
  if (b[0] < 0xf0) return {(b[0] & 15u) << 12 | (b[1] & 63u) << 6 | (b[2] & 63u), 3};
  return {(b[0] & 7u) << 18 | (b[1] & 63u) << 12 | (b[2] & 63u) << 6 | (b[3] & 63u), 4};
}
inline const char* char_before(const char* p) {
  do p--;
  while ((*p & 0xc0) == 0x80);
  return p;
}
size_t valid_utf8_prefix(string_view bytes);
bool is_valid_utf8(string_view bytes);
// Python's bytes.decode("utf-8", errors="replace"): each maximal invalid part becomes U+FFFD.
string replace_invalid_utf8(string_view bytes);
// `text` in NFC: itself, or in `buffer`.
string_view to_nfc(string_view text, string& buffer);

// The end of the first word of [begin, end).
using WordEnd = const char* (*)(const char* begin, const char* end);

// What cuts as the expression does, only faster; null if there is none.
WordEnd fast_word_end(const string& pattern);

// Cuts at matches of an expression in Oniguruma's Ruby syntax, which are words too.
class SplitStep {
 public:
  // Exit code 2, at `place`, for what is malformed or not read alike by PCRE2.
  SplitStep(const string& pattern, const string& place);
  // `room` belongs to one thread.
  void split(string_view text, std::shared_ptr<void>& room, vector<string_view>& words) const;
  WordEnd fast = nullptr;

 private:
  std::shared_ptr<void> code_;  // pcre2_code
  string place_;
};

struct SplitBuffers {
  vector<string_view> pieces, next;
  std::shared_ptr<void> room;
};
void split(const vector<SplitStep>& steps, string_view text, SplitBuffers& buffers);

constexpr u32 kNoId = UINT32_MAX;
constexpr int kIdBits = 21, kRankBits = 64 - 2 * kIdBits;  // of a packed merge

// One thread's, for one tokenizer; ids never depend on it.
struct EncodeScratch {
  explicit EncodeScratch(size_t cache_bytes = size_t{1} << 23);
  struct Entry {
    char key[32];  // a word of less than 32 bytes, its size in the last one; 0: unused
    u32 ids[7], count;
  };
  vector<Entry> cache;  // a power of two; of a word's two places the older is given up
  struct Part {         // a token of a word; rank: of its merge with the one after it
    u32 id, rank, before, after;
  };
  vector<Part> parts;
  SplitBuffers buffers;
  string normalized;
};

class Bpe {
 public:
  struct Merge {
    u32 left, right, joined;
  };
  Bpe() = default;
  // Merges, best first; `bytes` by id, which outlive this.
  Bpe(const vector<Merge>& merges, const vector<string_view>& bytes, bool ignore_merges);
  void encode(std::span<const string_view> words, EncodeScratch& scratch, vector<u32>& out) const;

 private:
  size_t slot_of(u32 left, u32 right) const;
  u32 rank_of(u32 left, u32 right) const;
  void merge(string_view word, EncodeScratch& scratch, vector<u32>& out) const;

  vector<u64> pairs_;   // left, right, rank; open addressing; packed for one cache miss
  vector<u32> joined_;  // by rank
  std::array<u32, 256> byte_ids_{};
  std::unordered_map<string_view, u32> whole_;
};

struct AddedToken {
  string content;  // in the form to be found
  u32 id = 0;
  bool single_word = false, lstrip = false, rstrip = false, special = false;
};

class AddedTokens {
 public:
  void add(const AddedToken& token);
  // The longest of the first place `begin` at or after `from`; null at the end.
  const AddedToken* find(string_view text, size_t from, size_t& begin) const;

 private:
  std::map<string, AddedToken, std::less<>> tokens_;
  std::array<bool, 256> starts_{};
};

enum class SpecialTokens : u8 { Keep, Skip };

// Shared by threads, each with its EncodeScratch. Tokens' text is as the vocabulary writes it:
// "Ġthe".
struct Tokenizer {
  // Exit code 2, naming the part, for what is missing, damaged or not supported.
  static Tokenizer load(const string& path);
  Tokenizer() = default;
  Tokenizer(Tokenizer&&) = default;

  // Appends to `out`. special_as_text: special tokens' text does not become those tokens. Exit
  // code 2, with the byte offset, where `utf8` is not valid.
  void encode(
      string_view utf8, vector<u32>& out, bool special_as_text, EncodeScratch& scratch) const;
  // Invalid UTF-8 becomes U+FFFD, ids without a token nothing.
  string decode(std::span<const u32> tokens, SpecialTokens which) const;

  u32 vocab_size() const { return u32(texts.size()); }
  std::optional<u32> id_of(string_view token) const;

  string path;
  std::optional<u32> eos_id;         // of a well-known name, such as <|endoftext|>
  std::deque<string> strings;        // where the tokens' text and bytes lie
  vector<string_view> texts, bytes;  // by id; empty: no token; not of GPT-2's characters
  vector<bool> special;              // by id
  std::unordered_map<string_view, u32> ids;
  AddedTokens added[2];  // found before and after normalization
  bool nfc = false;
  vector<SplitStep> steps;
  Bpe bpe;

 private:
  void encode_text(string_view text, bool normalized, bool special_as_text, EncodeScratch& scratch,
      vector<u32>& out) const;
};

}
