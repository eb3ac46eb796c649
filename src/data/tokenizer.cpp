#include "data/tokenizer.h"

#include <algorithm>

namespace pith {

void AddedTokens::add(const AddedToken& token) {
  starts_[u8(token.content[0])] = true;
  tokens_[token.content] = token;
}

// The longest token in front of `rest` is the last one not above it in order, or is in front of
// what that one shares with it.
const AddedToken* AddedTokens::find(string_view text, size_t from, size_t& begin) const {
  if (tokens_.empty()) return nullptr;
  for (begin = from; begin < text.size(); begin++) {
    if (!starts_[u8(text[begin])]) continue;
    for (string_view rest = text.substr(begin); !rest.empty();) {
      auto at = tokens_.upper_bound(rest);
      if (at == tokens_.begin()) break;
      const auto& [content, token] = *--at;
      if (rest.starts_with(content)) return &token;
      rest = rest.substr(0, std::ranges::mismatch(rest, content).in1 - rest.begin());
    }
  }
  return nullptr;
}

// The flags and size of the character at `at`, or of the one before it; 0 at the text's ends.
static Char flags_at(string_view text, size_t at) {
  if (at >= text.size()) return {0, 0};
  const Char c = decode_char(text.data() + at);
  return {char_flags()[c.code], c.size};
}

static Char flags_before(string_view text, size_t at) {
  if (at == 0) return {0, 0};
  return flags_at(text, char_before(text.data() + at) - text.data());
}

// Cuts `text` at added tokens, and what is between them again, once normalized.
void Tokenizer::encode_text(string_view text, bool normalized, bool special_as_text,
    EncodeScratch& scratch, vector<u32>& out) const {
  auto encode_between = [&](size_t begin, size_t end) {
    string_view part = text.substr(begin, end - begin);
    if (!normalized) {
      if (nfc) part = to_nfc(part, scratch.normalized);
      return encode_text(part, true, special_as_text, scratch, out);
    }
    split(steps, part, scratch.buffers);
    bpe.encode(scratch.buffers.pieces, scratch, out);
  };
  size_t done = 0, from = 0, begin = 0;
  while (const AddedToken* token = added[normalized].find(text, from, begin)) {
    size_t end = from = begin + token->content.size();
    if (token->special && special_as_text) continue;
    Char before = flags_before(text, begin), after = flags_at(text, end);
    if (token->single_word && ((before.code | after.code) & kWordChar)) continue;
    for (; token->lstrip && begin > done && before.code & kSpace;
         before = flags_before(text, begin))
      begin -= before.size;
    for (; token->rstrip && after.code & kSpace; after = flags_at(text, end)) end += after.size;
    encode_between(done, begin);
    out.push_back(token->id);
    done = end;
  }
  encode_between(done, text.size());
}

void Tokenizer::encode(
    string_view utf8, vector<u32>& out, bool special_as_text, EncodeScratch& scratch) const {
  size_t valid = valid_utf8_prefix(utf8);
  if (valid < utf8.size())
    bad_input(path, text("the text to encode is no UTF-8 (got a bad byte at %zu)", valid),
        "replace what is invalid");
  encode_text(utf8, false, special_as_text, scratch, out);
}

string Tokenizer::decode(std::span<const u32> tokens, SpecialTokens which) const {
  string out;
  for (const u32 id : tokens)
    if (id < vocab_size() && (which == SpecialTokens::Keep || !special[id]))
      out += bytes[id].empty() ? texts[id] : bytes[id];
  return replace_invalid_utf8(out);
}

std::optional<u32> Tokenizer::id_of(string_view token) const {
  auto known = ids.find(token);
  return known == ids.end() ? std::nullopt : std::optional(known->second);
}

}
