#include "data/dataset.h"

#include <gtest/gtest.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <numeric>
#include <set>
#include <thread>

#include "core/json.h"
#include "core/rng.h"
#include "helpers.h"

namespace pith {

namespace fs = std::filesystem;

namespace {

using Document = std::vector<int32_t>;
using Documents = std::vector<Document>;

std::string bytes_of(const Document& document, FileDType type) {
  std::string bytes;
  for (const int32_t id : document) {
    const auto wide = static_cast<uint64_t>(id);
    bytes.append(reinterpret_cast<const char*>(&wide), static_cast<size_t>(size_of(type)));
  }
  return bytes;
}

std::string array_bytes(
    FileDType type, const std::vector<int64_t>& shape, const std::string& data) {
  return npy_header(type, shape) + data;
}

std::string ends_bytes(const std::vector<uint64_t>& ends) {
  const std::string data(reinterpret_cast<const char*>(ends.data()), 8 * ends.size());
  return array_bytes(FileDType::U64, {static_cast<int64_t>(ends.size())}, data);
}

std::string put_documents(
    const std::string& path, const Documents& documents, FileDType type = FileDType::U16) {
  std::string ids;
  std::vector<uint64_t> ends;
  for (const Document& document : documents) {
    ids += bytes_of(document, type);
    ends.push_back(ids.size() / static_cast<size_t>(size_of(type)));
  }
  const int64_t n = static_cast<int64_t>(ids.size()) / size_of(type);
  put(path, array_bytes(type, {n}, ids) + ends_bytes(ends));
  return path;
}

Documents random_documents(uint64_t seed, int count, int longest, int vocab) {
  Documents documents;
  uint64_t at = 0;
  for (int i = 0; i < count; i++) {
    const int length = 1 + static_cast<int>(uniform_at(seed, at++) * longest);
    Document& document = documents.emplace_back();
    for (int j = 0; j < length; j++)
      document.push_back(static_cast<int32_t>(uniform_at(seed, at++) * vocab));
  }
  return documents;
}

struct Row {
  explicit Row(int64_t length) : tokens(length, -7), labels(length, -7), ends(length, -7) {}
  SampleRow view() { return {tokens.data(), labels.data(), ends.data()}; }
  bool operator==(const Row&) const = default;
  std::vector<int32_t> tokens, labels, ends;
};

Row train_row(const Dataset& data, int64_t index) {
  Row row(data.options().seq_length);
  data.train_sample(index, row.view());
  return row;
}

Row heldout_row(const Dataset& data, int64_t index) {
  Row row(data.options().seq_length);
  data.heldout_sample(index, row.view());
  return row;
}

// A sample by its definition: token by token, from a list of (token, document) pairs.
using Text = std::vector<std::pair<int32_t, int>>;
Row reference_row(const Text& text, int64_t begin, int64_t length, bool mask) {
  Row row(length);
  const auto size = static_cast<int64_t>(text.size());
  for (int64_t i = 0; i < length; i++) {
    const int64_t at = begin + i;
    row.tokens[i] = at < size ? text[at].first : 0;
    row.labels[i] = at + 1 < size ? text[at + 1].first : kIgnoreLabel;
    if (mask && at + 1 < size && text[at + 1].second != text[at].second)
      row.labels[i] = kIgnoreLabel;
    int64_t end = i + 1;  // padding is a document of its own
    const auto document = [&](int64_t j) { return j < size ? text[j].second : -1; };
    while (end < length && (!mask || document(begin + end) == document(at))) end++;
    row.ends[i] = static_cast<int32_t>(end);
  }
  return row;
}

bool is_heldout(const Document& document, FileDType type, double fraction) {
  const std::string bytes = bytes_of(document, type);
  return static_cast<double>(XXH3_64bits(bytes.data(), bytes.size())) / 0x1p64 < fraction;
}

}  // namespace

// ---- Token files --------------------------------------------------------------------------------

TEST(TokenFile, ReadsEveryType) {
  const std::string path = fresh_folder("tokens") + "/a.bin";
  const Documents documents = {{1}, {2, 3, 4}, {250}, {5, 6}};
  for (const FileDType type : {FileDType::U16, FileDType::U32}) {
    put_documents(path, documents, type);
    const TokenFile file = open_token_file(path);
    EXPECT_EQ(file.type, type);
    EXPECT_EQ(file.num_tokens, 7);
    ASSERT_EQ(file.num_docs, 4);
    const std::vector<int64_t> ends = {1, 4, 5, 7};
    for (int64_t i = 0; i < 4; i++) EXPECT_EQ(file.doc_end(i), ends[i]);
    std::vector<int32_t> ids(5);
    file.copy(1, 5, 251, ids.data());
    EXPECT_EQ(ids, (std::vector<int32_t>{2, 3, 4, 250, 5}));
    file.copy(7, 0, 1, ids.data());
    expect_error(error_of(kExitBadInput, [&] { file.copy(1, 5, 250, ids.data()); }),
        {path + ": ", "beyond the vocabulary", "got 250 at token 4, need less than 250", "Try: "});
  }
  put_documents(path, {});
  EXPECT_EQ(open_token_file(path).num_tokens, 0);
  put_documents(path, {{}, {1, 2}, {}, {3}});  // empty documents of others
  EXPECT_EQ(open_token_file(path).num_docs, 4);
}

TEST(TokenFile, IdsAboveInt32AreBeyondAnyVocabulary) {
  const std::string path = fresh_folder("wide") + "/a.bin";
  const uint32_t ids[] = {1, uint32_t{1} << 31};
  put(path, array_bytes(FileDType::U32, {2}, std::string(reinterpret_cast<const char*>(ids), 8)) +
                ends_bytes({2}));
  int32_t out[2];
  expect_error(error_of(kExitBadInput, [&] { open_token_file(path).copy(0, 2, 100, out); }),
      {"got 2147483648 at token 1"});
}

TEST(TokenFile, EveryTruncationIsRefused) {
  const std::string path = fresh_folder("truncated") + "/a.bin";
  put_documents(path, {{1, 2, 3}, {4, 5}});
  const std::string whole = read_text_file(path);
  for (size_t n = 0; n < whole.size(); n++) {
    put(path, whole.substr(0, n));
    const std::string got = error_of(kExitBadInput, [&] { open_token_file(path); });
    EXPECT_EQ(got.find(path), 0u) << n << " bytes: " << got;
  }
}

TEST(TokenFile, RefusesCorruptFilesByName) {
  const std::string path = fresh_folder("corrupt") + "/a.bin", four = "abcdefgh";
  const std::string ids = array_bytes(FileDType::U16, {4}, four);
  const struct {
    std::string bytes, error;
  } cases[] = {
      {array_bytes(FileDType::F32, {2}, four) + ends_bytes({2}), "got <f4 of 1 dimensions"},
      {array_bytes(FileDType::I32, {2}, four) + ends_bytes({2}), "got <i4 of 1 dimensions"},
      {array_bytes(FileDType::U16, {2, 2}, four) + ends_bytes({4}), "got <u2 of 2 dimensions"},
      {ids + array_bytes(FileDType::U32, {1}, "abcd"),
          "document ends second (got <u4 of 1 dimensions"},
      {ids + array_bytes(FileDType::U64, {}, four),
          "document ends second (got <u8 of 0 dimensions"},
      {ids + "no array at all", "(document ends): is not an NPY array"},
      {ids + ends_bytes({3, 2, 4}), "corrupt end of document 1 (got 2, need 3 to 4)"},
      {ids + ends_bytes({2, 5}), "corrupt end of document 1 (got 5, need 4 to 4)"},
      {ids + ends_bytes({~0ull, 4}), "corrupt end of document 0 (got 18446744073709551615"},
      {ids + ends_bytes({1, 3}), "corrupt end of document 1 (got 3, need 4 to 4)"},
      {ids + ends_bytes({}), "has tokens, but no documents"},
      {ids + ends_bytes({4}) + "x", "goes on behind its two arrays (got 1 bytes more"},
  };
  for (const auto& c : cases) {
    put(path, c.bytes);
    expect_error(error_of(kExitBadInput, [&] { open_token_file(path); }), {path, c.error, "Try: "});
  }
}

TEST(TokenFile, FindsFilesBelowAFolder) {
  const std::string folder = fresh_folder("find");
  for (const char* name : {"b.bin", "a/z.bin", "a/y.bin.tmp", "a.txt", ".hidden.bin", ".pith/c.bin",
           "a-b/k.bin", "c/d/e.bin"})
    put_documents(folder + "/" + name, {{1}});
  std::vector<std::string> want;
  for (const char* name : {"a/z.bin", "a-b/k.bin", "b.bin", "c/d/e.bin"})
    want.push_back(folder + "/" + name);
  EXPECT_EQ(find_token_files(folder), want);
  EXPECT_EQ(find_token_files(want[2]), std::vector<std::string>{want[2]});
  fs::create_directories(folder + "/empty");
  expect_error(error_of(kExitBadInput, [&] { find_token_files(folder + "/empty"); }),
      {folder + "/empty: holds no token file"});
  expect_error(error_of(kExitBadInput, [&] { find_token_files(folder + "/none"); }),
      {folder + "/none: cannot be listed (No such file or directory)"});
}

// ---- Samples ------------------------------------------------------------------------------------

// Every sample of small corpora, training and held-out, against the definition.
TEST(Dataset, SamplesAreWhatTheDefinitionSays) {
  const std::string folder = fresh_folder("samples");
  const std::vector<std::vector<Documents>> corpora = {
      {{{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}}},                // longer than S
      {{{1}, {2}, {3}, {4}, {5}, {6}, {7}}},                      // one token each
      {{}, {{1, 2}, {}, {3, 4, 5}}, {{6}}, {{7, 8, 9, 10, 11}}},  // an empty file and document
      {random_documents(1, 40, 9, 50), random_documents(2, 30, 30, 50),
          random_documents(3, 1, 3, 50)},
  };
  int64_t train_samples = 0, heldout_samples = 0;
  for (const auto& corpus : corpora)
    for (const FileDType type : {FileDType::U16, FileDType::U32})
      for (const double fraction : {0.0, 0.4, 1.0})
        for (const int64_t length : {1, 3, 4, 7, 16})
          for (const bool mask : {false, true}) {
            std::vector<std::string> paths;
            std::vector<Text> train(corpus.size());
            Text heldout;
            int document = 0;
            for (size_t f = 0; f < corpus.size(); f++) {
              paths.push_back(folder + "/" + std::to_string(f) + ".bin");
              put_documents(paths[f], corpus[f], type);
              for (const Document& d : corpus[f]) {
                const bool held = is_heldout(d, type, fraction);
                for (const int32_t id : d) (held ? heldout : train[f]).push_back({id, document});
                document++;
              }
            }
            const Dataset data(paths, {.seq_length = length,
                                          .vocab_size = 60,
                                          .shuffle = false,
                                          .heldout_fraction = fraction,
                                          .document_mask = mask});
            int64_t sample = 0;
            for (const Text& text : train)
              for (int64_t at = 0; at + length < static_cast<int64_t>(text.size()); at += length)
                EXPECT_EQ(train_row(data, sample++), reference_row(text, at, length, mask));
            EXPECT_EQ(data.samples_per_epoch(), sample);
            train_samples += sample;
            const auto held_tokens = static_cast<int64_t>(heldout.size());
            sample = 0;
            for (int64_t at = 0; at + 1 < held_tokens; at += length)
              EXPECT_EQ(heldout_row(data, sample++), reference_row(heldout, at, length, mask));
            EXPECT_EQ(data.heldout_samples(), sample);
            heldout_samples += sample;
            for (const int64_t behind : {sample, sample + 5})
              for (const int32_t label : heldout_row(data, behind).labels)
                EXPECT_EQ(label, kIgnoreLabel);
          }
  EXPECT_GT(train_samples, 1000);
  EXPECT_GT(heldout_samples, 1000);
}

TEST(Dataset, EachEpochIsAPermutationOfItsOwn) {
  const std::string path = fresh_folder("epochs") + "/a.bin";
  Document text(1001);
  std::iota(text.begin(), text.end(), 0);
  put_documents(path, {text});
  const auto order = [&](uint64_t seed, bool shuffle) {
    const Dataset data({path},
        {.seq_length = 2, .vocab_size = 2000, .seed = seed, .shuffle = shuffle, .max_epochs = 3});
    EXPECT_EQ(data.samples_per_epoch(), 500);
    std::vector<std::vector<int32_t>> epochs(3);
    for (int64_t i = 0; i < 1500; i++) epochs[i / 500].push_back(train_row(data, i).tokens[0]);
    EXPECT_NE(error_of(kExitFailed, [&] { train_row(data, 1500); }), "no error");
    return epochs;
  };
  const auto first = order(1, true), again = order(1, true), other = order(2, true);
  EXPECT_EQ(first, again);
  std::set<std::vector<int32_t>> distinct;
  for (const auto& epochs : {first, other})
    for (const auto& epoch : epochs) {
      distinct.insert(epoch);
      std::set<int32_t> samples(epoch.begin(), epoch.end());
      EXPECT_EQ(samples.size(), 500u);
      EXPECT_EQ(*samples.rbegin(), 998);
    }
  EXPECT_EQ(distinct.size(), 6u);
  for (const auto& epoch : order(1, false)) EXPECT_TRUE(std::ranges::is_sorted(epoch));
}

TEST(Dataset, HeldOutDocumentsDependOnTheirTokensAlone) {
  const std::string folder = fresh_folder("heldout");
  Documents documents = random_documents(5, 4000, 20, 1000);
  for (size_t i = 0; i < documents.size(); i++) documents[i].push_back(1000 + static_cast<int>(i));
  const auto heldout_ids = [&](const Documents& a, const Documents& b) {
    const Dataset data({put_documents(folder + "/a.bin", a), put_documents(folder + "/b.bin", b)},
        {.seq_length = 64, .vocab_size = 6000, .heldout_fraction = 0.1});
    std::set<int32_t> ids;
    for (int64_t i = 0; i < data.heldout_samples(); i++)
      for (const int32_t id : heldout_row(data, i).tokens)
        if (id >= 1000) ids.insert(id);
    for (int64_t i = 0; i < data.samples_per_epoch(); i++)
      for (const int32_t id : train_row(data, i).tokens) EXPECT_FALSE(ids.contains(id));
    return ids;
  };
  const auto ids = heldout_ids(documents, {});
  EXPECT_NEAR(static_cast<double>(ids.size()), 400, 80);
  std::ranges::reverse(documents);
  const auto middle = documents.begin() + 1500;
  EXPECT_EQ(heldout_ids({documents.begin(), middle}, {middle, documents.end()}), ids);
}

TEST(Dataset, RefusesCorporaThatDoNotDo) {
  const std::string folder = fresh_folder("refused"), path = folder + "/a.bin";
  Document text(100, 7);
  text[90] = 300;
  put_documents(path, {text});
  const std::string empty = put_documents(folder + "/empty.bin", {});
  const auto open = [&](const std::vector<std::string>& paths, DataOptions options,
                        int64_t samples) {
    return error_of(kExitBadInput, [&] { Dataset(paths, options).require_samples(samples); });
  };
  const DataOptions eight = {.seq_length = 8, .vocab_size = 301, .max_epochs = 2};
  EXPECT_EQ(open({path}, eight, 24), "no error");
  expect_error(open({path}, eight, 25),
      {"data.max_epochs: ", "got 24 samples: 12 an epoch, 2 epochs; need 25",
          "data.max_epochs = 3"});
  expect_error(open({path}, {.seq_length = 100, .vocab_size = 301}, 1),
      {"data.sequence_length: ", "got 0 samples: 0 an epoch, 1 epochs; need 1", "--join"});
  expect_error(open({path}, {.seq_length = 8, .vocab_size = 300}, 1),
      {path + ": ", "got 300 at token 90, need less than 300"});
  expect_error(error_of(kExitBadInput, [&] { Dataset({path}, eight).require_heldout(); }),
      {"data.heldout_fraction: nothing is held out", "got 0 held-out tokens, need 2"});
  expect_error(
      open({empty}, eight, 1), {"data.path: is an empty corpus (got 0 tokens in 1 files)"});
  expect_error(open({path, folder + "/none.bin"}, eight, 1), {folder + "/none.bin: "});
  DataOptions all = eight;
  all.heldout_fraction = 1;
  EXPECT_EQ(open({path}, all, 0), "no error");
  expect_error(open({path}, all, 1), {"data.sequence_length: ", "got 0 samples"});
}

// A corpus too large to be read at the start: sparse files stand for it.
TEST(Dataset, LargeCorporaAreCheckedBySample) {
  const std::string folder = fresh_folder("large"), path = folder + "/a.bin";
  const auto put_sparse = [&](int64_t n, int64_t at) {
    fs::remove(path);
    put(path, npy_header(FileDType::U16, {n}));
    fs::resize_file(path, static_cast<uintmax_t>(128 + 2 * n));
    std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
    file.seekp(128 + 2 * at);
    file << '\x09';
    file.seekp(128 + 2 * n);
    file << ends_bytes({static_cast<uint64_t>(n)});
  };
  const DataOptions options = {.seq_length = 1 << 20, .vocab_size = 9, .shuffle = false};
  put_sparse((1 << 29) + 2, 1 << 29);
  const Dataset data({path}, options);
  ASSERT_EQ(data.samples_per_epoch(), 512);
  train_row(data, 3);
  expect_error(
      error_of(kExitBadInput, [&] { train_row(data, 511); }), {path, "got 9 at token 536870912"});
  put_sparse(8 << 20, 5 << 20);  // small enough to be read whole, in parallel
  expect_error(
      error_of(kExitBadInput, [&] { Dataset({path}, options); }), {"got 9 at token 5242880"});
  // The fingerprint reads blocks: the first and the last, and none at n / 40.
  const int64_t n = int64_t{33} << 20;
  std::set<uint64_t> prints;
  for (const int64_t at : {int64_t{0}, int64_t{1000}, n - 1, n / 40, n / 40 + 1}) {
    put_sparse(n, at);
    prints.insert(Dataset({path}, {.seq_length = 8, .vocab_size = 10}).fingerprint());
  }
  EXPECT_EQ(prints.size(), 4u);
  fs::remove_all(folder);
}

TEST(Dataset, FingerprintIsOfContents) {
  const std::string folder = fresh_folder("fingerprint");
  const DataOptions options = {.seq_length = 4, .vocab_size = 100};
  int next = 0;
  const auto print = [&](const std::vector<Documents>& files, FileDType type = FileDType::U16) {
    std::vector<std::string> paths;
    for (const Documents& documents : files)
      paths.push_back(
          put_documents(folder + "/" + std::to_string(next++) + ".bin", documents, type));
    return Dataset(paths, options).fingerprint();
  };
  const Documents a = {{1, 2, 3}, {4, 5}}, b = {{6, 7}};
  EXPECT_EQ(print({a, b}), print({a, b}));
  const std::set<uint64_t> prints = {print({a, b}), print({b, a}), print({a, b}, FileDType::U32),
      print({a}), print({{{1, 2, 3, 4, 5}}, b}), print({{{1, 2, 3}, {4, 6}}, b}),
      print({{{1, 2, 3}, {4, 5}, {6, 7}}})};
  EXPECT_EQ(prints.size(), 7u);
}

TEST(Dataset, ThreadsMayReadAtOnce) {
  const std::string path = fresh_folder("threads") + "/a.bin";
  put_documents(path, random_documents(9, 300, 40, 500));
  const Dataset data({path},
      {.seq_length = 16, .vocab_size = 500, .heldout_fraction = 0.3, .document_mask = true});
  std::vector<std::vector<Row>> seen(4);
  std::vector<std::thread> threads;
  for (auto& rows : seen)
    threads.emplace_back([&] {
      for (int64_t i = 0; i < data.samples_per_epoch(); i++) rows.push_back(train_row(data, i));
    });
  for (std::thread& thread : threads) thread.join();
  for (const auto& rows : seen) EXPECT_TRUE(rows == seen[0]);
}

// ---- Rows and ranks -----------------------------------------------------------------------------

TEST(BatchShape, DealsOutEachSampleOnce) {
  for (const BatchShape& shape : {BatchShape{24, 1, 1, 1}, BatchShape{24, 2, 3, 2},
           BatchShape{24, 3, 2, 4}, BatchShape{24, 4, 1, 6}, BatchShape{24, 1, 24, 1}}) {
    for (const int64_t step : {0, 5}) {
      std::vector<int64_t> seen;
      for (int dp = 0; dp < shape.dp; dp++)
        for (int ep = 0; ep < shape.ep; ep++)
          for (int64_t row = 0; row < shape.rows_per_rank(); row++)
            seen.push_back(global_sample(shape, step, dp, ep, row));
      std::ranges::sort(seen);
      std::vector<int64_t> want(24);
      std::iota(want.begin(), want.end(), step * 24);
      EXPECT_EQ(seen, want);
    }
    EXPECT_EQ(shape.num_micro_batches() * shape.micro_batch * shape.dp * shape.ep, 24);
  }
  // Micro-batch m of all ranks together is samples [m * b * dp * ep, (m + 1) * b * dp * ep).
  EXPECT_EQ(global_sample({24, 2, 3, 2}, 1, 2, 1, 3), 24 + 12 + (2 * 2 + 1) * 2 + 1);
}

TEST(Zigzag, BlocksCoverARowOnceAndBalanceIt) {
  std::vector<int32_t> row(48);
  std::iota(row.begin(), row.end(), 0);
  for (const int cp : {1, 2, 3, 4, 8}) {
    std::vector<int32_t> seen;
    for (int rank = 0; rank < cp; rank++) {
      const ZigzagBlocks blocks = zigzag_blocks(48, cp, rank);
      EXPECT_EQ(blocks.total(), 48 / cp);
      std::vector<int32_t> mine(blocks.total());
      take_zigzag(row.data(), blocks, mine.data());
      EXPECT_TRUE(std::ranges::is_sorted(mine));
      // The same number of keys before a rank's tokens on every rank.
      EXPECT_EQ(std::accumulate(mine.begin(), mine.end(), 0), 47 * 24 / cp);
      seen.insert(seen.end(), mine.begin(), mine.end());
    }
    std::ranges::sort(seen);
    EXPECT_EQ(seen, row);
  }
  std::vector<int32_t> mine(4);
  take_zigzag(row.data(), zigzag_blocks(8, 2, 1), mine.data());
  EXPECT_EQ(mine, (std::vector<int32_t>{2, 3, 4, 5}));
  EXPECT_EQ(zigzag_blocks(7, 1, 0).total(), 7);
  expect_error(error_of(kExitBadInput, [] { zigzag_blocks(10, 2, 0); }),
      {"data.sequence_length: ", "got 10 and cp = 2, need a multiple of 4",
          "data.sequence_length = 12"});
}

TEST(Positions, RestartInEachDocument) {
  const std::vector<int32_t> ends = {3, 3, 3, 4, 8, 8, 8, 8};
  std::vector<int32_t> positions(8);
  positions_from_ends(ends.data(), 8, positions.data());
  EXPECT_EQ(positions, (std::vector<int32_t>{0, 1, 2, 0, 0, 1, 2, 3}));
}

// ---- The bigram model ---------------------------------------------------------------------------

namespace {

using Pair = std::pair<int32_t, int32_t>;

void add_pairs(const Text& text, bool mask, std::vector<Pair>& pairs) {
  for (size_t i = 0; i + 1 < text.size(); i++)
    if (!mask || text[i].second == text[i + 1].second)
      pairs.push_back({text[i].first, text[i + 1].first});
}

double discount_of(const auto& counts) {
  double ones = 0, twos = 0;
  for (const auto& [what, n] : counts) {
    ones += n == 1;
    twos += n == 2;
  }
  return ones == 0 ? 0.5 : ones / (ones + 2 * twos);
}

// Interpolated Kneser-Ney by its definition, from lists of pairs.
double reference_probability(const std::vector<Pair>& train, Pair wanted, int vocab) {
  std::map<Pair, double> pairs;
  for (const Pair& pair : train) pairs[pair]++;
  std::map<int32_t, double> continuations;
  double total = 0, followers = 0;
  for (const auto& [pair, n] : pairs) {
    continuations[pair.second]++;
    if (pair.first == wanted.first) {
      total += n;
      followers++;
    }
  }
  double low = 1.0 / vocab;
  if (!pairs.empty()) {
    const double d = discount_of(continuations), kinds = static_cast<double>(pairs.size());
    const auto found = continuations.find(wanted.second);
    const double n = found == continuations.end() ? 0 : found->second;
    low = std::max(n - d, 0.0) / kinds +
          d * static_cast<double>(continuations.size()) / kinds / vocab;
  }
  if (total == 0) return low;
  const double d = discount_of(pairs);
  const auto found = pairs.find(wanted);
  const double n = found == pairs.end() ? 0 : found->second;
  return std::max(n - d, 0.0) / total + d * followers / total * low;
}

}  // namespace

TEST(Bigram, EqualsItsDefinition) {
  const std::string folder = fresh_folder("bigram");
  const int vocab = 12;
  const Documents random = random_documents(11, 60, 12, vocab - 1);  // one id never occurs
  const std::vector<std::vector<Documents>> corpora = {
      {random, random_documents(12, 20, 30, 5)},
      {{{1, 2, 1, 2, 1, 2, 1, 2}, {3, 4, 3, 4, 5, 1}, {2, 1, 2, 1}, {9, 9, 9}, {4, 2}}},
  };
  for (const auto& corpus : corpora)
    for (const bool mask : {false, true})
      for (const double fraction : {0.3, 0.6, 1.0}) {
        std::vector<std::string> paths;
        std::vector<Pair> train, heldout;
        Text heldout_text;
        int document = 0;
        for (size_t f = 0; f < corpus.size(); f++) {
          paths.push_back(put_documents(folder + "/" + std::to_string(f) + ".bin", corpus[f]));
          Text text;
          for (const Document& d : corpus[f]) {
            Text& to = is_heldout(d, FileDType::U16, fraction) ? heldout_text : text;
            for (const int32_t id : d) to.push_back({id, document});
            document++;
          }
          add_pairs(text, mask, train);
        }
        add_pairs(heldout_text, mask, heldout);
        const Dataset data(paths, {.seq_length = 5,
                                      .vocab_size = vocab,
                                      .heldout_fraction = fraction,
                                      .document_mask = mask});
        double nats = 0, sum = 0;
        for (const Pair& pair : heldout)
          nats -= std::log(reference_probability(train, pair, vocab));
        for (int32_t id = 0; id < vocab; id++) sum += reference_probability(train, {2, id}, vocab);
        EXPECT_NEAR(sum, 1, 1e-12);
        ASSERT_FALSE(heldout.empty());
        EXPECT_NEAR(bigram_nats(data), nats / static_cast<double>(heldout.size()), 1e-12);
      }
}

TEST(Bigram, KnowsAChainAndNotNoise) {
  const std::string path = fresh_folder("chain") + "/a.bin";
  Documents chain;
  for (int i = 0; i < 200; i++) {
    Document& d = chain.emplace_back();
    for (int j = 0; j < 50; j++) d.push_back((i * 7 + j * 3) % 16);  // each id has one follower
  }
  const DataOptions options = {
      .seq_length = 32, .vocab_size = 16, .heldout_fraction = 0.5, .document_mask = true};
  put_documents(path, chain);
  EXPECT_LT(bigram_nats(Dataset({path}, options)), 0.01);
  put_documents(path, random_documents(3, 400, 100, 16));
  EXPECT_NEAR(bigram_nats(Dataset({path}, options)), std::log(16.0), 0.05);
}

}  // namespace pith
