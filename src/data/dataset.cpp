#include "data/dataset.h"

#include <xxhash.h>

#include <algorithm>

#include "core/rng.h"

namespace pith {

i64 TokenFile::doc_end(i64 doc) const {
  i64 end;
  memcpy(&end, ends + 8 * doc, 8);
  return end;
}

void TokenFile::copy(i64 offset, i64 count, i64 vocab_size, int* dst) const {
  i64 width = size_of(type);
  for (i64 i = offset; i < offset + count; i++) {
    u32 id;
    memcpy(&id, tokens + i * width, 4);  // the second array lies behind the last token
    if (type == FileDType::U16) id &= 0xffff;
    if (id >= vocab_size)
      bad_input(map.path(),
          text("holds a token id beyond the vocabulary (got %u at token %ld, need less than "
               "%ld)",
              id, i, vocab_size),
          "the model's own tokenizer");
    *dst++ = int(id);
  }
}

TokenFile open_token_file(const string& path) {
  TokenFile file{.map = MappedFile(path)};
  const char* const end_of_file = file.map.data() + file.map.size();
  auto refuse = [&](const string& what) { bad_input(path, what, "pith tokenize again"); };
  auto read = [&](const char* at) {
    bool second = at != file.map.data();
    NpyHeader array =
        parse_npy_header(at, end_of_file - at, second ? path + " (document ends)" : path);
    bool known = second ? array.dtype == FileDType::U64
                        : array.dtype == FileDType::U16 || array.dtype == FileDType::U32;
    if (array.shape.size() != 1 || !known)
      refuse(text("does not hold %s (got %s of %zu dimensions, need %s of one)",
          second ? "document ends second" : "token ids first", npy_name_of(array.dtype),
          array.shape.size(), second ? "<u8" : "<u2 or <u4"));
    return array;
  };
  const NpyHeader ids = read(file.map.data());
  file.type = ids.dtype;
  file.num_tokens = ids.numel();
  file.tokens = file.map.data() + ids.header_bytes;
  const char* rest = file.tokens + ids.bytes();
  const NpyHeader ends = read(rest);
  file.num_docs = ends.numel();
  file.ends = rest + ends.header_bytes;
  i64 more = end_of_file - file.ends - ends.bytes();
  if (more != 0) refuse(text("goes on behind its two arrays (got %ld bytes more)", more));
  if (file.num_docs == 0 && file.num_tokens > 0) refuse("has tokens, but no documents");
  i64 least = 0;
  for (i64 doc = 0; doc < file.num_docs; doc++) {
    i64 end = file.doc_end(doc), most = file.num_tokens;
    if (doc + 1 == file.num_docs) least = most;
    if (end < least || end > most)
      refuse(text("has a corrupt end of document %ld (got %lu, need %ld to %ld)", doc, u64(end),
          least, most));
    least = end;
  }
  return file;
}

vector<string> find_token_files(const string& path) {
  vector<string> found = find_files(path);
  if (found != vector{path})
    std::erase_if(found, [](const string& file) { return !file.ends_with(".bin"); });
  if (found.empty())
    bad_input(path, "holds no token file (got none that ends in .bin)",
        "make token files with pith tokenize");
  return found;
}

Dataset::Dataset(const vector<string>& paths, const DataOptions& options)
    : options_(options), train_(paths.size()), first_sample_{0} {
  for (const string& path : paths) {
    files_.push_back(open_token_file(path));
    token_bytes_ += files_.back().num_tokens * size_of(files_.back().type);
  }
  if (token_bytes_ == 0)
    bad_input("data.path", text("is an empty corpus (got 0 tokens in %zu files)", paths.size()),
        "another folder");
  constexpr i64 kChecked = i64{1} << 30, kBlock = 4096;
  int block[kBlock];
  for (int index = 0; index < int(files_.size()); index++) {
    const TokenFile& file = files_[index];
    i64 width = size_of(file.type), n = file.num_tokens;
    for (i64 at = 0; at < n && token_bytes_ <= kChecked; at += kBlock)
      file.copy(at, min(kBlock, n - at), options.vocab_size, block);
    for (i64 doc = 0, begin = 0, end; doc < file.num_docs; doc++, begin = end) {
      end = file.doc_end(doc);
      if (begin == end) continue;
      bool held = options.heldout_fraction >= 1;
      if (options.heldout_fraction > 0 && !held) {
        u64 hash = XXH3_64bits(file.tokens + begin * width, (end - begin) * width);
        held = double(hash >> 11) * 0x1.0p-53 < options.heldout_fraction;
      }
      Stream& stream = held ? heldout_ : train_[index];
      stream.documents.push_back({stream.num_tokens, begin, index});
      stream.num_tokens += end - begin;
    }
    first_sample_.push_back(first_sample_.back() + train_[index].num_labels() / options.seq_length);
  }
}

i64 Dataset::heldout_samples() const {
  return (heldout_.num_labels() + options_.seq_length - 1) / options_.seq_length;
}

void Dataset::require_samples(i64 required) const {
  i64 epoch = samples_per_epoch(), epochs = options_.max_epochs;
  if (required <= epoch * epochs) return;
  string what = text(
      "the corpus is smaller than the run (got %ld samples: %ld an epoch, %ld epochs; need %ld)",
      epoch * epochs, epoch, epochs, required);
  if (epoch == 0) bad_input("data.sequence_length", what, "a shorter one, or pith tokenize --join");
  bad_input("data.max_epochs", what,
      text("data.max_epochs = %ld, or fewer train.steps", (required + epoch - 1) / epoch));
}

void Dataset::require_heldout() const {
  if (heldout_samples() > 0) return;
  bad_input("data.heldout_fraction",
      text("nothing is held out to evaluate on (got %ld held-out tokens, need 2)",
          heldout_.num_tokens),
      "a larger one, or more documents");
}

void Dataset::train_sample(i64 index, const SampleRow& row) const {
  i64 n = samples_per_epoch(), all = n * options_.max_epochs;
  if (index < 0 || index >= all)
    failed("train_sample", text("sample %ld (need less than %ld)", index, all));
  i64 sample = index % n;
  if (options_.shuffle) {
    u64 key = stream_key(options_.seed, text("data.epoch.%ld", index / n));
    sample = i64(permute_index(key, sample, n));
  }
  auto file = std::ranges::upper_bound(first_sample_, sample) - first_sample_.begin() - 1;
  cut(train_[file], (sample - first_sample_[file]) * options_.seq_length, row);
}

void Dataset::heldout_sample(i64 index, const SampleRow& row) const {
  cut(heldout_, min(index * options_.seq_length, heldout_.num_tokens), row);
  if (index >= heldout_samples()) std::fill_n(row.labels, options_.seq_length, kIgnoreLabel);
}

void Dataset::cut(const Stream& stream, i64 begin, const SampleRow& row) const {
  i64 length = options_.seq_length;
  i64 n = min(length + 1, stream.num_tokens - begin);
  bool mask = options_.document_mask;
  vector<int> window(length + 1), ends(length, int(length));
  std::fill_n(row.labels, length, kIgnoreLabel);
  auto next = std::ranges::upper_bound(stream.documents, begin, {}, &Document::begin);
  for (i64 at = 0, stop; at < n; at = stop, next++) {
    const Document& document = next[-1];
    i64 end = next == stream.documents.end() ? stream.num_tokens : next->begin;
    stop = min(n, end - begin);
    files_[document.file].copy(document.file_offset + begin + at - document.begin, stop - at,
        options_.vocab_size, &window[at]);
    // The label of the one before it, in its document or, unmasked, in any.
    i64 first = mask ? at + 1 : max<i64>(at, 1);
    std::copy(window.data() + first, window.data() + stop, row.labels + first - 1);
    i64 inside = min(stop, length);
    if (mask) std::fill_n(ends.data() + at, inside - at, int(inside));
  }
  std::copy_n(window.begin(), length, row.tokens);
  if (row.doc_ends) std::ranges::copy(ends, row.doc_ends);
}

u64 Dataset::fingerprint() const {
  bool whole = token_bytes_ <= i64{64} << 20;
  u64 hash = 0;
  auto add = [&](const void* data, i64 bytes) {
    hash = XXH3_64bits_withSeed(data, size_t(bytes), hash);
  };
  for (const TokenFile& file : files_) {
    const i64 sizes[] = {size_of(file.type), file.num_tokens, file.num_docs};
    i64 bytes = sizes[0] * sizes[1];
    i64 block = whole ? bytes : min<i64>(bytes, 4096);
    add(sizes, sizeof sizes);
    add(file.ends, 8 * file.num_docs);
    for (i64 i = 0; i < (whole ? 1 : 16); i++)  // from the first block to the last one
      add(file.tokens + (bytes - block) * i / 15, block);
  }
  return hash;
}

void positions_from_ends(const int* doc_ends, i64 seq_length, int* positions) {
  i64 begin = 0;
  for (i64 i = 0; i < seq_length; i++) {
    if (i > 0 && i == doc_ends[i - 1]) begin = i;
    positions[i] = int(i - begin);
  }
}

i64 global_sample(const BatchShape& shape, i64 step, int dp_rank, int ep_rank, i64 row) {
  i64 micro = row / shape.micro_batch, sender = dp_rank * shape.ep + ep_rank;
  i64 group = micro * shape.dp * shape.ep + sender;
  return step * shape.global_batch + group * shape.micro_batch + row % shape.micro_batch;
}

ZigzagBlocks zigzag_blocks(i64 seq_length, int cp, int cp_rank) {
  if (cp == 1) return {{0, seq_length}, {seq_length, 0}};
  i64 blocks = 2 * cp, length = seq_length / blocks;
  if (seq_length % blocks != 0)
    bad_input("data.sequence_length",
        text("does not split into 2 * parallel.cp blocks (got %ld and cp = %d, need a multiple "
             "of %ld)",
            seq_length, cp, blocks),
        text("data.sequence_length = %ld", (length + 1) * blocks));
  return {{cp_rank * length, (blocks - 1 - cp_rank) * length}, {length, length}};
}

void take_zigzag(const int* row, const ZigzagBlocks& blocks, int* out) {
  for (int i = 0; i < 2; i++) out = std::copy_n(row + blocks.begin[i], blocks.length[i], out);
}

// The absolute discount, of how many were counted once and twice.
static double discount_of(const auto& counts) {
  double ones = std::ranges::count(counts, 1u), twos = std::ranges::count(counts, 2u);
  return ones == 0 ? 0.5 : ones / (ones + 2 * twos);  // the unseen need some
}

double bigram_nats(const Dataset& data) {
  i64 v = data.options_.vocab_size, length = data.options_.seq_length;
  vector<int> tokens(length), labels(length);
  auto each_pair = [&](const Dataset::Stream& stream, const auto& use) {
    for (i64 begin = 0; begin < stream.num_labels(); begin += length) {
      data.cut(stream, begin, {tokens.data(), labels.data()});
      for (i64 i = 0; i < length; i++)
        if (labels[i] != kIgnoreLabel) use(tokens[i], labels[i]);
    }
  };
  vector<u32> pairs(v * v);                      // [first, second]: times seen
  vector<double> before(v), after(v), total(v);  // distinct neighbours; times followed
  double kinds = 0, nats = 0, count = 0;
  for (const Dataset::Stream& stream : data.train_)
    each_pair(stream, [&](int a, int b) {
      bool is_new = pairs[a * v + b]++ == 0;
      before[b] += is_new;
      after[a] += is_new;
      kinds += is_new;
      total[a]++;
    });
  double pair_discount = discount_of(pairs), discount = discount_of(before);
  double seen = v - std::ranges::count(before, 0);
  // Counts less their discount, which the lower order spreads.
  const auto mix = [](double n, double off, double kind, double low, double all) {
    return all == 0 ? low : (max(n - off, 0.0) + off * kind * low) / all;
  };
  each_pair(data.heldout_, [&](int a, int b) {
    double low = mix(before[b], discount, seen, 1.0 / v, kinds);
    nats -= std::log(mix(pairs[a * v + b], pair_discount, after[a], low, total[a]));
    count++;
  });
  return nats / count;
}

}
