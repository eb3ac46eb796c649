// tokenizer: byte-level BPE from a Hugging Face tokenizer.json, giving Hugging Face's ids.
//
//   Tokenizer tok = Tokenizer::load("tokenizer.json");   // shared by all threads
//   EncodeScratch scratch;                               // one a thread
//   tok.encode(text, ids, {}, scratch);                  // appends
//
// defines: EncodeOptions, EncodeScratch, SpecialTokens, Tokenizer, is_valid_utf8,
//          replace_invalid_utf8
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "core/check.h"

namespace pith {

struct EncodeOptions {
  // A special token's text inside a document ("<|endoftext|>") becomes that token, as Hugging
  // Face does. False: it is encoded as ordinary text (Hugging Face's encode_special_tokens =
  // True).
  bool parse_special = true;
  // Add the post-processor's special tokens, such as a leading BOS, as Hugging Face does.
  bool add_special = true;
};

// Buffers and the cache of already encoded words of one thread. Any scratch may be used with any
// tokenizer: it empties itself when the tokenizer changes. Ids never depend on what it holds.
class EncodeScratch {
 public:
  // The cache takes at most about `cache_bytes`; it starts small and is emptied when full.
  explicit EncodeScratch(size_t cache_bytes = size_t{64} << 20);
  EncodeScratch(EncodeScratch&&) noexcept;
  EncodeScratch& operator=(EncodeScratch&&) noexcept;
  ~EncodeScratch();

  struct State;

 private:
  friend class Tokenizer;
  std::unique_ptr<State> state_;
};

enum class SpecialTokens : uint8_t { Keep, Skip };

class Tokenizer {
 public:
  // Reads `path`, a tokenizer.json. Throws bad_input, naming the part, for a file that is
  // missing, damaged, or uses a model, normalizer, pre-tokenizer, post-processor, decoder or flag
  // that is not supported. The file's truncation and padding are not applied.
  static Tokenizer load(const string& path);
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  // Appends the ids of `utf8` to `out`. `utf8` must be valid UTF-8 (see replace_invalid_utf8);
  // otherwise throws bad_input with the byte offset. Thread-safe for distinct `out` and
  // `scratch`.
  void encode(string_view utf8, vector<uint32_t>& out, EncodeOptions options,
              EncodeScratch& scratch) const;

  // The text of `ids`; bytes that do not form UTF-8 become U+FFFD, ids without a token nothing,
  // as in Hugging Face.
  string decode(std::span<const uint32_t> ids, SpecialTokens special) const;

  // Largest id plus one, added tokens included.
  uint32_t vocab_size() const;
  std::optional<uint32_t> id_of(string_view token) const;
  // The token as the vocabulary writes it ("Ġthe"); empty for an id without a token. Valid as
  // long as the tokenizer.
  string_view token_text(uint32_t id) const;
  bool is_special(uint32_t id) const;

  // End-of-text and beginning-of-text tokens, from the first of: eos_token (bos_token) in a
  // tokenizer_config.json beside the file; eos_token_id in a config.json beside it (the first of
  // a list); an added token with a well-known name, in the order <|endoftext|>,
  // <｜end▁of▁sentence｜>, <|return|>, <|end_of_text|>, <|im_end|>, <eos>, </s>. Callers may use
  // id_of() to override. A named token that the vocabulary lacks is bad_input at load.
  std::optional<uint32_t> eos_id() const;
  std::optional<uint32_t> bos_id() const;

  // XXH3 of tokenizer.json's bytes: equal files, equal fingerprints.
  uint64_t fingerprint() const;

  struct Data;

 private:
  explicit Tokenizer(std::unique_ptr<const Data> data);
  std::unique_ptr<const Data> data_;
};

bool is_valid_utf8(string_view bytes);
// Python's bytes.decode("utf-8", errors="replace"): each maximal invalid part becomes U+FFFD.
string replace_invalid_utf8(string_view bytes);

}  // namespace pith
