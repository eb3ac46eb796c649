#include "app/held_out.h"

#include <filesystem>
#include <numbers>

#include "data/tokenizer.h"

namespace pith {
namespace fs = std::filesystem;

string find_tokenizer(const string& path) {
  for (fs::path at = fs::absolute(path);; at = at.parent_path()) {
    if (fs::exists(at / "tokenizer.json")) return at / "tokenizer.json";
    if (at == at.parent_path()) return "";
  }
}

// Bytes of text each id stands for: a byte-level vocabulary writes a byte as one character.
static vector<int32_t> token_bytes(const Tokenizer& tokenizer) {
  vector<int32_t> bytes(tokenizer.vocab_size(), 0);
  for (uint32_t id = 0; id < bytes.size(); id++) {
    if (tokenizer.is_special(id)) continue;
    for (const char c : tokenizer.token_text(id)) bytes[id] += (c & 0xC0) != 0x80;
  }
  return bytes;
}

HeldOutText held_out_text(const Dataset& data, const string& tokenizer) {
  HeldOutText text;
  const vector<int32_t> bytes =
      tokenizer.empty() ? vector<int32_t>{} : token_bytes(Tokenizer::load(tokenizer));
  const int64_t length = data.options().seq_length;
  vector<int32_t> tokens(length), labels(length);
  for (int64_t i = 0; i < data.heldout_samples(); i++) {
    data.heldout_sample(i, {tokens.data(), labels.data(), nullptr});
    for (const int32_t label : labels) {
      if (label == kIgnoreLabel) continue;
      text.labels++;
      if (size_t(label) < bytes.size()) text.bytes += bytes[label];
    }
  }
  return text;
}

double bits_per_byte(double nats, const HeldOutText& text) {
  if (text.bytes == 0) return 0;
  return nats * double(text.labels) / std::numbers::ln2 / double(text.bytes);
}

}  // namespace pith
