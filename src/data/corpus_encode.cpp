// corpus_encode: documents out of lines and files, and their ids.
// RapidJSON: 64-bit lengths, for lines over 4 GiB; its SSE2 scan is what makes strings fast.
#define RAPIDJSON_NO_SIZETYPEDEFINE
#define RAPIDJSON_SSE2
#include <cstddef>
namespace rapidjson {
typedef std::size_t SizeType;
}
#include <rapidjson/error/en.h>
#include <rapidjson/reader.h>

#include <algorithm>
#include <cstring>

#include "core/check.h"
#include "data/corpus_parts.h"

namespace pith {

namespace {
// Takes the value of one key of the outermost object; of several, the last, as Python does.
struct KeyHandler : rapidjson::BaseReaderHandler<rapidjson::UTF8<>, KeyHandler> {
  enum Found : uint8_t { Nothing, Text, Other };
  string_view key, text;
  int64_t depth = 0;
  bool object = false, wanted = false;  // `wanted`: the next value of depth 1 is the key's
  Found found = Nothing;

  bool Default() { return note(Other); }
  bool note(Found what) {
    if (depth == 1 && wanted) {
      found = what;
      wanted = false;
    }
    return true;
  }
  bool String(const char* s, rapidjson::SizeType n, bool) {
    if (depth == 1 && wanted) text = {s, n};
    return note(Text);
  }
  bool Key(const char* s, rapidjson::SizeType n, bool) {
    if (depth == 1) wanted = string_view(s, n) == key;
    return true;
  }
  bool StartObject() {
    if (depth == 0) object = true;
    return open();
  }
  bool StartArray() { return open(); }
  bool EndObject(rapidjson::SizeType) { return depth--, true; }
  bool EndArray(rapidjson::SizeType) { return depth--, true; }
  bool open() {
    note(Other);
    depth++;
    return true;
  }
};

// U+D800..U+DFFF, which an escape can write, are no characters: UTF-8 would be ED A0..BF xx.
bool has_surrogate(string_view s) {
  for (size_t i = s.find('\xed'); i != s.npos; i = s.find('\xed', i + 1))
    if (i + 1 < s.size() && static_cast<unsigned char>(s[i + 1]) >= 0xa0) return true;
  return false;
}

bool is_blank(const char* s, size_t n) {
  return std::all_of(s, s + n, [](char c) { return c == ' ' || c == '\t' || c == '\r'; });
}

// Python's json also takes NaN and Infinity, and so do files made by it. Iterative: deep nesting
// must not use up the stack.
constexpr unsigned kParseFlags =
    rapidjson::kParseInsituFlag | rapidjson::kParseIterativeFlag | rapidjson::kParseNanAndInfFlag;
constexpr string_view kBom = "\xef\xbb\xbf";
}  // namespace

struct LineParser::State {
  string key;
  rapidjson::Reader reader;
};

LineParser::LineParser(string key) : state_(new State{std::move(key), {}}) {}
LineParser::~LineParser() = default;

string LineParser::parse(char* line, size_t n, string_view& document) {
  if (!is_valid_utf8({line, n})) return "not valid UTF-8";
  KeyHandler handler;
  handler.key = state_->key;
  rapidjson::InsituStringStream stream(line);
  const rapidjson::ParseResult result = state_->reader.Parse<kParseFlags>(stream, handler);
  if (result.IsError())
    return text("not valid JSON at byte %zu of the line: %s", result.Offset() + 1,
                rapidjson::GetParseError_En(result.Code()));
  // A zero byte ends the text for RapidJSON.
  if (stream.Tell() < n) return text("not valid JSON: a zero byte at %zu", stream.Tell() + 1);
  if (!handler.object) return "not a JSON object";
  if (handler.found == KeyHandler::Nothing) return text("no key \"%s\"", state_->key.c_str());
  if (handler.found == KeyHandler::Other)
    return text("the value of \"%s\" is not a string", state_->key.c_str());
  if (has_surrogate(handler.text))
    return text("half of a surrogate pair in \"%s\"", state_->key.c_str());
  document = handler.text;
  return "";
}

BatchEncoder::BatchEncoder(const Tokenizer& tokenizer, const CorpusOptions& options, uint32_t eos)
    : tokenizer_(tokenizer),
      options_{.parse_special = !options.special_as_text},
      eos_(eos),
      parser_(options.key) {}

void BatchEncoder::encode(CorpusBatch& batch) {
  if (batch.lines_of) encode_lines(batch);
  for (const CorpusBatch::TextFile& file : batch.texts) encode_text(batch, file);
}

void BatchEncoder::add_document(CorpusBatch& batch, string_view document) {
  tokenizer_.encode(document, batch.tokens, options_, scratch_);
  batch.tokens.push_back(eos_);
  batch.ends.push_back(batch.tokens.size());
  batch.text_bytes += document.size();
}

void BatchEncoder::encode_lines(CorpusBatch& batch) {
  char *at = batch.raw.data, *const end = at + batch.raw.size;
  if (batch.first_lines && string_view(at, end - at).starts_with(kBom)) at += kBom.size();
  while (at < end) {
    char* newline = static_cast<char*>(memchr(at, '\n', end - at));
    if (!newline) newline = end;
    *newline = 0;
    batch.lines++;
    const size_t n = newline - at;
    if (!is_blank(at, n)) {
      string_view document;
      const string wrong = parser_.parse(at, n, document);
      if (wrong.empty())
        add_document(batch, document);
      else
        batch.bad.push_back({batch.lines_of, batch.lines, wrong});
    }
    at = newline + 1;
  }
}

void BatchEncoder::encode_text(CorpusBatch& batch, const CorpusBatch::TextFile& file) {
  string_view document(batch.raw.data + file.begin, file.size);
  if (document.starts_with(kBom)) document.remove_prefix(kBom.size());
  if (is_valid_utf8(document) && !document.empty()) return add_document(batch, document);
  int64_t line = 1;
  for (;; line++) {
    const size_t newline = document.find('\n');
    if (!is_valid_utf8(document.substr(0, newline)) || newline == document.npos) break;
    document.remove_prefix(newline + 1);
  }
  batch.bad.push_back({file.source, line, document.empty() ? "is empty" : "not valid UTF-8"});
}

}  // namespace pith
