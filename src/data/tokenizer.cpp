#include "data/tokenizer.h"

#include "core/check.h"
#include "data/tokenizer_parts.h"

namespace pith {

Tokenizer Tokenizer::load(const string& path) { return Tokenizer(load_tokenizer(path)); }
Tokenizer::Tokenizer(std::unique_ptr<const Data> data) : data_(std::move(data)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&& o) noexcept {
  data_.swap(o.data_);
  return *this;
}
Tokenizer::~Tokenizer() = default;

// ---- encode ----

static void replace(const Regex& regex, string_view text, const string& replacement, string& out) {
  vector<Match> matches;
  MatchData data;
  regex.matches(text, data, matches);
  out.clear();
  for (const Match& m : matches)
    out += m.is_match ? string_view(replacement) : text.substr(m.begin, m.end - m.begin);
}

string_view Tokenizer::Data::normalize(string_view text, string& buffer, string& other) const {
  for (const NormalizerStep& step : normalizer) {
    if (text.empty()) return text;
    if (step.kind == NormalizerStep::Nfc) {
      if (!nfc(chars, text, other)) continue;
    } else if (step.kind == NormalizerStep::Prepend) {
      other = step.text;
      other += text;
    } else {
      replace(step.regex[0], text, step.text, other);
    }
    buffer.swap(other);
    text = buffer;
  }
  return text;
}

static void encode_words(const Tokenizer::Data& d, string_view text, EncodeScratch::State& scratch,
                         vector<uint32_t>& out) {
  if (d.steps.size() != 1 || d.steps[0].fast == FastPattern::None) {
    split(d.steps, d.chars, text, scratch.split);
    d.bpe.encode(scratch.split.pieces.data(), scratch.split.pieces.size(), scratch, out);
    return;
  }
  string_view words[256];
  const char *p = text.data(), *end = p + text.size();
  while (p < end) {
    const size_t count = fast_split(d.steps[0].fast, d.chars, p, end, words, std::size(words));
    d.bpe.encode(words, count, scratch, out);
  }
}

void Tokenizer::encode(string_view utf8, vector<uint32_t>& out, EncodeOptions options,
                       EncodeScratch& scratch) const {
  const Data& d = *data_;
  const size_t valid = valid_utf8_prefix(utf8);
  if (valid < utf8.size())
    bad_input(d.path, text("the text to encode is no UTF-8 (got a bad byte at %zu)", valid),
              "replace what is invalid");
  if (utf8.size() >= kNoId)
    bad_input(d.path, text("a document is too long (got %zu bytes, need < 4 GiB)", utf8.size()),
              "cut it into several");
  EncodeScratch::State& s = *scratch.state_;
  s.use(d.identity);
  if (options.add_special) out.insert(out.end(), d.prefix.begin(), d.prefix.end());
  const auto after_normalization = [&](string_view part) {
    cut_at_tokens(d.added_normalized, d.chars, part, options.parse_special,
                  [&](size_t begin, size_t end, const AddedToken* token) {
                    if (token)
                      out.push_back(token->id);
                    else
                      encode_words(d, part.substr(begin, end - begin), s, out);
                  });
  };
  cut_at_tokens(d.added, d.chars, utf8, options.parse_special,
                [&](size_t begin, size_t end, const AddedToken* token) {
                  const string_view part = utf8.substr(begin, end - begin);
                  if (token)
                    out.push_back(token->id);
                  else
                    after_normalization(d.normalize(part, s.normalized, s.normalized_next));
                });
  if (options.add_special) out.insert(out.end(), d.suffix.begin(), d.suffix.end());
}

// ---- decode ----

string Tokenizer::decode(std::span<const uint32_t> ids, SpecialTokens special) const {
  const Data& d = *data_;
  string bytes;
  bool first = true;
  for (const uint32_t id : ids) {
    if (token_text(id).empty() || (special == SpecialTokens::Skip && is_special(id))) continue;
    if (d.join_with_space && !first) bytes += ' ';
    bytes += d.join_with_space ? d.texts[id] : d.bytes[id];
    first = false;
  }
  return replace_invalid_utf8(bytes);
}

// ---- the vocabulary ----

uint32_t Tokenizer::Data::find_text(string_view text) const {
  const uint32_t id = ids_by_text.find(text);
  string as_bytes;
  return id == kNoId && append_bytes(text, as_bytes) ? ids_by_bytes.find(as_bytes) : id;
}

uint32_t Tokenizer::vocab_size() const { return uint32_t(data_->texts.size()); }
std::optional<uint32_t> Tokenizer::id_of(string_view token) const {
  const uint32_t id = data_->find_text(token);
  return id == kNoId ? std::nullopt : std::optional(id);
}
string_view Tokenizer::token_text(uint32_t id) const {
  return id < data_->texts.size() ? data_->texts[id] : string_view();
}
bool Tokenizer::is_special(uint32_t id) const {
  return id < data_->special.size() && data_->special[id];
}
std::optional<uint32_t> Tokenizer::eos_id() const { return data_->eos; }
std::optional<uint32_t> Tokenizer::bos_id() const { return data_->bos; }
uint64_t Tokenizer::fingerprint() const { return data_->fingerprint; }

}  // namespace pith
