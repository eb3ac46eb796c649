// tokenizer_parts: what the tokenizer's own files share; nothing else includes it.
//   tokenizer.cpp          encode and decode from end to end
//   tokenizer_load.cpp     reading tokenizer.json
//   tokenizer_added.cpp    added tokens found in text
//   tokenizer_unicode.cpp  UTF-8, character classes, NFC
//   tokenizer_regex.cpp    any regular expression, through PCRE2
//   tokenizer_split.cpp    text to words: the steps of the pre-tokenizer, and fast forms of them
//   tokenizer_bpe.cpp      words to ids: merges, and the cache of words
// defines: CharFlag, CharTable, Char, decode_char, Regex, Match, Normalizer, SplitBehavior,
//          FastPattern, SplitStep, AddedTokens, StringIds, Bpe, EncodeScratch::State,
//          Tokenizer::Data, append_bytes
#pragma once
#include <array>
#include <climits>

#include "data/tokenizer.h"

namespace pith {

// ---- tokenizer_unicode.cpp ----

// What a code point is, in the Unicode version of Hugging Face's regular expressions (16.0).
enum CharFlag : uint16_t {
  kLetter = 1,           // L
  kMark = 2,             // M
  kNumber = 4,           // N
  kSpace = 8,            // White_Space, which is \s
  kUpper = 16,           // Lu Lt Lm Lo M: o200k's first half of a word
  kLower = 32,           // Ll Lm Lo M: its second half
  kWordChar = 64,        // \w of added tokens' single_word
  kCjk = 128,            // DeepSeek's [U+4E00-U+9FA5 U+3040-U+30FF]
  kDeepSeekWord = 256,   // L M outside of kCjk
  kDeepSeekPunct = 512,  // P S outside of kCjk
  kCjkWord = 1024,       // L M in kCjk
  kCjkPunct = 2048,      // P S in kCjk
  kUnstable = 4096,      // NFC may change it, move it, or join it to what is before it
};

class CharTable {
 public:
  CharTable();
  uint16_t operator[](uint32_t code) const {
    return flags_[(size_t{block_[code >> 7]} << 7) + (code & 127)];
  }
  uint16_t ascii(uint8_t byte) const { return flags_[byte]; }  // byte < 128

 private:
  vector<uint16_t> block_, flags_;  // two stages of 128 code points; block 0 comes first
};

struct Char {
  uint32_t code, size;
};

// The code point at `p`, which must be the start of one in valid UTF-8.
inline Char decode_char(const char* p) {
  const auto* b = reinterpret_cast<const uint8_t*>(p);
  if (b[0] < 0x80) return {b[0], 1};
  if (b[0] < 0xe0) return {(b[0] & 31u) << 6 | (b[1] & 63u), 2};
  if (b[0] < 0xf0) return {(b[0] & 15u) << 12 | (b[1] & 63u) << 6 | (b[2] & 63u), 3};
  return {(b[0] & 7u) << 18 | (b[1] & 63u) << 12 | (b[2] & 63u) << 6 | (b[3] & 63u), 4};
}
void append_char(string& out, uint32_t code);
// Bytes of the valid UTF-8 at the front of `bytes`: its size if all of it is valid.
size_t valid_utf8_prefix(string_view bytes);
// Ranges of code points with their general category ("Lu"), which libraries older than Unicode 16
// lack.
struct CategoryRange {
  uint32_t first, last;
  const char* category;
};
std::span<const CategoryRange> newer_code_points();
// `text` in NFC, into `out`. False, leaving `out` alone, when `text` is in NFC already.
bool nfc(const CharTable& chars, string_view text, string& out);

// ---- tokenizer_regex.cpp ----

struct Match {
  size_t begin, end;
  bool is_match;
};

// Room for matching, of one thread.
struct MatchData {
  void* data = nullptr;  // pcre2_match_data
  MatchData() = default;
  MatchData(const MatchData&) = delete;
  MatchData& operator=(const MatchData&) = delete;
  ~MatchData();
};

// A regular expression in Oniguruma's Ruby syntax, as Hugging Face compiles it.
class Regex {
 public:
  // Throws bad_input at `place` for what is malformed or what PCRE2 would read in another way.
  Regex(const string& pattern, const string& place);
  Regex(Regex&& o) noexcept;
  Regex& operator=(Regex&&) = delete;
  ~Regex();
  // Cuts `text` into matches and what is between them, into `out`.
  void matches(string_view text, MatchData& scratch, vector<Match>& out) const;
  // False only if there is no match.
  bool may_match(string_view text) const {
    for (const char c : text)
      if (starts_[uint8_t(c)]) return true;
    return false;
  }

 private:
  void* code_ = nullptr;  // pcre2_code
  string place_;
  bool jit_ = false;
  std::array<bool, 256> starts_{};  // bytes that a match may start with
};
string escape_regex(const string& literal);

// ---- tokenizer_split.cpp ----

enum class SplitBehavior : uint8_t {
  Removed,
  Isolated,
  MergedWithPrevious,
  MergedWithNext,
  Contiguous
};

// Patterns split by hand-written code; all of them isolate their matches. DeepSeekV2 marks the
// first of six steps, which stay: they are for lines that are not plain ASCII.
enum class FastPattern : uint8_t {
  None,
  Gpt2,
  Qwen2,
  Cl100k,
  Qwen35,
  O200k,
  DeepSeekV3,
  DeepSeekV2
};

// One step of the pre-tokenizer: cuts every piece of text into smaller ones.
struct SplitStep {
  enum Kind : uint8_t { Pattern, Digits, PrefixSpace } kind = Pattern;
  SplitBehavior behavior = SplitBehavior::Isolated;
  bool invert = false;
  FastPattern fast = FastPattern::None;
  string pattern, place;  // of a Pattern: the regular expression, and where it is from
  vector<Regex> regex;    // one, of a Pattern that is not fast
};

// Gives patterns, and sequences of them, their fast forms, and compiles the others.
void prepare(vector<SplitStep>& steps, bool use_fast = true);
// The steps of `ByteLevel` with its own regular expression.
extern const char* const kGpt2Pattern;
// Words from `p` on, at most `capacity`, into `words`; returns their number and moves `p`.
size_t fast_split(FastPattern pattern, const CharTable& chars, const char*& p, const char* end,
                  string_view* words, size_t capacity);
struct SplitBuffers {
  vector<string_view> pieces, next, words;
  vector<Match> matches, merged;
  string text;
  MatchData match_data;
};
// All words of `text`, into buffers.pieces; they lie in `text` or in buffers.text.
void split(const vector<SplitStep>& steps, const CharTable& chars, string_view text,
           SplitBuffers& buffers);

// ---- tokenizer_added.cpp ----

struct AddedToken {
  string content;  // in the form to be found
  uint32_t id = 0;
  bool single_word = false, lstrip = false, rstrip = false, special = false;
};

// Finds added tokens, leftmost first, the longest of those that start at one place.
class AddedTokens {
 public:
  explicit AddedTokens(vector<AddedToken> tokens = {});
  bool empty() const { return tokens_.empty(); }
  // The first occurrence at or after `from`: its token, and its place in `begin`. Null at the
  // end.
  const AddedToken* find(string_view text, size_t from, size_t& begin) const;

 private:
  void add_node(size_t node, size_t first, size_t last, size_t depth);
  struct Node {
    uint32_t first_edge = 0, num_edges = 0;
    int32_t token = -1;
  };
  struct Edge {
    uint8_t byte;
    uint32_t node;
  };
  vector<AddedToken> tokens_;  // sorted by content
  vector<Node> nodes_;
  vector<Edge> edges_;
  std::array<bool, 256> starts_{};
  int only_start_ = -1;  // the first byte of all tokens, if they share it
};

// Cuts `text` at added tokens as Hugging Face does: calls piece(begin, end, token or null) in
// order. `with_special` false: special tokens' text is no token.
template <class Piece>
void cut_at_tokens(const AddedTokens& tokens, const CharTable& chars, string_view text,
                   bool with_special, Piece&& piece);
bool is_separate_word(const CharTable& chars, string_view text, size_t begin, size_t end);
size_t spaces_before(const CharTable& chars, string_view text, size_t end);
size_t spaces_after(const CharTable& chars, string_view text, size_t begin);

template <class Piece>
void cut_at_tokens(const AddedTokens& tokens, const CharTable& chars, string_view text,
                   bool with_special, Piece&& piece) {
  size_t done = 0, from = 0, begin = 0;
  while (const AddedToken* token = tokens.find(text, from, begin)) {
    size_t end = from = begin + token->content.size();
    if (token->special && !with_special) continue;
    if (token->single_word && !is_separate_word(chars, text, begin, end)) continue;
    if (token->lstrip) begin = std::max(spaces_before(chars, text, begin), done);
    if (token->rstrip) end = spaces_after(chars, text, end);
    if (done < begin) piece(done, begin, nullptr);
    piece(begin, end, token);
    done = end;
  }
  if (done < text.size()) piece(done, text.size(), nullptr);
}

// ---- tokenizer_bpe.cpp ----

constexpr uint32_t kNoId = UINT32_MAX;
constexpr int kIdBits = 21, kRankBits = 64 - 2 * kIdBits;  // of a packed merge

// Ids by string; the strings are kept by whoever made them.
class StringIds {
 public:
  void reserve(size_t count);
  // A string that is there already gets the new id.
  void set(string_view key, uint32_t id);
  uint32_t find(string_view key) const;  // kNoId if it is not there
  size_t size() const { return used_; }

 private:
  struct Slot {
    uint32_t hash = 0, id = kNoId;
  };
  vector<Slot> slots_;        // open addressing, a power of two
  vector<string_view> keys_;  // of the slots: apart, as most look-ups find nothing
  size_t used_ = 0;
};

// The model: bytes of a word to ids.
class Bpe {
 public:
  // Merges, best first, as ids: left, right, joined. `bytes` are the tokens' bytes by id, and
  // `ids` the ids by bytes, of those tokens that consist of bytes; both outlive this.
  struct Merge {
    uint32_t left, right, joined;
  };
  Bpe() = default;
  Bpe(const vector<Merge>& merges, const StringIds& ids, const vector<string_view>& bytes,
      bool ignore_merges);
  // Appends the ids of each word to `out`. The cache of `scratch` must belong to this.
  void encode(const string_view* words, size_t count, EncodeScratch::State& scratch,
              vector<uint32_t>& out) const;

 private:
  uint32_t rank_of(uint32_t left, uint32_t right) const;
  size_t merge_word(string_view word, EncodeScratch::State& scratch) const;
  size_t merge_long(vector<uint32_t>& ids) const;
  size_t encode_word(string_view word, EncodeScratch::State& scratch) const;

  vector<uint64_t> pairs_;       // left, right and rank; open addressing, a power of two
  vector<uint32_t> byte_ranks_;  // (256, 256) of pairs of bytes
  vector<uint32_t> joined_;      // by rank
  std::array<uint32_t, 256> byte_ids_{};
  const StringIds* ids_ = nullptr;
  vector<bool> whole_;  // by id: the token's bytes encode to the token itself
};

struct EncodeScratch::State {
  explicit State(size_t bytes) : cache_bytes(bytes) {}
  // Empties the cache unless it belongs to `tokenizer`.
  void use(const std::shared_ptr<const int>& tokenizer);

  // A word of up to 15 bytes is its own key: `low`, `high`, and its size in the top byte of
  // `high`. A longer one has its hash in `low`, 0xff in the top byte, and its bytes in `store`
  // behind its ids. More than three ids are in `store` from ids[0] on.
  struct Entry {
    uint64_t low = 0, high = 0;  // high 0: unused
    uint32_t ids[3] = {0, 0, 0};
    uint32_t count = 0;
  };
  const Entry* find(string_view word, uint64_t low, uint64_t high, uint64_t hash) const;
  void insert(string_view word, uint64_t low, uint64_t high, uint64_t hash, const uint32_t* ids,
              size_t count);
  void clear();

  size_t cache_bytes;
  std::shared_ptr<const int> owner;  // the tokenizer's identity: no other has it while we hold it
  vector<Entry> table;               // open addressing, a power of two
  size_t used = 0;
  vector<uint32_t> store;
  vector<uint32_t> ids, ranks;  // of the word at hand
  SplitBuffers split;
  string normalized, normalized_next;
};

// ---- tokenizer_load.cpp ----

struct NormalizerStep {
  enum Kind : uint8_t { Nfc, Prepend, Replace } kind;
  string text;          // to prepend, or the replacement
  vector<Regex> regex;  // one, of Replace
};

struct Tokenizer::Data {
  string path, file;  // the strings of the vocabulary lie in `file`
  uint64_t fingerprint = 0;
  std::shared_ptr<const int> identity = std::make_shared<const int>(0);

  vector<string_view> texts;  // by id, as the vocabulary writes it; empty: no token
  vector<string_view> bytes;  // by id, what it decodes to
  string byte_store;          // `bytes` lie here or in `texts`
  vector<bool> special;       // by id
  StringIds ids_by_bytes;     // tokens of the model that consist of bytes, so almost all of it
  StringIds ids_by_text;      // added tokens, and the rest of the model's
  vector<string> added_texts;

  CharTable chars;
  AddedTokens added, added_normalized;  // found before and after normalization
  vector<NormalizerStep> normalizer;
  vector<SplitStep> steps;
  Bpe bpe;
  vector<uint32_t> prefix, suffix;  // from the post-processor
  bool join_with_space = false;     // there is no decoder
  std::optional<uint32_t> eos, bos;

  uint32_t find_text(string_view text) const;  // kNoId if it is no token
  // `text` normalized, in it or in `buffer`.
  string_view normalize(string_view text, string& buffer, string& other) const;
};

std::unique_ptr<const Tokenizer::Data> load_tokenizer(const string& path);

// Appends the bytes that `text`, in GPT-2's visible characters for bytes, stands for. False,
// appending nothing, if it has other characters.
bool append_bytes(string_view text, string& out);

}  // namespace pith
