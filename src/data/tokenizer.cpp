#include "data/tokenizer.h"

#include <algorithm>

namespace pith {

AddedTokens::AddedTokens(vector<AddedToken> tokens) : tokens_(std::move(tokens)) {
  std::stable_sort(tokens_.begin(), tokens_.end(),
                   [](const auto& a, const auto& b) { return a.content < b.content; });
  for (const AddedToken& token : tokens_) starts_[u8(token.content[0])] = true;
}

// The longest token at the front of `rest` is the last one that is not above it in order, or is at
// the front of what that one shares with it.
const AddedToken* AddedTokens::find(string_view text, size_t from, size_t& begin) const {
  if (tokens_.empty()) return nullptr;
  const auto above = [](string_view a, const AddedToken& b) { return a < b.content; };
  for (begin = from; begin < text.size(); begin++) {
    if (!starts_[u8(text[begin])]) continue;
    for (string_view rest = text.substr(begin); !rest.empty();) {
      const auto at = std::upper_bound(tokens_.begin(), tokens_.end(), rest, above);
      if (at == tokens_.begin()) break;
      const string& token = at[-1].content;
      if (rest.starts_with(token)) return &at[-1];
      const auto differs = std::mismatch(rest.begin(), rest.end(), token.begin(), token.end());
      rest = rest.substr(0, size_t(differs.first - rest.begin()));
    }
  }
  return nullptr;
}

void Tokenizer::encode_words(string_view text, EncodeScratch& scratch, vector<u32>& out) const {
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
  return flags_at(text, size_t(char_before(text.data() + at) - text.data()));
}

// Cuts `text` at added tokens as Hugging Face does: first at those found in the text as it is, and
// what is between them again, once normalized.
void Tokenizer::encode_text(string_view text, bool normalized, bool parse_special,
                            EncodeScratch& scratch, vector<u32>& out) const {
  const auto encode_between = [&](size_t begin, size_t end) {
    const string_view part = text.substr(begin, end - begin);
    if (part.empty()) return;
    if (normalized) return encode_words(part, scratch, out);
    encode_text(normalize(part, scratch.normalized_, scratch.next_), true, parse_special, scratch,
                out);
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

void Tokenizer::encode(string_view utf8, vector<u32>& out, EncodeOptions options,
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

string Tokenizer::decode(std::span<const u32> tokens, SpecialTokens which) const {
  string out;
  for (const u32 id : tokens) {
    if (token_text(id).empty() || (which == SpecialTokens::Skip && is_special(id))) continue;
    if (join_with_space && !out.empty()) out += ' ';
    out += join_with_space || bytes[id].empty() ? texts[id] : bytes[id];
  }
  return replace_invalid_utf8(out);
}

string_view TokenizerTables::normalize(string_view text, string& buffer, string& other) const {
  for (const NormalizerStep& step : normalizer) {
    if (text.empty()) break;
    if (step.kind == NormalizerStep::Nfc && !to_nfc(text, other)) continue;
    if (step.kind == NormalizerStep::Prepend) other.assign(step.text).append(text);
    if (step.kind == NormalizerStep::Replace) {
      vector<Match> matches;
      std::shared_ptr<void> room;
      step.regex->matches(text, room, matches);
      other.clear();
      for (const Match& m : matches)
        other += m.is_match ? string_view(step.text) : text.substr(m.begin, m.end - m.begin);
    }
    buffer.swap(other);
    text = buffer;
  }
  return text;
}

u32 TokenizerTables::find(string_view token) const {
  const auto known = ids.find(token);
  return known == ids.end() ? kNoId : known->second;
}

std::optional<u32> Tokenizer::id_of(string_view token) const {
  const u32 id = find(token);
  return id == kNoId ? std::nullopt : std::optional(id);
}

}
