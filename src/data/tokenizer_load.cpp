#include "core/json.h"
#include "data/tokenizer.h"

namespace pith {

static const char* const kRefetch = "fetch the file again";
static const char* const kOther = "a byte-level BPE tokenizer, as that of Qwen";
static const char* const kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
static constexpr u32 kMostIds = 1u << kIdBits, kMostMerges = 1u << kRankBits;

// The bytes that GPT-2's characters stand for: visible Latin-1 for itself, the others in order from
// U+0100 on. Empty if `token` has other characters.
static string bytes_of(string_view token) {
  static const auto kBytes = [] {
    vector<int> bytes(0x144, -1);
    for (int byte = 0, next = 0x100; byte < 256; byte++) {
      bool visible = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte != 0xad);
      bytes[visible ? byte : next++] = byte;
    }
    return bytes;
  }();
  string out;
  for (size_t at = 0; at < token.size();) {
    const Char c = decode_char(token.data() + at);
    if (c.code >= kBytes.size() || kBytes[c.code] < 0) return "";
    out += char(kBytes[c.code]);
    at += c.size;
  }
  return out;
}

[[noreturn]] static void unsupported(const Json& json, const string& got) {
  bad_input(json.place(), "is not supported (got " + got + ")", kOther);
}

static string type_of(const Json& part) { return part["type"].as_string(); }

// Nothing, itself, or a Sequence's `members`.
static vector<Json> parts_of(const Json& file, const char* key, const char* members) {
  if (!file.has(key) || file[key].is_null()) return {};
  Json json = file[key];
  if (type_of(json) != "Sequence") return {json};
  vector<Json> parts;
  for (i64 i = 0; i < json[members].size(); i++) parts.push_back(json[members][i]);
  return parts;
}

// Other parts than `type` are refused.
static size_t only(const Json& file, const char* key, const char* members, const string& type) {
  vector<Json> parts = parts_of(file, key, members);
  for (const Json& part : parts)
    if (type_of(part) != type) unsupported(part, "the " + string(key) + " " + type_of(part));
  return parts.size();
}

static void set_token(Tokenizer& t, u32 id, const string& content) {
  size_t count = max<size_t>(t.texts.size(), id + 1);
  t.texts.resize(count);
  t.bytes.resize(count);
  t.special.resize(count);
  t.texts[id] = t.strings.emplace_back(content);
  t.bytes[id] = t.strings.emplace_back(bytes_of(content));
  t.ids[t.texts[id]] = id;
}

static void read_model(Tokenizer& t, const Json& model) {
  if (model.string_or("type", "BPE") != "BPE") unsupported(model["type"], model["type"].dump());
  for (const char* key : {"dropout", "unk_token", "byte_fallback", "continuing_subword_prefix",
           "end_of_word_suffix"}) {
    string value = model.has(key) ? model[key].dump() : "null";
    if (value != "null" && value != "false" && value != "\"\"" && value != "0.0")
      unsupported(model[key], value);
  }
  Json vocabulary = model["vocab"], list = model["merges"];
  for (const string& token : vocabulary.keys()) {
    i64 id = vocabulary[token].as_int();
    if (id < 0 || id >= kMostIds)
      bad_input(model.place() + ".vocab." + token, text("is no id (need a number < %u)", kMostIds),
          kRefetch);
    set_token(t, u32(id), token);
  }
  if (list.size() >= kMostMerges)
    bad_input(list.place(), text("is no list of less than %u", kMostMerges), kOther);
  vector<Bpe::Merge> merges;
  for (i64 i = 0; i < list.size(); i++) {
    Json merge = list[i];  // ["left", "right"], or in older files "left right"
    string left, right;
    if (merge.is_array()) {
      left = merge[0].as_string();
      right = merge[1].as_string();
    } else {
      string pair = merge.as_string();
      left = pair.substr(0, pair.find(' '));
      right = pair.substr(min(left.size() + 1, pair.size()));
    }
    auto a = t.id_of(left), b = t.id_of(right), joined = t.id_of(left + right);
    if (!a || !b || !joined)
      bad_input(merge.place(), "is no pair of tokens that make a token", kRefetch);
    merges.push_back({*a, *b, *joined});
  }
  t.bpe = Bpe(merges, t.bytes, model.bool_or("ignore_merges", false));
}

// Ids as Hugging Face gives them: the model's, or the next free one.
static void read_added(Tokenizer& t, const Json& tokens) {
  u32 next_id = t.ids.size();
  for (i64 i = 0; i < tokens.size(); i++) {
    Json json = tokens[i];
    bool normalized = json["normalized"].as_bool();
    string buffer, content = json["content"].as_string();
    if (content.empty()) continue;
    auto known = t.id_of(content);
    if (normalized && t.nfc) content = to_nfc(content, buffer);
    const AddedToken token{.content = content,
        .id = known ? *known : next_id++,
        .single_word = json["single_word"].as_bool(),
        .lstrip = json["lstrip"].as_bool(),
        .rstrip = json["rstrip"].as_bool(),
        .special = json["special"].as_bool()};
    i64 said = json["id"].as_int(0, kMostIds - 1);
    if (said != token.id)
      bad_input(json.place(),
          text("has another id in Hugging Face (got %ld, need %u)", said, token.id), kRefetch);
    set_token(t, token.id, content);
    t.special[token.id] = token.special;
    t.added[normalized].add(token);
  }
}

static void read_pre_tokenizer(Tokenizer& t, const Json& json) {
  string type = type_of(json);
  if (type == "Split") {
    string behavior = json["behavior"].as_string();
    if (behavior != "Isolated") unsupported(json["behavior"], behavior);
    if (json["invert"].as_bool()) unsupported(json["invert"], "true");
    Json pattern = json["pattern"]["Regex"];
    t.steps.emplace_back(pattern.as_string(), pattern.place());
  } else if (type == "Digits") {
    t.steps.emplace_back(json["individual_digits"].as_bool() ? "\\p{N}" : "\\p{N}+", json.place());
  } else if (type == "ByteLevel") {
    if (json["add_prefix_space"].as_bool()) unsupported(json["add_prefix_space"], "true");
    if (json.bool_or("use_regex", true)) t.steps.emplace_back(kGpt2Pattern, json.place());
  } else {
    unsupported(json, "the pre-tokenizer " + type);
  }
}

Tokenizer Tokenizer::load(const string& path) {
  Tokenizer t;
  t.path = path;
  Json json = Json::parse_file(path);
  if (!json.has("model")) bad_input(path, "is no tokenizer.json: it has no \"model\"", kRefetch);
  if (json.string_or("version", "1.0") != "1.0")
    unsupported(json["version"], json["version"].dump());
  read_model(t, json["model"]);
  t.nfc = only(json, "normalizer", "normalizers", "NFC") > 0;
  bool byte_level = false;
  for (const Json& part : parts_of(json, "pre_tokenizer", "pretokenizers")) {
    if (byte_level) unsupported(part, "a pre-tokenizer behind ByteLevel");
    read_pre_tokenizer(t, part);
    byte_level = type_of(part) == "ByteLevel";
  }
  if (!byte_level)
    bad_input(path + ": pre_tokenizer", "has no ByteLevel, so is no byte-level BPE", kOther);
  if (json.has("added_tokens")) read_added(t, json["added_tokens"]);
  only(json, "post_processor", "processors", "ByteLevel");  // which changes no ids
  if (only(json, "decoder", "decoders", "ByteLevel") == 0)
    bad_input(path + ": decoder", "is missing", kOther);
  for (const char* name :
      {"<|endoftext|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|return|>", "</s>"})
    if (!t.eos_id) t.eos_id = t.id_of(name);
  return t;
}

}
