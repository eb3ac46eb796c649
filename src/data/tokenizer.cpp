#include "data/tokenizer.h"

#include <algorithm>

#include "core/check.h"

namespace pith {

// ---- added tokens ----

AddedTokens::AddedTokens(vector<AddedToken> tokens) : tokens_(std::move(tokens)) {
  std::stable_sort(tokens_.begin(), tokens_.end(),
                   [](const auto& a, const auto& b) { return a.content < b.content; });
  for (const AddedToken& token : tokens_) starts_[uint8_t(token.content[0])] = true;
}

// The longest token that `text` starts with is the last one that is not above it in order, or that
// one's common part with `text` has it at its front.
const AddedToken* AddedTokens::longest_at_front(string_view text) const {
  while (!text.empty()) {
    const auto above =
        std::upper_bound(tokens_.begin(), tokens_.end(), text,
                         [](string_view a, const AddedToken& b) { return a < b.content; });
    if (above == tokens_.begin()) break;
    const AddedToken& token = above[-1];
    if (text.starts_with(token.content)) return &token;
    const auto differs =
        std::mismatch(text.begin(), text.end(), token.content.begin(), token.content.end());
    text = text.substr(0, size_t(differs.first - text.begin()));
  }
  return nullptr;
}

const AddedToken* AddedTokens::find(string_view text, size_t from, size_t& begin) const {
  if (tokens_.empty()) return nullptr;
  for (begin = from; begin < text.size(); begin++)
    if (starts_[uint8_t(text[begin])])
      if (const AddedToken* token = longest_at_front(text.substr(begin))) return token;
  return nullptr;
}

// ---- encode ----

void Tokenizer::encode_words(string_view text, EncodeScratch& scratch,
                             vector<uint32_t>& out) const {
  SplitBuffers& buffers = scratch.split_;
  if (steps.size() != 1 || !steps[0].fast) {
    split(steps, text, buffers);
    return bpe.encode(buffers.pieces, scratch, out);
  }
  while (!text.empty()) {  // some words at a time stay in the processor's cache
    buffers.pieces.clear();
    steps[0].fast(text, buffers.pieces, 256);
    bpe.encode(buffers.pieces, scratch, out);
  }
}

// The flags and size of the character at `at`, or of the one before it; 0 at the text's ends.
static Char flags_at(string_view text, size_t at) {
  if (at >= text.size()) return {0, 0};
  const Char c = decode_char(text.data() + at);
  return {char_flags()[c.code], c.size};
}

static Char flags_before(string_view text, size_t at) {
  if (at == 0) return {0, 0};
  do at--;
  while ((text[at] & 0xc0) == 0x80);
  return flags_at(text, at);
}

// Cuts `text` at added tokens as Hugging Face does: first at those found in the text as it is, and
// what is between them again, once normalized.
void Tokenizer::encode_text(string_view text, bool normalized, bool parse_special,
                            EncodeScratch& scratch, vector<uint32_t>& out) const {
  const auto encode_between = [&](size_t begin, size_t end) {
    const string_view part = text.substr(begin, end - begin);
    if (part.empty()) return;
    if (normalized) return encode_words(part, scratch, out);
    const bool changed = nfc && to_nfc(part, scratch.normalized_);
    encode_text(changed ? scratch.normalized_ : part, true, parse_special, scratch, out);
  };
  const AddedTokens& tokens = normalized ? added_normalized : added;
  size_t done = 0, from = 0, begin = 0;
  while (const AddedToken* token = tokens.find(text, from, begin)) {
    size_t end = from = begin + token->content.size();
    if (token->special && !parse_special) continue;
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

void Tokenizer::encode(string_view utf8, vector<uint32_t>& out, EncodeOptions options,
                       EncodeScratch& scratch) const {
  const size_t valid = valid_utf8_prefix(utf8);
  if (valid < utf8.size())
    bad_input(path, text("the text to encode is no UTF-8 (got a bad byte at %zu)", valid),
              "replace what is invalid");
  scratch.use(file_hash);
  if (options.add_special) out.insert(out.end(), prefix.begin(), prefix.end());
  encode_text(utf8, false, options.parse_special, scratch, out);
  if (options.add_special) out.insert(out.end(), suffix.begin(), suffix.end());
}

// ---- decode ----

string Tokenizer::decode(std::span<const uint32_t> tokens, SpecialTokens which) const {
  string out;
  bool first = true;
  for (const uint32_t id : tokens) {
    if (token_text(id).empty() || (which == SpecialTokens::Skip && is_special(id))) continue;
    if (join_with_space && !first) out += ' ';
    out += join_with_space || bytes[id].empty() ? texts[id] : bytes[id];
    first = false;
  }
  return replace_invalid_utf8(out);
}

std::optional<uint32_t> Tokenizer::id_of(string_view token) const {
  const auto known = ids.find(token);
  return known == ids.end() ? std::nullopt : std::optional(known->second);
}

}  // namespace pith
