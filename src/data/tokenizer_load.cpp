#include <rapidjson/document.h>
#include <rapidjson/error/en.h>
#include <rapidjson/stringbuffer.h>
#include <rapidjson/writer.h>
#include <xxhash.h>

#include <algorithm>
#include <filesystem>
#include <map>

#include "core/check.h"
#include "core/json.h"
#include "data/tokenizer_parts.h"

namespace pith {

static const char* const kRefetch = "fetch the file again";
static const char* const kOther = "a byte-level BPE tokenizer, as Qwen, DeepSeek and GPT-OSS have";
static constexpr uint32_t kMostIds = 1u << kIdBits, kMostMerges = 1u << kRankBits;

// The byte that one of GPT-2's characters stands for, or -1. Visible Latin-1 stands for itself, the
// other bytes follow in order from U+0100 on.
static int byte_of(uint32_t code) {
  if ((code >= 0x21 && code <= 0x7e) || (code >= 0xa1 && code <= 0xff && code != 0xad))
    return int(code);
  if (code >= 0x100 && code <= 0x120) return int(code - 0x100);
  if (code >= 0x121 && code <= 0x142) return int(code - 0x121 + 0x7f);
  return code == 0x143 ? 0xad : -1;
}

bool append_bytes(string_view text, string& out) {
  const size_t before = out.size();
  for (size_t at = 0; at < text.size();) {
    const Char c = decode_char(text.data() + at);
    const int byte = byte_of(c.code);
    if (byte < 0) {
      out.resize(before);
      return false;
    }
    out += char(byte);
    at += c.size;
  }
  return true;
}

namespace {
using Value = rapidjson::Value;

string_view view(const Value& value) { return {value.GetString(), value.GetStringLength()}; }

// Fills a Tokenizer::Data from its file.
class Loader {
 public:
  explicit Loader(Tokenizer::Data& data) : d_(data) {}
  void load();

 private:
  [[noreturn]] void unsupported(const Json& json, const string& got) {
    bad_input(json.place(), "is not supported (got " + got + ")", kOther);
  }
  string place(const char* part) { return d_.path + ": " + part; }

  Json read_document(rapidjson::Document& document, Value& vocabulary, Value& merges);
  void read_model(const Json& model, const Value& vocabulary, const Value& merges);
  void read_vocabulary(const Value& vocabulary);
  vector<Bpe::Merge> read_merges(const Value& merges);
  void read_added(const Json& tokens);
  void read_normalizer(const Json& json);
  string read_pattern(const Json& json);
  void read_pre_tokenizer(const Json& json);
  void read_split(const Json& json);
  void read_byte_level(const Json& json);
  void read_post_processor(const Json& json);
  void read_template(const Json& json);
  void read_decoder(const Json& json);
  std::optional<uint32_t> named_token(const string& file, const char* key);
  std::optional<uint32_t> find_eos();

  Tokenizer::Data& d_;
  bool byte_level_ = false, template_ = false, decoder_ = false;
};

// Parses the file in place, and returns all of it but model.vocab and model.merges.
Json Loader::read_document(rapidjson::Document& document, Value& vocabulary, Value& merges) {
  const size_t size = d_.file.size();
  document.ParseInsitu<rapidjson::kParseValidateEncodingFlag | rapidjson::kParseIterativeFlag>(
      d_.file.data());
  if (document.HasParseError())
    bad_input(d_.path,
              text("is damaged or cut short: %s (got that at byte %zu of %zu)",
                   rapidjson::GetParseError_En(document.GetParseError()), document.GetErrorOffset(),
                   size),
              kRefetch);
  if (!document.IsObject() || !document.HasMember("model") || !document["model"].IsObject())
    bad_input(d_.path, "is no tokenizer.json: it has no \"model\"", kRefetch);
  Value& model = document["model"];
  if (model.HasMember("vocab") && model["vocab"].IsObject()) vocabulary = model["vocab"];
  if (model.HasMember("merges") && model["merges"].IsArray()) merges = model["merges"];
  rapidjson::StringBuffer out;
  rapidjson::Writer<rapidjson::StringBuffer> writer(out);
  document.Accept(writer);
  return Json::parse(string(out.GetString(), out.GetSize()), d_.path);
}

// ---- the model ----

void Loader::read_vocabulary(const Value& vocabulary) {
  uint32_t largest = 0;
  size_t length = 0;
  for (const auto& [name, value] : vocabulary.GetObject()) {
    if (!value.IsUint() || value.GetUint() >= kMostIds)
      bad_input(place("model.vocab") + "." + name.GetString(),
                text("is no id (need a number < %u)", kMostIds), kRefetch);
    largest = std::max(largest, value.GetUint());
    length += name.GetStringLength();
  }
  d_.texts.resize(size_t{largest} + 1);
  d_.bytes.resize(d_.texts.size());
  d_.byte_store.reserve(length);
  d_.ids_by_bytes.reserve(vocabulary.MemberCount());
  for (const auto& [name, value] : vocabulary.GetObject()) {
    const uint32_t id = value.GetUint();
    const string_view text = view(name);
    d_.texts[id] = d_.bytes[id] = text;
    const size_t begin = d_.byte_store.size();
    if (append_bytes(text, d_.byte_store)) {
      d_.bytes[id] = string_view(d_.byte_store).substr(begin);
      d_.ids_by_bytes.set(d_.bytes[id], id);
    } else {
      d_.ids_by_text.set(text, id);
    }
  }
}

vector<Bpe::Merge> Loader::read_merges(const Value& merges) {
  vector<Bpe::Merge> out;
  if (merges.Size() >= kMostMerges)
    bad_input(place("model.merges"),
              text("are too many (got %u, need < %u)", merges.Size(), kMostMerges), kOther);
  out.reserve(merges.Size());
  string joined;
  for (rapidjson::SizeType i = 0; i < merges.Size(); i++) {
    const Value& merge = merges[i];
    string_view left, right;
    if (merge.IsString()) {  // the older form
      left = view(merge);
      if (left.starts_with("#version")) continue;
      const size_t space = left.find(' ');
      if (space != string_view::npos) {
        right = left.substr(space + 1);
        left = left.substr(0, space);
      }
    } else if (merge.IsArray() && merge.Size() == 2 && merge[0].IsString() && merge[1].IsString()) {
      left = view(merge[0]);
      right = view(merge[1]);
    }
    joined.assign(left).append(right);
    const uint32_t ids[] = {d_.find_text(left), d_.find_text(right), d_.find_text(joined)};
    if (ids[0] == kNoId || ids[1] == kNoId || ids[2] == kNoId)
      bad_input(place("model.merges") + text("[%u]", i), "is no pair of tokens that make a token",
                kRefetch);
    out.push_back({ids[0], ids[1], ids[2]});
  }
  return out;
}

void Loader::read_model(const Json& model, const Value& vocabulary, const Value& merges) {
  if (model.string_or("type", "BPE") != "BPE") unsupported(model["type"], model["type"].dump());
  if (!vocabulary.IsObject() || vocabulary.MemberCount() == 0)
    bad_input(model.place() + ".vocab", "is missing, empty, or not of BPE", kOther);
  if (!merges.IsArray()) bad_input(model.place() + ".merges", "is missing", kOther);
  if (model.double_or("dropout", 0) != 0) unsupported(model["dropout"], model["dropout"].dump());
  if (model.bool_or("byte_fallback", false)) unsupported(model["byte_fallback"], "true");
  for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"})
    if (!model.string_or(affix, "").empty()) unsupported(model[affix], model[affix].dump());
  read_vocabulary(vocabulary);
  const vector<Bpe::Merge> pairs = read_merges(merges);
  for (int byte = 0; byte < 256 && !model.string_or("unk_token", "").empty(); byte++) {
    const char character = char(byte);
    if (d_.ids_by_bytes.find({&character, 1}) == kNoId)
      bad_input(model.place(), text("has an unk_token, but no token of byte 0x%02x", byte), kOther);
  }
  d_.bpe = Bpe(pairs, d_.ids_by_bytes, d_.bytes, model.bool_or("ignore_merges", false));
}

// ---- added tokens ----

// Ids as Hugging Face gives them: the model's, or the next free one. A file that says otherwise is
// refused.
void Loader::read_added(const Json& tokens) {
  struct Added {
    AddedToken token;
    bool normalized;
    string content;
  };
  vector<Added> all;
  std::map<string, size_t> index, specials;
  const uint32_t model_ids = uint32_t(d_.ids_by_bytes.size() + d_.ids_by_text.size());
  uint32_t next_id = model_ids;
  for (int64_t i = 0; i < tokens.size(); i++) {
    const Json json = tokens[i];
    Added added{{}, json["normalized"].as_bool(), json["content"].as_string()};
    AddedToken& token = added.token;
    token.single_word = json["single_word"].as_bool();
    token.lstrip = json["lstrip"].as_bool();
    token.rstrip = json["rstrip"].as_bool();
    token.special = json["special"].as_bool();
    if (added.content.empty()) continue;
    const auto known = index.find(added.content);
    const uint32_t in_model = d_.find_text(added.content);
    token.id = known != index.end() ? all[known->second].token.id
               : in_model != kNoId  ? in_model
                                    : next_id++;
    const int64_t said = json["id"].as_int(0, kMostIds - 1);
    if (said != token.id)
      bad_input(json.place(),
                text("has another id in Hugging Face (got %ld, need %u)", said, token.id),
                kRefetch);
    if (token.special) specials[added.content] = 0;
    if (known != index.end()) {
      all[known->second] = added;
    } else {
      index[added.content] = all.size();
      all.push_back(added);
    }
  }
  const size_t ids = std::max<size_t>(d_.texts.size(), next_id > model_ids ? next_id : 0);
  d_.texts.resize(ids);
  d_.bytes.resize(ids);
  d_.added_texts.reserve(3 * all.size());
  vector<AddedToken> plain, normalized;
  string buffer, other;
  const auto keep = [&](string_view text) -> const string& {
    return d_.added_texts.emplace_back(text);
  };
  for (Added& added : all) {
    AddedToken& token = added.token;
    const string& content = keep(added.content);
    token.special = specials.count(content) > 0;
    token.content = added.normalized ? d_.normalize(content, buffer, other) : content;
    d_.ids_by_text.set(content, token.id);
    d_.texts[token.id] = d_.bytes[token.id] = keep(token.content);
    string as_bytes;
    if (append_bytes(token.content, as_bytes)) d_.bytes[token.id] = keep(as_bytes);
    if (token.content.empty())
      bad_input(d_.path + ": " + content, "is normalized to nothing", kOther);
    (added.normalized ? normalized : plain).push_back(token);
  }
  d_.special.resize(ids);
  for (size_t id = 0; id < ids; id++) d_.special[id] = specials.count(string(d_.texts[id])) > 0;
  d_.added = AddedTokens(std::move(plain));
  d_.added_normalized = AddedTokens(std::move(normalized));
}

// ---- normalizer and pre-tokenizer ----

// The regular expression of a Split or Replace.
string Loader::read_pattern(const Json& json) {
  const Json pattern = json["pattern"];
  if (pattern.has("String")) return escape_regex(pattern["String"].as_string());
  return pattern["Regex"].as_string();
}

void Loader::read_normalizer(const Json& json) {
  if (json.is_null()) return;
  const string type = json["type"].as_string();
  if (type == "Sequence") {
    const Json parts = json["normalizers"];
    for (int64_t i = 0; i < parts.size(); i++) read_normalizer(parts[i]);
  } else if (type == "NFC") {
    d_.normalizer.push_back({NormalizerStep::Nfc, "", {}});
  } else if (type == "Prepend") {
    d_.normalizer.push_back({NormalizerStep::Prepend, json["prepend"].as_string(), {}});
  } else if (type == "Replace") {
    d_.normalizer.push_back({NormalizerStep::Replace, json["content"].as_string(), {}});
    d_.normalizer.back().regex.emplace_back(read_pattern(json), json["pattern"].place());
  } else {
    unsupported(json, "the normalizer " + type);
  }
}

void Loader::read_split(const Json& json) {
  static const char* const kBehaviors[] = {"Removed", "Isolated", "MergedWithPrevious",
                                           "MergedWithNext", "Contiguous"};
  const string behavior = json["behavior"].as_string();
  const auto at = std::find(std::begin(kBehaviors), std::end(kBehaviors), behavior);
  if (at == std::end(kBehaviors)) unsupported(json["behavior"], behavior);
  SplitStep step;
  step.behavior = static_cast<SplitBehavior>(at - std::begin(kBehaviors));
  step.invert = json["invert"].as_bool();
  step.pattern = read_pattern(json);
  step.place = json["pattern"].place();
  d_.steps.push_back(std::move(step));
}

void Loader::read_byte_level(const Json& json) {
  byte_level_ = true;
  if (json["add_prefix_space"].as_bool()) {
    d_.steps.emplace_back();
    d_.steps.back().kind = SplitStep::PrefixSpace;
  }
  if (!json.bool_or("use_regex", true)) return;
  d_.steps.emplace_back();
  d_.steps.back().pattern = kGpt2Pattern;
  d_.steps.back().place = json.place();
}

void Loader::read_pre_tokenizer(const Json& json) {
  if (json.is_null()) return;
  const string type = json["type"].as_string();
  if (byte_level_) unsupported(json, type + " behind ByteLevel");
  if (type == "Sequence") {
    const Json parts = json["pretokenizers"];
    for (int64_t i = 0; i < parts.size(); i++) read_pre_tokenizer(parts[i]);
  } else if (type == "Split") {
    read_split(json);
  } else if (type == "ByteLevel") {
    read_byte_level(json);
  } else if (type == "Digits") {
    SplitStep step;
    step.kind = SplitStep::Digits;
    step.behavior =
        json["individual_digits"].as_bool() ? SplitBehavior::Isolated : SplitBehavior::Contiguous;
    d_.steps.push_back(std::move(step));
  } else {
    unsupported(json, "the pre-tokenizer " + type);
  }
}

// ---- post-processor and decoder ----

void Loader::read_template(const Json& json) {
  if (template_) unsupported(json, "a second TemplateProcessing");
  template_ = true;
  const Json single = json["single"];
  bool behind = false;
  for (int64_t i = 0; i < single.size(); i++) {
    const Json piece = single[i];
    if (piece.has("Sequence")) {
      if (behind || piece["Sequence"]["id"].as_string() != "A")
        unsupported(piece, "another sequence");
      behind = true;
      continue;
    }
    const string name = piece["SpecialToken"]["id"].as_string();
    for (const int64_t id : json["special_tokens"][name]["ids"].as_ints()) {
      if (id < 0 || id >= int64_t(d_.texts.size()) || d_.texts[size_t(id)].empty())
        bad_input(json.place() + ".special_tokens." + name, text("is no token (got id %ld)", id),
                  kRefetch);
      (behind ? d_.suffix : d_.prefix).push_back(uint32_t(id));
    }
  }
  if (!behind) unsupported(single, "a template without the text");
}

void Loader::read_post_processor(const Json& json) {
  if (json.is_null()) return;
  const string type = json["type"].as_string();
  if (type == "Sequence") {
    const Json parts = json["processors"];
    for (int64_t i = 0; i < parts.size(); i++) read_post_processor(parts[i]);
  } else if (type == "TemplateProcessing") {
    read_template(json);
  } else if (type != "ByteLevel") {  // which changes no ids
    unsupported(json, "the post-processor " + type);
  }
}

void Loader::read_decoder(const Json& json) {
  if (json.is_null()) return;
  const string type = json["type"].as_string();
  if (type == "Sequence") {
    const Json parts = json["decoders"];
    for (int64_t i = 0; i < parts.size(); i++) read_decoder(parts[i]);
  } else if (type == "ByteLevel" && !decoder_) {
    decoder_ = true;
  } else {
    unsupported(json, "the decoder " + type);
  }
}

// ---- end-of-text ----

// The token that `key` of a file beside tokenizer.json names: a string, an object with "content",
// or an id or a list of ids, of which the first counts.
std::optional<uint32_t> Loader::named_token(const string& file, const char* key) {
  const string path = (std::filesystem::path(d_.path).parent_path() / file).string();
  if (!std::filesystem::exists(path)) return std::nullopt;
  const Json json = Json::parse_file(path);
  if (!json.has(key) || json[key].is_null()) return std::nullopt;
  Json value = json[key];
  if (value.is_array()) value = value[0];
  if (value.is_object()) value = value["content"];
  const uint32_t id =
      value.is_int() ? uint32_t(value.as_int(0, kMostIds)) : d_.find_text(value.as_string());
  if (id >= d_.texts.size() || d_.texts[id].empty())
    bad_input(value.place(), "is no token of " + d_.path + " (got " + value.dump() + ")",
              "use the files of one model");
  return id;
}

std::optional<uint32_t> Loader::find_eos() {
  if (const auto id = named_token("tokenizer_config.json", "eos_token")) return id;
  if (const auto id = named_token("config.json", "eos_token_id")) return id;
  for (const char* name : {"<|endoftext|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|return|>",
                           "<|end_of_text|>", "<|im_end|>", "<eos>", "</s>"})
    for (const string& added : d_.added_texts)
      if (added == name) return d_.find_text(name);
  return std::nullopt;
}

void Loader::load() {
  d_.file = read_text_file(d_.path);
  d_.fingerprint = XXH3_64bits(d_.file.data(), d_.file.size());
  rapidjson::Document document;
  Value vocabulary, merges;
  const Json json = read_document(document, vocabulary, merges);
  if (json.string_or("version", "1.0") != "1.0")
    unsupported(json["version"], json["version"].dump());
  const auto part = [&](const char* key) { return json.has(key) ? json[key] : Json(); };
  read_model(json["model"], vocabulary, merges);
  read_normalizer(part("normalizer"));
  read_pre_tokenizer(part("pre_tokenizer"));
  if (!byte_level_)
    bad_input(place("pre_tokenizer"), "has no ByteLevel, so is no byte-level BPE", kOther);
  prepare(d_.steps);
  if (json.has("added_tokens")) read_added(json["added_tokens"]);
  d_.special.resize(d_.texts.size());
  read_post_processor(part("post_processor"));
  read_decoder(part("decoder"));
  d_.join_with_space = !decoder_;
  d_.eos = find_eos();
  d_.bos = named_token("tokenizer_config.json", "bos_token");
}
}  // namespace

std::unique_ptr<const Tokenizer::Data> load_tokenizer(const string& path) {
  auto data = std::make_unique<Tokenizer::Data>();
  data->path = path;
  Loader(*data).load();
  return data;
}

}  // namespace pith
