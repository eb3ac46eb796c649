// tokenizer: byte-level BPE from a tokenizer.json, giving Hugging Face's ids.
#pragma once
#include <deque>

#include "data/tokenizer_parts.h"

namespace pith {

struct EncodeOptions {
  // Special tokens' text in a document becomes those tokens. False is Hugging Face's
  // encode_special_tokens.
  bool parse_special = true;
  // Add the post-processor's special tokens, such as a leading BOS.
  bool add_special = true;
};

enum class SpecialTokens : u8 { Keep, Skip };

// What tokenizer.json says.
struct TokenizerTables {
  string path;
  u64 file_hash = 0;
  std::deque<string> strings;  // where the tokens' text and bytes lie
  vector<string_view> texts;   // by id; empty: no token
  vector<string_view> bytes;   // by id: what it stands for; empty: its text
  vector<bool> special;        // by id
  std::unordered_map<string_view, u32> ids;
  AddedTokens added, added_normalized;  // found before and after normalization
  vector<NormalizerStep> normalizer;
  vector<SplitStep> steps;
  Bpe bpe;
  vector<u32> prefix, suffix;    // from the post-processor
  bool join_with_space = false;  // there is no decoder
  std::optional<u32> eos;

  u32 find(string_view token) const;  // kNoId if there is none
  // `text` normalized: itself, or in `buffer`, which `other` helps to fill.
  string_view normalize(string_view text, string& buffer, string& other) const;
};

// Shared by all threads, each with an EncodeScratch of its own.
class Tokenizer : TokenizerTables {
 public:
  // Throws bad_input, naming the part, for a file that is missing, damaged, or uses what is not
  // supported. The file's truncation and padding are not applied.
  static Tokenizer load(const string& path);
  Tokenizer(Tokenizer&&) = default;
  Tokenizer& operator=(Tokenizer&&) = default;

  // Appends the ids of `utf8`. Throws bad_input with the byte offset where it is not valid UTF-8.
  void encode(string_view utf8, vector<u32>& out, EncodeOptions options,
              EncodeScratch& scratch) const;
  // The text of `tokens`; bytes that do not form UTF-8 become U+FFFD, ids without a token nothing,
  // as in Hugging Face.
  string decode(std::span<const u32> tokens, SpecialTokens which) const;

  u32 vocab_size() const { return u32(texts.size()); }  // largest id plus one
  std::optional<u32> id_of(string_view token) const;
  // As the vocabulary writes it ("Ġthe"), while the tokenizer lives; empty for an id without one.
  string_view token_text(u32 id) const { return id < texts.size() ? texts[id] : ""; }
  bool is_special(u32 id) const { return id < special.size() && special[id]; }
  // End-of-text, from the first of: eos_token in a tokenizer_config.json beside the file;
  // eos_token_id in a config.json beside it (the first of a list); a token with a well-known name,
  // such as <|endoftext|>. A named token that the vocabulary lacks is bad_input at load.
  std::optional<u32> eos_id() const { return eos; }
  // XXH3 of tokenizer.json.
  u64 fingerprint() const { return file_hash; }

 private:
  Tokenizer() = default;
  void encode_text(string_view text, bool normalized, bool parse_special, EncodeScratch& scratch,
                   vector<u32>& out) const;
  void encode_words(string_view text, EncodeScratch& scratch, vector<u32>& out) const;
};

bool is_valid_utf8(string_view bytes);
// Python's bytes.decode("utf-8", errors="replace"): each maximal invalid part becomes U+FFFD.
string replace_invalid_utf8(string_view bytes);

}
