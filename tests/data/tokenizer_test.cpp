#include "data/tokenizer.h"

#include <gtest/gtest.h>
#include <unistd.h>
#include <utf8proc.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <random>
#include <thread>

#include "core/check.h"
#include "core/json.h"
#include "helpers.h"

namespace pith {

namespace fs = std::filesystem;
using Ids = std::vector<uint32_t>;

static const std::string kGolden = SOURCE_DIR "/tests/golden/tokenizer/";

static std::vector<std::string> strings_of(const Json& json) {
  std::vector<std::string> out;
  for (int64_t i = 0; i < json.size(); i++) out.push_back(json[i].as_string());
  return out;
}

static Ids ids_of(const Json& json) {
  const std::vector<int64_t> ids = json.as_ints();
  return Ids(ids.begin(), ids.end());
}

static Ids encode(
    const Tokenizer& tokenizer, const std::string& text, bool special_as_text = false) {
  EncodeScratch scratch;
  Ids ids;
  tokenizer.encode(text, ids, special_as_text, scratch);
  return ids;
}

static bool has_any(const std::string& token, const std::vector<std::string>& parts) {
  return std::any_of(parts.begin(), parts.end(),
      [&](const std::string& part) { return token.find(part) != std::string::npos; });
}

// A tokenizer.json: a golden variant with the golden model.
static std::string variant_text(const Json& variant, const Json& model) {
  const std::vector<std::string> without = strings_of(variant["without"]);
  const bool as_strings = variant["string_merges"].as_bool();
  JsonWriter parts;
  parts.object();
  for (const std::string& key : variant["tokenizer"].keys())
    parts.key(key).raw(variant["tokenizer"][key].dump());
  parts.key("model").object();
  for (const std::string& key : variant["model"].keys())
    parts.key(key).raw(variant["model"][key].dump());
  parts.key("vocab").object();
  for (const std::string& token : model["vocab"].keys())
    if (!has_any(token, without)) parts.key(token).value(model["vocab"][token].as_int());
  parts.end().key("merges").array();
  for (int64_t i = 0; i < model["merges"].size(); i++) {
    const Json merge = model["merges"][i];
    const std::string left = merge[0].as_string(), right = merge[1].as_string();
    if (has_any(left + right, without)) continue;
    if (as_strings)
      parts.value(left + " " + right);
    else
      parts.array().value(left).value(right).end();
  }
  return parts.end().end().end().str();
}

static Json golden(const char* name) { return Json::parse_file(kGolden + name); }

static std::string golden_text(const std::string& name) {
  const Json variants = golden("variants.json");
  for (int64_t i = 0; i < variants.size(); i++)
    if (variants[i]["name"].as_string() == name)
      return variant_text(variants[i], golden("model.json"));
  ADD_FAILURE() << name;
  return "";
}

static void append_char(std::string& out, uint32_t code) {
  uint8_t bytes[4];
  const auto size = utf8proc_encode_char(static_cast<int32_t>(code), bytes);
  out.append(reinterpret_cast<const char*>(bytes), static_cast<size_t>(size));
}

// Random text of what pre-tokenizers and NFC treat in special ways.
static std::string random_text(std::mt19937& rng, size_t most) {
  static const std::vector<std::string> kPieces = {"a", "b", "S", "t", "L", "l", "e", "A", " ",
      "  ", "\n", "\r", "\t", "'", "'s", "'LL", ".", "/", "-", "(", "0", "7", "_", "+", "\u00e9",
      "\u0301", "\u0323", "\u00df", "\u01c5", "\u02b0", "\u00aa", "\u017f", "\u0627", "\u064b",
      "\u0915", "\u093f", "\u4e2d", "\u30ab", "\u30fb", "\ud55c", "\u00a0", "\u3000", "\u0085",
      "\u200b", "\u0001", "\U0001f600", "\U0001e030", "\u0378", "\u0663", "\u216b", "\u00b2",
      "\u20ac", "\u00ab", "\ue000", "\ufeff", "\u2028"};
  std::string text;
  for (size_t i = rng() % most + 1; i-- > 0;) text += kPieces[rng() % kPieces.size()];
  return text;
}

// ---- against Hugging Face ----

TEST(Tokenizer, GivesHuggingFacesIdsAndText) {
  const std::string folder = fresh_folder("tokenizer_goldens");
  const Json variants = golden("variants.json"), model = golden("model.json");
  const std::vector<std::string> texts = strings_of(golden("texts.json"));
  for (int64_t v = 0; v < variants.size(); v++) {
    const Json variant = variants[v];
    SCOPED_TRACE(variant["name"].as_string());
    EncodeScratch scratch;
    put(folder + "/tokenizer.json", variant_text(variant, model));
    const Tokenizer tokenizer = Tokenizer::load(folder + "/tokenizer.json");
    for (size_t i = 0; i < texts.size(); i++) {
      const int64_t at = static_cast<int64_t>(i);
      Ids ids, as_text;
      tokenizer.encode(texts[i], ids, false, scratch);
      tokenizer.encode(texts[i], as_text, true, scratch);
      EXPECT_EQ(ids, ids_of(variant["ids"][at])) << texts[i];
      EXPECT_EQ(as_text, ids_of(variant["ids_as_text"][at])) << texts[i];
      EXPECT_EQ(tokenizer.decode(ids, SpecialTokens::Keep), variant["decoded"][at].as_string());
      EXPECT_EQ(
          tokenizer.decode(ids, SpecialTokens::Skip), variant["decoded_skip"][at].as_string());
    }
  }
}

TEST(Tokenizer, DecodesWhatItEncoded) {
  const std::string path = fresh_folder("tokenizer_round_trip") + "/tokenizer.json";
  std::mt19937 rng(3);
  for (const char* name : {"gpt2", "o200k", "deepseek-v3", "digit-each"}) {
    put(path, golden_text(name));
    const Tokenizer tokenizer = Tokenizer::load(path);
    for (int i = 0; i < 500; i++) {
      const std::string text = random_text(rng, 60);
      EXPECT_EQ(tokenizer.decode(encode(tokenizer, text), SpecialTokens::Keep), text);
    }
  }
}

// ---- words ----

static std::vector<std::string> words_of(
    const std::vector<SplitStep>& steps, const std::string& text) {
  SplitBuffers buffers;
  split(steps, text, buffers);
  return {buffers.pieces.begin(), buffers.pieces.end()};
}

// The Split steps of a golden variant.
static std::vector<SplitStep> steps_of(const std::string& name, bool use_fast) {
  std::vector<SplitStep> steps;
  const auto add = [&](const std::string& pattern) {
    steps.emplace_back(pattern, name);
    if (!use_fast) steps.back().fast = nullptr;
  };
  const Json json = Json::parse(golden_text(name), name)["pre_tokenizer"]["pretokenizers"];
  for (int64_t i = 0; i + 1 < json.size(); i++) add(json[i]["pattern"]["Regex"].as_string());
  return steps;
}

TEST(SlowTokenizer, FastSplittersEqualTheirPatterns) {
  for (const char* name : {"qwen2", "cl100k", "qwen3.5", "o200k"}) {
    const std::vector<SplitStep> plain = steps_of(name, false), fast = steps_of(name, true);
    ASSERT_TRUE(fast.back().fast) << name;
    std::mt19937 rng(7);
    for (int i = 0; i < 8000; i++) {
      std::string text = random_text(rng, i % 2 ? 6 : 60);
      if (i % 4 == 0)  // some paths are for ASCII alone
        for (char& c : text) c &= 0x7f;
      ASSERT_EQ(words_of(fast, text), words_of(plain, text)) << name << text;
    }
    // Every code point, behind letters, digits, spaces and others, and before them.
    std::string text;
    for (uint32_t code = 1; code < 0x110000; code += code < 0x20000 ? 1 : 37) {
      if (code >= 0xd800 && code < 0xe000) continue;
      for (const char* context : {"a", "1", " ", "", ".", "\u4e2d"}) {
        text += context;
        append_char(text, code);
      }
      if (text.size() < 4000) continue;
      ASSERT_EQ(words_of(fast, text), words_of(plain, text)) << name << code;
      text.clear();
    }
  }
}

// Byte-pair encoding as its definition says: the best pair of all, leftmost, again and again.
static Ids merge_by_definition(const Json& model, const std::string& word) {
  std::map<std::pair<std::string, std::string>, int64_t> ranks;
  for (int64_t i = 0; i < model["merges"].size(); i++)
    ranks[{model["merges"][i][0].as_string(), model["merges"][i][1].as_string()}] = i;
  std::vector<std::string> parts;
  for (const char c : word) parts.emplace_back(1, c);
  for (;;) {
    int64_t best = INT64_MAX;
    size_t at = 0;
    for (size_t i = 0; i + 1 < parts.size(); i++) {
      const auto rank = ranks.find({parts[i], parts[i + 1]});
      if (rank == ranks.end() || rank->second >= best) continue;
      best = rank->second;
      at = i;
    }
    if (best == INT64_MAX) break;
    parts[at] += parts[at + 1];
    parts.erase(parts.begin() + static_cast<int64_t>(at) + 1);
  }
  Ids ids;
  for (const std::string& part : parts)
    ids.push_back(static_cast<uint32_t>(model["vocab"][part].as_int()));
  return ids;
}

TEST(Tokenizer, MergesShortAndLongWordsByDefinition) {
  const std::string path = fresh_folder("tokenizer_merges") + "/tokenizer.json";
  put(path, golden_text("whole-text"));  // each text is one word
  const Tokenizer tokenizer = Tokenizer::load(path);
  const Json model = golden("model.json");
  std::mt19937 rng(11);
  for (const size_t size : {1, 2, 5, 15, 16, 95, 96, 97, 98, 200, 257, 900}) {
    for (int repeat = 0; repeat < 3; repeat++) {
      std::string word;
      while (word.size() < size) word += "abcdefghijATlse10=("[rng() % (6 << repeat) % 19];
      EXPECT_EQ(encode(tokenizer, word), merge_by_definition(model, word)) << word;
    }
  }
}

// ---- the cache and threads ----

TEST(Tokenizer, IdsDoNotDependOnTheScratch) {
  const std::string folder = fresh_folder("tokenizer_scratch");
  put(folder + "/a.json", golden_text("gpt2"));
  put(folder + "/b.json", golden_text("o200k"));
  std::vector<Tokenizer> tokenizers;
  tokenizers.push_back(Tokenizer::load(folder + "/a.json"));
  tokenizers.push_back(Tokenizer::load(folder + "/b.json"));
  struct Scratches {
    EncodeScratch none{0}, tiny{3000}, usual;
  } scratches[2];
  std::mt19937 rng(5);
  for (int i = 0; i < 3000; i++) {
    const Tokenizer& tokenizer = tokenizers[static_cast<size_t>(i / 50 % 2)];
    auto& [none, tiny, usual] = scratches[i / 50 % 2];
    const std::string text = random_text(rng, 40);
    const Ids fresh = encode(tokenizer, text);
    for (EncodeScratch* scratch : {&none, &tiny, &usual}) {
      Ids ids = {1, 2};
      tokenizer.encode(text, ids, false, *scratch);
      ASSERT_EQ(Ids(ids.begin() + 2, ids.end()), fresh) << text;
    }
  }
}

TEST(Tokenizer, IsSharedByThreads) {
  const std::string path = fresh_folder("tokenizer_threads") + "/tokenizer.json";
  put(path, golden_text("lines"));  // through PCRE2
  const Tokenizer tokenizer = Tokenizer::load(path);
  std::mt19937 rng(2);
  std::vector<std::string> texts;
  std::vector<Ids> expected;
  for (int i = 0; i < 300; i++) {
    texts.push_back(random_text(rng, 80));
    expected.push_back(encode(tokenizer, texts.back()));
  }
  std::vector<std::thread> threads;
  std::vector<int> wrong(4);
  for (size_t t = 0; t < wrong.size(); t++)
    threads.emplace_back([&, t] {
      EncodeScratch scratch;
      for (size_t i = 0; i < texts.size(); i++) {
        Ids ids;
        tokenizer.encode(texts[i], ids, false, scratch);
        wrong[t] += ids != expected[i];
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, std::vector<int>(4));
}

// ---- the vocabulary ----

TEST(Tokenizer, KnowsItsTokens) {
  const std::string folder = fresh_folder("tokenizer_tokens"), path = folder + "/tokenizer.json";
  put(path, golden_text("qwen2"));
  const Tokenizer tokenizer = Tokenizer::load(path);
  EXPECT_EQ(tokenizer.vocab_size(), 705u);
  EXPECT_EQ(tokenizer.id_of("<|im_start|>"), 701u);
  EXPECT_EQ(tokenizer.id_of("no such token"), std::nullopt);
  EXPECT_TRUE(tokenizer.special[700]);
  EXPECT_FALSE(tokenizer.special[702]);  // <think>: added, not special
  EXPECT_EQ(tokenizer.vocab_size(), 705u);
  for (uint32_t id = 0; id < tokenizer.vocab_size(); id++)
    EXPECT_EQ(tokenizer.id_of(tokenizer.texts[id]), id);
  EXPECT_EQ(tokenizer.texts[*tokenizer.id_of("\u0120")], "\u0120");
  EXPECT_EQ(tokenizer.decode(Ids{*tokenizer.id_of("\u0120"), 1u << 30}, SpecialTokens::Keep), " ");
}

TEST(Tokenizer, FindsEndOfText) {
  const std::string folder = fresh_folder("tokenizer_eos"), path = folder + "/tokenizer.json";
  put(path, golden_text("qwen2"));
  EXPECT_EQ(Tokenizer::load(path).eos_id, 700u);
  put(path, golden_text("digits"));
  EXPECT_EQ(Tokenizer::load(path).eos_id, std::nullopt);
}

// ---- errors ----

TEST(Tokenizer, RefusesWhatItDoesNotSupport) {
  const std::string path = fresh_folder("tokenizer_errors") + "/tokenizer.json";
  std::string good = golden_text("whole-text");
  for (size_t at; (at = good.find("\": ")) != std::string::npos;) good.erase(at + 2, 1);
  const struct {
    const char *from, *to, *part;
  } cases[] = {
      {"\"byte_fallback\":false", "\"byte_fallback\":true", "model.byte_fallback"},
      {"\"type\":\"BPE\"", "\"type\":\"Unigram\"", "got \"Unigram\""},
      {"\"dropout\":null", "\"dropout\":0.5", "model.dropout"},
      {"\"end_of_word_suffix\":null", "\"end_of_word_suffix\":\"</w>\"", "end_of_word_suffix"},
      {"\"version\":\"1.0\"", "\"version\":\"2.0\"", "version"},
      {"\"normalizer\":null", "\"normalizer\":{\"type\":\"NFKC\"}", "the normalizer NFKC"},
      {"\"normalizer\":null", "\"normalizer\":{\"type\":7}", "normalizer.type"},
      {"\"decoder\":{", "\"decoder\":{\"type\":\"Metaspace\"},\"x\":{", "the decoder Metaspace"},
      {"\"decoder\":{", "\"decoder\":null,\"x\":{", "decoder: is missing"},
      {"\"pre_tokenizer\":{\"add_prefix_space\":false",
          "\"pre_tokenizer\":{\"add_prefix_space\":true", "add_prefix_space"},
      {"\"pre_tokenizer\":{", "\"pre_tokenizer\":null,\"x\":{", "has no ByteLevel"},
      {"\"pre_tokenizer\":{", "\"pre_tokenizer\":{\"type\":\"Whitespace\"},\"x\":{",
          "the pre-tokenizer Whitespace"},
      {"\"post_processor\":{", "\"post_processor\":{\"type\":\"BertProcessing\"},\"x\":{",
          "BertProcessing"},
      {"\"post_processor\":{", "\"post_processor\":{\"type\":\"TemplateProcessing\"},\"x\":{",
          "TemplateProcessing"},
      {"\"id\":701", "\"id\":801", "got 801, need 701"},
      {"\"lstrip\":false", "\"lstrip\":0", "lstrip"},
      {"\"merges\":[[\"", "\"merges\":[[\"?no?", "model.merges["},
      {"\"merges\":", "\"m\":", "model.merges"},
      {"\"vocab\":{", "\"vocab\":{\"zz\":-1,", "model.vocab.zz"},
      {"\"vocab\":{", "\"vocab\":{\"zz\":2097152,", "need a number < 2097152"},
      {"\"vocab\":", "\"v\":", "model.vocab"},
      {"\"model\":", "\"m\":", "\"model\""},
  };
  for (const auto& [from, to, part] : cases) {
    std::string text = good;
    const size_t at = text.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    text.replace(at, strlen(from), to);
    put(path, text);
    const std::string error = error_of([&] { Tokenizer::load(path); });
    EXPECT_NE(error.find(part), std::string::npos) << "got: " << error << "\nneed: " << part;
  }
  EXPECT_NE(error_of([&] { Tokenizer::load(path + ".not"); }).find(".not"), std::string::npos);
}

TEST(Tokenizer, RefusesRegularExpressionsItWouldReadInAnotherWay) {
  for (const char* pattern : {"[a&&b]", "[a[b]]", "\\h+", "a{2}+", "a{,3}", "(?m:.)", "\\bx", "(",
           "\\p{Greek}", "[]a]", "\\p{L", "x\\", "\\k<a>"}) {
    const std::string error = error_of([&] { SplitStep(pattern, "place"); });
    EXPECT_TRUE(error.starts_with("place: ")) << pattern << ": " << error;
  }
}

TEST(SlowTokenizer, RefusesDamagedFiles) {
  const std::string path = fresh_folder("tokenizer_damaged") + "/tokenizer.json";
  const std::string good = golden_text("deepseek-v3");
  for (size_t size = 0; size < good.size(); size += 1 + size / 20) {
    put(path, good.substr(0, size));
    EXPECT_NE(error_of([&] { Tokenizer::load(path); }), "no error") << size;
  }
  std::mt19937 rng(1);
  int refused = 0;
  for (int i = 0; i < 300; i++) {  // never a crash, or another exit code
    std::string bad = good;
    for (int k = 0; k < 3; k++) bad[rng() % bad.size()] = static_cast<char>(rng());
    put(path, bad);
    refused += error_of([&] { Tokenizer::load(path); }) != "no error";
  }
  EXPECT_GT(refused, 150);
}

// ---- UTF-8 ----

TEST(Tokenizer, ReplacesInvalidUtf8AsPythonDoes) {
  const std::string r = "\ufffd";
  const struct {
    std::string bytes, text;
  } cases[] = {
      {"abc", "abc"},
      {"a\xff"
       "b",
          "a" + r + "b"},
      {"\xc3", r},
      {"\xe4\xb8", r},
      {"\xe4\xb8\xad\xe4", "\u4e2d" + r},
      {"\xc0\x80", r + r},
      {"\xe0\x80\x80", r + r + r},
      {"\xed\xa0\x80", r + r + r},
      {"\xf0\x9f\x98", r},
      {"\xf0\x9f\x98\x80", "\U0001f600"},
      {"\xf4\x90\x80\x80", r + r + r + r},
      {"\xf5\x80", r + r},
      {"\xf0\x80\x80\x80", r + r + r + r},
      {"\xe4\x41\xb8", r + "A" + r},
      {std::string("\0\x80", 2), std::string("\0", 1) + r},
  };
  for (const auto& [bytes, text] : cases)
    for (const size_t before : {0, 14, 15, 16, 17}) {  // across the steps of 16 bytes
      const std::string ascii(before, 'x');
      EXPECT_EQ(replace_invalid_utf8(ascii + bytes + ascii), ascii + text + ascii);
      EXPECT_EQ(is_valid_utf8(ascii + bytes), bytes == text);
    }
  const std::string path = fresh_folder("tokenizer_utf8") + "/tokenizer.json";
  put(path, golden_text("gpt2"));
  const Tokenizer tokenizer = Tokenizer::load(path);
  const std::string error = error_of([&] { encode(tokenizer, "ab\u00e9\xff"); });
  EXPECT_NE(error.find("a bad byte at 4"), std::string::npos) << error;
}

}  // namespace pith
