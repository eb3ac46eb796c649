#include <rapidjson/document.h>
#include <rapidjson/error/en.h>
#include <rapidjson/stringbuffer.h>
#include <rapidjson/writer.h>
#include <xxhash.h>

#include <algorithm>
#include <bitset>
#include <filesystem>

#include "core/json.h"
#include "data/tokenizer.h"

namespace pith {

static const char* const kRefetch = "fetch the file again";
static const char* const kOther = "a byte-level BPE tokenizer, as Qwen, DeepSeek and GPT-OSS have";
static const char* const kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
static constexpr u32 kMostIds = 1u << kIdBits, kMostMerges = 1u << kRankBits;

// The byte that one of GPT-2's characters stands for, or -1. Visible Latin-1 stands for itself, the
// other bytes follow in order from U+0100 on.
static int byte_of(u32 code) {
  if ((code >= 0x21 && code <= 0x7e) || (code >= 0xa1 && code <= 0xff && code != 0xad))
    return int(code);
  if (code >= 0x100 && code <= 0x120) return int(code - 0x100);
  if (code >= 0x121 && code <= 0x142) return int(code - 0x121 + 0x7f);
  return code == 0x143 ? 0xad : -1;
}

// The bytes that a token stands for; empty if it has other characters than GPT-2's.
static string bytes_of(string_view token) {
  string out;
  for (size_t at = 0; at < token.size();) {
    const Char c = decode_char(token.data() + at);
    const int byte = byte_of(c.code);
    if (byte < 0) return "";
    out += char(byte);
    at += c.size;
  }
  return out;
}

using Value = rapidjson::Value;

static string_view view(const Value& value) {
  return value.IsString() ? string_view(value.GetString(), value.GetStringLength()) : "";
}

[[noreturn]] static void unsupported(const Json& json, const string& got) {
  bad_input(json.place(), "is not supported (got " + got + ")", kOther);
}

static string type_of(const Json& component) { return component["type"].as_string(); }

// What a component consists of: itself, or a Sequence's `members`.
static vector<Json> components(const Json& json, const char* members) {
  if (json.is_null()) return {};
  if (type_of(json) != "Sequence") return {json};
  vector<Json> out;
  const Json parts = json[members];
  for (i64 i = 0; i < parts.size(); i++)
    for (const Json& part : components(parts[i], members)) out.push_back(part);
  return out;
}

static string_view keep(TokenizerTables& t, string text) {
  return t.strings.emplace_back(std::move(text));
}

static bool is_token(const TokenizerTables& t, u64 id) {
  return id < t.texts.size() && !t.texts[id].empty();
}

// Parses the file in place, and returns all of it but the large `vocabulary` and `merges`.
static Json parse(TokenizerTables& t, rapidjson::Document& document, Value& vocabulary,
                  Value& merges) {
  string& file = t.strings.emplace_back(read_text_file(t.path));
  t.file_hash = XXH3_64bits(file.data(), file.size());
  document.ParseInsitu<rapidjson::kParseValidateEncodingFlag | rapidjson::kParseIterativeFlag>(
      file.data());
  if (document.HasParseError())
    bad_input(t.path,
              text("is damaged or cut short: %s (got that at byte %zu of %zu)",
                   rapidjson::GetParseError_En(document.GetParseError()), document.GetErrorOffset(),
                   file.size()),
              kRefetch);
  if (!document.IsObject() || !document.HasMember("model") || !document["model"].IsObject())
    bad_input(t.path, "is no tokenizer.json: it has no \"model\"", kRefetch);
  Value& model = document["model"];
  if (model.HasMember("vocab")) vocabulary = model["vocab"];
  if (model.HasMember("merges")) merges = model["merges"];
  rapidjson::StringBuffer rest;
  rapidjson::Writer<rapidjson::StringBuffer> writer(rest);
  document.Accept(writer);
  return Json::parse(rest.GetString(), t.path);
}

// `name` is how the vocabulary knows the token, `text` how it is found in a document.
static void set_token(TokenizerTables& t, u32 id, string_view name, string_view text) {
  const size_t ids = max<size_t>(t.texts.size(), id + 1);
  t.texts.resize(ids);
  t.bytes.resize(ids);
  t.special.resize(ids);
  t.ids[name] = id;
  t.texts[id] = text;
  t.bytes[id] = keep(t, bytes_of(text));
}

static vector<Bpe::Merge> read_merges(const TokenizerTables& t, const Value& merges) {
  vector<Bpe::Merge> out;
  for (rapidjson::SizeType i = 0; i < merges.Size(); i++) {
    const Value& merge = merges[i];
    string pair(view(merge));  // "left right", the older form
    if (merge.IsArray() && merge.Size() == 2)
      pair = string(view(merge[0])) + " " + string(view(merge[1]));
    const size_t space = min(pair.find(' '), pair.size());
    const string left = pair.substr(0, space), right = pair.substr(space + (space < pair.size()));
    const u32 ids[] = {t.find(left), t.find(right), t.find(left + right)};
    if (std::count(ids, ids + 3, kNoId))
      bad_input(t.path + text(": model.merges[%u]", i), "is no pair of tokens that make a token",
                kRefetch);
    out.push_back({ids[0], ids[1], ids[2]});
  }
  return out;
}

static void read_model(TokenizerTables& t, const Json& model, const Value& vocabulary,
                       const Value& merges) {
  if (model.string_or("type", "BPE") != "BPE") unsupported(model["type"], model["type"].dump());
  for (const char* key :
       {"dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"}) {
    const string value = model.has(key) ? model[key].dump() : "null";
    if (value != "null" && value != "false" && value != "\"\"" && value != "0.0")
      unsupported(model[key], value);
  }
  if (!vocabulary.IsObject() || vocabulary.MemberCount() == 0)
    bad_input(model.place() + ".vocab", "is missing, empty, or not of BPE", kOther);
  if (!merges.IsArray() || merges.Size() >= kMostMerges)
    bad_input(model.place() + ".merges", text("is no list of less than %u", kMostMerges), kOther);
  for (const auto& [name, id] : vocabulary.GetObject()) {
    if (!id.IsUint() || id.GetUint() >= kMostIds)
      bad_input(model.place() + ".vocab." + name.GetString(),
                text("is no id (need a number < %u)", kMostIds), kRefetch);
    set_token(t, id.GetUint(), view(name), view(name));
  }
  if (!model.string_or("unk_token", "").empty()) {  // which bytes without a token would become
    std::bitset<256> known;
    for (const string_view bytes : t.bytes)
      if (bytes.size() == 1) known.set(u8(bytes[0]));
    if (!known.all())
      bad_input(model.place(), "has an unk_token, but not a token of every byte", kOther);
  }
  t.bpe = Bpe(read_merges(t, merges), t.bytes, model.bool_or("ignore_merges", false));
}

// Ids as Hugging Face gives them: the model's, or the next free one. A file that says otherwise is
// refused.
static void read_added(TokenizerTables& t, const Json& tokens) {
  vector<AddedToken> plain, normalized;
  string buffer, other;
  u32 next_id = t.ids.size();
  for (i64 i = 0; i < tokens.size(); i++) {
    const Json json = tokens[i];
    const string content = json["content"].as_string();
    if (content.empty()) continue;
    AddedToken token{.id = t.find(content),
                     .single_word = json["single_word"].as_bool(),
                     .lstrip = json["lstrip"].as_bool(),
                     .rstrip = json["rstrip"].as_bool(),
                     .special = json["special"].as_bool()};
    if (token.id == kNoId) token.id = next_id++;
    const i64 said = json["id"].as_int(0, kMostIds - 1);
    if (said != token.id)
      bad_input(json.place(),
                text("has another id in Hugging Face (got %ld, need %u)", said, token.id),
                kRefetch);
    const bool is_normalized = json["normalized"].as_bool();
    token.content = is_normalized ? t.normalize(content, buffer, other) : content;
    if (token.content.empty())
      bad_input(json.place(), "is normalized to nothing (got \"" + content + "\")", kOther);
    set_token(t, token.id, keep(t, content), keep(t, token.content));
    t.special[token.id] = token.special;
    (is_normalized ? normalized : plain).push_back(std::move(token));
  }
  t.added = AddedTokens(std::move(plain));
  t.added_normalized = AddedTokens(std::move(normalized));
}

// A regular expression that matches `literal`.
static string escape(const string& literal) {
  string out;
  for (const char c : literal) out += isalnum(c) || c < 0 ? string(1, c) : string("\\") + c;
  return out;
}

// The regular expression of a Split or Replace.
static string pattern_of(const Json& json) {
  const Json pattern = json["pattern"];
  return pattern.has("String") ? escape(pattern["String"].as_string())
                               : pattern["Regex"].as_string();
}

static void read_normalizer(TokenizerTables& t, const Json& json) {
  const string type = type_of(json);
  if (type == "NFC")
    t.normalizer.push_back({NormalizerStep::Nfc, "", {}});
  else if (type == "Prepend")
    t.normalizer.push_back({NormalizerStep::Prepend, json["prepend"].as_string(), {}});
  else if (type == "Replace")
    t.normalizer.push_back({NormalizerStep::Replace, json["content"].as_string(),
                            Regex(pattern_of(json), json["pattern"].place())});
  else
    unsupported(json, "the normalizer " + type);
}

static void read_pre_tokenizer(TokenizerTables& t, const Json& json) {
  static const char* const kBehaviors[] = {"Removed", "Isolated", "MergedWithPrevious",
                                           "MergedWithNext", "Contiguous"};
  const string type = type_of(json);
  if (type == "Split") {
    const string behavior = json["behavior"].as_string();
    const auto at = std::find(std::begin(kBehaviors), std::end(kBehaviors), behavior);
    if (at == std::end(kBehaviors)) unsupported(json["behavior"], behavior);
    t.steps.emplace_back(pattern_of(json), json["pattern"].place(),
                         static_cast<SplitBehavior>(at - std::begin(kBehaviors)),
                         json["invert"].as_bool());
  } else if (type == "Digits") {
    t.steps.emplace_back(json["individual_digits"].as_bool() ? "\\p{N}" : "\\p{N}+", json.place());
  } else if (type == "ByteLevel") {
    if (json["add_prefix_space"].as_bool()) t.steps.emplace_back();
    if (json.bool_or("use_regex", true)) t.steps.emplace_back(kGpt2Pattern, json.place());
  } else {
    unsupported(json, "the pre-tokenizer " + type);
  }
}

static void read_template(TokenizerTables& t, const Json& json) {
  const Json single = json["single"];
  i64 sequences = 0;
  for (i64 i = 0; i < single.size(); i++) {
    sequences += single[i].has("Sequence");
    if (single[i].has("Sequence")) continue;
    const string name = single[i]["SpecialToken"]["id"].as_string();
    for (const i64 id : json["special_tokens"][name]["ids"].as_ints()) {
      if (!is_token(t, id))
        bad_input(json.place() + ".special_tokens." + name, text("is no token (got id %ld)", id),
                  kRefetch);
      (sequences ? t.suffix : t.prefix).push_back(u32(id));
    }
  }
  if (sequences != 1) unsupported(single, text("%ld sequences", sequences));
}

// In the files beside tokenizer.json a token is a string, an object with "content", an id, or a
// list of ids, of which the first counts.
static std::optional<u32> find_eos(const TokenizerTables& t) {
  static const std::pair<const char*, const char*> kPlaces[] = {
      {"tokenizer_config.json", "eos_token"}, {"config.json", "eos_token_id"}};
  for (const auto& [file, key] : kPlaces) {
    const string path = (std::filesystem::path(t.path).parent_path() / file).string();
    if (!std::filesystem::exists(path)) continue;
    const Json json = Json::parse_file(path);
    if (!json.has(key) || json[key].is_null()) continue;
    Json value = json[key];
    if (value.is_array()) value = value[0];
    if (value.is_object()) value = value["content"];
    const u32 id = value.is_number() ? value.as_int(0, kMostIds) : t.find(value.as_string());
    if (!is_token(t, id))
      bad_input(value.place(), "is no token of " + t.path + " (got " + value.dump() + ")",
                "use the files of one model");
    return id;
  }
  for (const char* name : {"<|endoftext|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|return|>",
                           "<|end_of_text|>", "<|im_end|>", "<eos>", "</s>"})
    if (const u32 id = t.find(name); id != kNoId) return id;
  return std::nullopt;
}

Tokenizer Tokenizer::load(const string& path) {
  Tokenizer t;
  t.path = path;
  rapidjson::Document document;
  Value vocabulary, merges;
  const Json json = parse(t, document, vocabulary, merges);
  if (json.string_or("version", "1.0") != "1.0")
    unsupported(json["version"], json["version"].dump());
  const auto parts = [&](const char* key, const char* members) {
    return components(json.has(key) ? json[key] : Json(), members);
  };
  read_model(t, json["model"], vocabulary, merges);
  for (const Json& part : parts("normalizer", "normalizers")) read_normalizer(t, part);
  bool byte_level = false;
  for (const Json& part : parts("pre_tokenizer", "pretokenizers")) {
    if (byte_level) unsupported(part, "a pre-tokenizer behind ByteLevel");
    read_pre_tokenizer(t, part);
    byte_level = type_of(part) == "ByteLevel";
  }
  if (!byte_level)
    bad_input(path + ": pre_tokenizer", "has no ByteLevel, so is no byte-level BPE", kOther);
  if (json.has("added_tokens")) read_added(t, json["added_tokens"]);
  for (const Json& part : parts("post_processor", "processors")) {
    if (type_of(part) == "TemplateProcessing")
      read_template(t, part);
    else if (type_of(part) != "ByteLevel")  // which changes no ids
      unsupported(part, "the post-processor " + type_of(part));
  }
  t.join_with_space = true;
  for (const Json& part : parts("decoder", "decoders")) {
    if (type_of(part) != "ByteLevel") unsupported(part, "the decoder " + type_of(part));
    t.join_with_space = false;
  }
  t.eos = find_eos(t);
  return t;
}

}
