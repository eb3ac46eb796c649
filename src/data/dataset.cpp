#include "data/dataset.h"

#include <xxhash.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <filesystem>
#include <thread>

#include "core/log.h"
#include "core/rng.h"

namespace pith {

namespace fs = std::filesystem;

static long long ll(int64_t value) { return value; }

// Calls fn(begin, end) for ranges that cut [0, n) into parts of at least `grain`, a thread each. Of
// several exceptions the one of the lowest range is thrown, so errors do not depend on timing.
template <class Fn>
static void in_parallel(int64_t n, int64_t grain, const Fn& fn) {
    const int64_t cores = std::clamp<int64_t>(std::thread::hardware_concurrency(), 1, 16);
    const int64_t parts = std::clamp<int64_t>(n / grain, 1, cores);
    std::vector<std::exception_ptr> errors(static_cast<size_t>(parts));
    const auto part = [&](int64_t i) {
        try {
            fn(n * i / parts, n * (i + 1) / parts);
        } catch (...) {
            errors[static_cast<size_t>(i)] = std::current_exception();
        }
    };
    std::vector<std::thread> threads;
    for (int64_t i = 1; i < parts; i++) threads.emplace_back(part, i);
    part(0);
    for (std::thread& thread : threads) thread.join();
    for (const std::exception_ptr& error : errors)
        if (error) std::rethrow_exception(error);
}

// ---- Token files --------------------------------------------------------------------------------

int64_t TokenFile::doc_end(int64_t doc) const {
    int64_t end;
    memcpy(&end, ends + 8 * doc, 8);
    return end;
}

int64_t TokenFile::doc_of(int64_t offset) const {
    int64_t low = 0, high = num_docs - 1;  // the first document that ends behind `offset`
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (doc_end(middle) > offset)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

// Widens n ids at `src`, which may be unaligned; returns the largest.
template <class T>
static uint64_t widen(const char* src, int64_t n, int32_t* dst) {
    T largest = 0;
    for (int64_t i = 0; i < n; i++) {
        T id;
        memcpy(&id, src + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
        dst[i] = static_cast<int32_t>(id);
        largest = std::max(largest, id);
    }
    return largest;
}

void TokenFile::copy(int64_t offset, int64_t count, int64_t vocab_size, int32_t* dst) const {
    const int64_t width = size_of(type);
    const char* src = tokens + offset * width;
    uint64_t largest = 0;
    switch (type) {
        case NpyType::U1: largest = widen<uint8_t>(src, count, dst); break;
        case NpyType::U2: largest = widen<uint16_t>(src, count, dst); break;
        case NpyType::U4: largest = widen<uint32_t>(src, count, dst); break;
        default: largest = widen<uint64_t>(src, count, dst); break;
    }
    if (count == 0 || largest < static_cast<uint64_t>(vocab_size)) return;
    int64_t at = 0;
    uint64_t id = 0;
    for (; id < static_cast<uint64_t>(vocab_size); at++) {
        id = 0;
        memcpy(&id, src + at * width, static_cast<size_t>(width));
    }
    bad_input(map.path(),
              text("holds a token id beyond the vocabulary (got %llu at token %lld, need less than "
                   "%lld)",
                   static_cast<unsigned long long>(id), ll(offset + at - 1), ll(vocab_size)),
              "use the model's own tokenizer, or a model with a larger vocab_size");
}

TokenFile open_token_file(const std::string& path) {
    const char* remedy = "make the file again with pith tokenize";
    TokenFile file;
    file.map = MappedFile(path);
    const NpyHeader ids = parse_npy_header(file.map.data(), file.map.size(), path);
    if (ids.type > NpyType::U8 || ids.shape.size() != 1)
        bad_input(path,
                  text("has no token ids as its first array (got %s of %zu dimensions, need one "
                       "dimension of |u1, <u2, <u4 or <u8)",
                       name_of(ids.type), ids.shape.size()),
                  remedy);
    file.type = ids.type;
    file.num_tokens = ids.numel();
    file.tokens = file.map.data() + ids.header_bytes;
    const char* rest = file.tokens + ids.data_bytes();
    const int64_t rest_bytes = file.map.data() + file.map.size() - rest;
    const NpyHeader ends = parse_npy_header(rest, rest_bytes, path + " (document ends)");
    if (ends.type != NpyType::U8 || ends.shape.size() != 1)
        bad_input(path,
                  text("has no document ends as its second array (got %s of %zu dimensions, need "
                       "one dimension of <u8)",
                       name_of(ends.type), ends.shape.size()),
                  remedy);
    const int64_t used = ends.header_bytes + ends.data_bytes();
    if (used != rest_bytes)
        bad_input(path,
                  text("goes on behind its two arrays (got %lld bytes more, need none)",
                       ll(rest_bytes - used)),
                  remedy);
    file.num_docs = ends.numel();
    file.ends = rest + ends.header_bytes;
    int64_t last = 0;
    for (int64_t doc = 0; doc < file.num_docs; doc++) {
        const int64_t end = file.doc_end(doc);
        if (end < last || end > file.num_tokens)
            bad_input(
                path,
                text("has a corrupt end of document %lld (got %llu, need %lld to %lld)", ll(doc),
                     static_cast<unsigned long long>(end), ll(last), ll(file.num_tokens)),
                remedy);
        last = end;
    }
    if (last != file.num_tokens)
        bad_input(path,
                  text("has tokens behind its last document (got an end of %lld, need %lld)",
                       ll(last), ll(file.num_tokens)),
                  remedy);
    return file;
}

std::vector<std::string> find_token_files(const std::string& path) {
    std::error_code error;
    if (fs::is_regular_file(path, error)) return {path};
    if (!fs::is_directory(path, error))
        bad_input(path, "is neither a token file nor a folder of them",
                  "check the path, or make the files with pith tokenize");
    std::vector<fs::path> found;
    fs::recursive_directory_iterator it(path, error), end;
    for (; !error && it != end; it.increment(error)) {
        const fs::path name = it->path().filename();
        std::error_code ignored;  // of an entry that went away: it is no file then
        if (name.native().front() == '.') {
            it.disable_recursion_pending();
        } else if (name.extension() == ".bin" && it->is_regular_file(ignored)) {
            found.push_back(it->path());
        }
    }
    if (error) bad_input(path, "cannot be listed (" + error.message() + ")", "check permissions");
    if (found.empty())
        bad_input(path, "holds no token file (got 0 files that end in .bin, need 1 or more)",
                  "make them with pith tokenize");
    std::sort(found.begin(), found.end());
    return {found.begin(), found.end()};
}

// ---- Dataset ------------------------------------------------------------------------------------

// Adds tokens [begin, end) of a file; what follows the last piece in its file only makes it longer.
static void append(TokenStream& stream, int file, int64_t begin, int64_t end) {
    if (begin == end) return;
    const bool follows =
        !stream.pieces.empty() && stream.pieces.back().file == file &&
        stream.pieces.back().file_offset + stream.num_tokens - stream.pieces.back().begin == begin;
    if (!follows) stream.pieces.push_back({stream.num_tokens, begin, file});
    stream.num_tokens += end - begin;
}

static size_t piece_at(const TokenStream& stream, int64_t position) {
    const auto next = std::upper_bound(
        stream.pieces.begin(), stream.pieces.end(), position,
        [](int64_t value, const TokenStream::Piece& piece) { return value < piece.begin; });
    return static_cast<size_t>(next - stream.pieces.begin()) - 1;
}

static int64_t piece_end(const TokenStream& stream, size_t piece) {
    return piece + 1 < stream.pieces.size() ? stream.pieces[piece + 1].begin : stream.num_tokens;
}

Dataset::Dataset(const std::vector<std::string>& paths, const DataOptions& options)
    : options_(options) {
    if (options.seq_length < 1 || options.vocab_size < 1)
        failed("Dataset", text("seq_length %lld, vocab_size %lld (need 1 or more)",
                               ll(options.seq_length), ll(options.vocab_size)));
    if (paths.empty())
        bad_input("data.path", "names no token file (got 0, need 1 or more)",
                  "make them with pith tokenize");
    files_.resize(paths.size());
    in_parallel(static_cast<int64_t>(paths.size()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) files_[i] = open_token_file(paths[i]);
    });
    if (num_tokens() == 0)
        bad_input(paths.front(),
                  text("is an empty corpus (got 0 tokens in %zu files)", paths.size()),
                  "check what was tokenised");
    check_ids();
    train_.resize(files_.size());
    first_sample_ = {0};
    for (size_t i = 0; i < files_.size(); i++) {
        split_documents(static_cast<int>(i));
        const int64_t samples =
            std::max<int64_t>(train_[i].num_tokens - 1, 0) / options_.seq_length;
        first_sample_.push_back(first_sample_.back() + samples);
    }
}

void Dataset::check_ids() const {
    constexpr int64_t kWholeBytes = int64_t{1} << 30, kBlock = 4096;
    int64_t bytes = 0;
    for (const TokenFile& file : files_) bytes += file.num_tokens * size_of(file.type);
    if (bytes > kWholeBytes) return;
    for (const TokenFile& file : files_)
        in_parallel(file.num_tokens, 1 << 20, [&](int64_t begin, int64_t end) {
            int32_t block[kBlock];
            for (int64_t i = begin; i < end; i += kBlock)
                file.copy(i, std::min(kBlock, end - i), options_.vocab_size, block);
        });
}

void Dataset::split_documents(int index) {
    const TokenFile& file = files_[index];
    const double fraction = options_.heldout_fraction;
    if (fraction <= 0 || fraction >= 1) {
        append(fraction <= 0 ? train_[index] : heldout_, index, 0, file.num_tokens);
        return;
    }
    const int64_t width = size_of(file.type);
    std::vector<char> held(static_cast<size_t>(file.num_docs));
    in_parallel(file.num_docs, 1024, [&](int64_t first, int64_t last) {
        int64_t begin = first == 0 ? 0 : file.doc_end(first - 1);
        for (int64_t doc = first; doc < last; doc++) {
            const int64_t end = file.doc_end(doc);
            const uint64_t hash = XXH3_64bits(file.tokens + begin * width,
                                              static_cast<size_t>((end - begin) * width));
            held[doc] = static_cast<double>(hash >> 11) * 0x1.0p-53 < fraction;
            begin = end;
        }
    });
    int64_t begin = 0;
    for (int64_t doc = 0; doc < file.num_docs; doc++) {
        const int64_t end = file.doc_end(doc);
        append(held[doc] ? heldout_ : train_[index], index, begin, end);
        begin = end;
    }
}

int64_t Dataset::num_tokens() const {
    int64_t sum = 0;
    for (const TokenFile& file : files_) sum += file.num_tokens;
    return sum;
}

int64_t Dataset::num_docs() const {
    int64_t sum = 0;
    for (const TokenFile& file : files_) sum += file.num_docs;
    return sum;
}

int64_t Dataset::heldout_samples() const {
    const int64_t labels = std::max<int64_t>(heldout_.num_tokens - 1, 0);
    return (labels + options_.seq_length - 1) / options_.seq_length;
}

void Dataset::require_samples(int64_t required) const {
    const int64_t epoch = samples_per_epoch();
    if (epoch == 0 && required > 0) {
        int64_t longest = 0;
        for (const TokenStream& stream : train_) longest = std::max(longest, stream.num_tokens);
        bad_input("data.sequence_length",
                  text("no file is long enough for one training sample (got at most %lld training "
                       "tokens in a file, need %lld)",
                       ll(longest), ll(options_.seq_length + 1)),
                  "a smaller data.sequence_length or data.heldout_fraction, or files joined with "
                  "pith tokenize --join");
    }
    int64_t available = 0;
    if (__builtin_mul_overflow(epoch, options_.max_epochs, &available)) return;
    if (required <= available) return;
    bad_input("data.max_epochs",
              text("the corpus is smaller than the run (got %s samples: %s an epoch, %s epochs; "
                   "need %s)",
                   with_commas(available).c_str(), with_commas(epoch).c_str(),
                   with_commas(options_.max_epochs).c_str(), with_commas(required).c_str()),
              text("data.max_epochs = %lld, fewer train.steps, or more text",
                   ll((required + epoch - 1) / epoch)));
}

void Dataset::require_heldout() const {
    if (heldout_samples() > 0) return;
    bad_input(
        "data.heldout_fraction",
        text("nothing is held out to evaluate on (got %lld held-out tokens of %lld documents, "
             "need 2)",
             ll(heldout_.num_tokens), ll(num_docs())),
        "a larger data.heldout_fraction, or more documents");
}

void Dataset::train_sample(int64_t index, const SampleRow& row) const {
    const int64_t n = samples_per_epoch();
    if (index < 0 || n == 0 || index / n >= options_.max_epochs)
        failed("train_sample", text("sample %lld (need less than %lld epochs of %lld)", ll(index),
                                    ll(options_.max_epochs), ll(n)));
    int64_t sample = index % n;
    if (options_.shuffle) {
        const uint64_t key = stream_key(options_.seed, text("data.epoch.%lld", ll(index / n)));
        sample = static_cast<int64_t>(
            permute_index(key, static_cast<uint64_t>(sample), static_cast<uint64_t>(n)));
    }
    const auto next = std::upper_bound(first_sample_.begin(), first_sample_.end(), sample);
    const auto file = next - first_sample_.begin() - 1;
    cut(train_[file], (sample - first_sample_[file]) * options_.seq_length, row);
}

void Dataset::heldout_sample(int64_t index, const SampleRow& row) const {
    const int64_t begin = std::min(index, heldout_samples()) * options_.seq_length;
    cut(heldout_, std::min(begin, heldout_.num_tokens), row);
    if (index >= heldout_samples()) std::fill_n(row.labels, options_.seq_length, kIgnoreLabel);
}

void Dataset::read(const TokenStream& stream, int64_t begin, int64_t count, int32_t* dst) const {
    if (count == 0) return;
    for (size_t p = piece_at(stream, begin); count > 0; p++) {
        const TokenStream::Piece& piece = stream.pieces[p];
        const int64_t n = std::min(count, piece_end(stream, p) - begin);
        files_[piece.file].copy(piece.file_offset + begin - piece.begin, n, options_.vocab_size,
                                dst);
        begin += n;
        dst += n;
        count -= n;
    }
}

void Dataset::cut(const TokenStream& stream, int64_t begin, const SampleRow& row) const {
    const int64_t length = options_.seq_length;
    const int64_t n = std::min(length, stream.num_tokens - begin);
    read(stream, begin, n, row.tokens);
    std::fill(row.tokens + n, row.tokens + length, 0);
    std::copy(row.tokens + 1, row.tokens + length, row.labels);
    std::fill(row.labels + std::max<int64_t>(n - 1, 0), row.labels + length, kIgnoreLabel);
    if (n > 0 && begin + n < stream.num_tokens) read(stream, begin + n, 1, row.labels + n - 1);
    if (row.doc_ends) std::fill_n(row.doc_ends, length, static_cast<int32_t>(length));
    if (options_.document_mask && n > 0) mask_documents(stream, begin, row);
}

void Dataset::mask_documents(const TokenStream& stream, int64_t begin, const SampleRow& row) const {
    const int64_t length = options_.seq_length;
    const int64_t end = std::min(begin + length, stream.num_tokens);
    int64_t at = begin;
    for (size_t p = piece_at(stream, begin); at < end; p++) {
        // A piece is whole documents, so each that begins in it ends in it.
        const TokenStream::Piece& piece = stream.pieces[p];
        const TokenFile& file = files_[piece.file];
        const int64_t to_stream = piece.begin - piece.file_offset;
        int64_t doc = file.doc_of(at - to_stream);
        for (const int64_t stop = std::min(end, piece_end(stream, p)); at < stop; doc++) {
            const int64_t doc_end = file.doc_end(doc) + to_stream - begin;  // in the row
            const int64_t here = std::min(doc_end, length);
            if (row.doc_ends)
                std::fill(row.doc_ends + (at - begin), row.doc_ends + here,
                          static_cast<int32_t>(here));
            if (doc_end <= length) row.labels[doc_end - 1] = kIgnoreLabel;
            at = begin + here;
        }
    }
}

uint64_t Dataset::fingerprint() const {
    constexpr int64_t kWholeBytes = int64_t{64} << 20, kBlocks = 16, kBlockBytes = 4096;
    uint64_t hash = 0;
    const auto add = [&](const void* data, int64_t bytes) {
        hash = XXH3_64bits_withSeed(data, static_cast<size_t>(bytes), hash);
    };
    int64_t all_bytes = 0;
    for (const TokenFile& file : files_) all_bytes += file.num_tokens * size_of(file.type);
    for (const TokenFile& file : files_) {
        const int64_t sizes[3] = {size_of(file.type), file.num_tokens, file.num_docs};
        add(sizes, sizeof sizes);
        add(file.ends, 8 * file.num_docs);
        const int64_t bytes = file.num_tokens * size_of(file.type);
        if (all_bytes <= kWholeBytes || bytes <= kBlocks * kBlockBytes) {
            add(file.tokens, bytes);
            continue;
        }
        for (int64_t i = 0; i < kBlocks; i++)  // the first and the last block among them
            add(file.tokens + (bytes - kBlockBytes) * i / (kBlocks - 1), kBlockBytes);
    }
    return hash;
}

// ---- Rows and ranks -----------------------------------------------------------------------------

void positions_from_ends(const int32_t* doc_ends, int64_t seq_length, int32_t* positions) {
    int64_t begin = 0;
    for (int64_t i = 0; i < seq_length; i++) {
        if (i > 0 && i == doc_ends[i - 1]) begin = i;
        positions[i] = static_cast<int32_t>(i - begin);
    }
}

int64_t global_sample(const BatchShape& shape, int64_t step, int dp_rank, int ep_rank,
                      int64_t row) {
    const int64_t micro = row / shape.micro_batch, sender = int64_t{dp_rank} * shape.ep + ep_rank;
    const int64_t together = shape.micro_batch * shape.dp * shape.ep;  // rows of all ranks' micro
    return step * shape.global_batch + micro * together + sender * shape.micro_batch +
           row % shape.micro_batch;
}

ZigzagBlocks zigzag_blocks(int64_t seq_length, int cp, int cp_rank) {
    if (cp == 1) return {{0, seq_length}, {seq_length, 0}};
    if (seq_length % (2 * cp) != 0)
        bad_input("data.sequence_length",
                  text("does not split into 2 * parallel.cp blocks (got %lld and cp = %d, need a "
                       "multiple of %d)",
                       ll(seq_length), cp, 2 * cp),
                  text("data.sequence_length = %lld",
                       ll((seq_length + 2 * cp - 1) / (2 * cp) * (2 * cp))));
    const int64_t length = seq_length / (2 * cp);
    return {{cp_rank * length, (2 * cp - 1 - cp_rank) * length}, {length, length}};
}

void take_zigzag(const int32_t* row, const ZigzagBlocks& blocks, int32_t* out) {
    for (int i = 0; i < 2; i++) out = std::copy_n(row + blocks.begin[i], blocks.length[i], out);
}

// ---- The bigram model ---------------------------------------------------------------------------

namespace {

// Numbers of things that occurred once and twice, and the absolute discount that follows.
struct Discount {
    int64_t ones = 0, twos = 0;
    void count(int64_t occurrences) {
        ones += occurrences == 1;
        twos += occurrences == 2;
    }
    double value() const {
        if (ones == 0) return 0.5;  // no estimate; something has to be left for what was not seen
        return static_cast<double>(ones) / static_cast<double>(ones + 2 * twos);
    }
};

struct Bigrams {
    explicit Bigrams(int64_t vocab)
        : v(vocab), pairs(vocab * vocab), before(vocab), after(vocab), total(vocab) {}
    void fit();
    double probability(int32_t first, int32_t second) const;

    int64_t v;
    std::vector<uint32_t> pairs;         // [V, V]: times `second` followed `first`
    std::vector<int64_t> before, after;  // distinct neighbours of each token
    std::vector<int64_t> total;          // times each token was followed
    int64_t kinds = 0, seen = 0;         // distinct pairs; tokens that have a `before`
    double discount = 0, low_discount = 0;
};

void Bigrams::fit() {
    Discount pair, low;
    for (int64_t first = 0; first < v; first++)
        for (int64_t second = 0; second < v; second++) {
            const uint32_t n = pairs[first * v + second];
            if (n == 0) continue;
            pair.count(n);
            total[first] += n;
            after[first]++;
            before[second]++;
            kinds++;
        }
    for (const int64_t n : before) {
        low.count(n);
        seen += n > 0;
    }
    discount = pair.value();
    low_discount = low.value();
}

double Bigrams::probability(int32_t first, int32_t second) const {
    double low = 1.0 / static_cast<double>(v);
    if (kinds > 0) {
        const double share = low_discount * static_cast<double>(seen) * low;
        const double kept = std::max(static_cast<double>(before[second]) - low_discount, 0.0);
        low = (kept + share) / static_cast<double>(kinds);
    }
    if (total[first] == 0) return low;
    const double kept = std::max(pairs[first * v + second] - discount, 0.0);
    return (kept + discount * static_cast<double>(after[first]) * low) /
           static_cast<double>(total[first]);
}

}  // namespace

double bigram_nats(const Dataset& data) {
    const int64_t v = data.options().vocab_size, length = data.options().seq_length;
    if (v > kBigramMaxVocab)
        bad_input("bigram model",
                  text("the vocabulary is too large (got %lld, need at most %lld)", ll(v),
                       ll(kBigramMaxVocab)),
                  "compare with another run instead");
    data.require_heldout();
    std::vector<int32_t> tokens(length), labels(length);
    const SampleRow row{tokens.data(), labels.data(), nullptr};
    const auto each_pair = [&](const TokenStream& stream, const auto& use) {
        for (int64_t begin = 0; begin + 1 < stream.num_tokens; begin += length) {
            data.cut(stream, begin, row);
            for (int64_t i = 0; i < length; i++)
                if (labels[i] != kIgnoreLabel) use(tokens[i], labels[i]);
        }
    };
    Bigrams model(v);
    for (const TokenStream& stream : data.train_)
        each_pair(stream, [&](int32_t a, int32_t b) { model.pairs[a * v + b]++; });
    model.fit();
    double nats = 0;
    int64_t count = 0;
    each_pair(data.heldout_, [&](int32_t a, int32_t b) {
        nats -= std::log(model.probability(a, b));
        count++;
    });
    if (count == 0)
        bad_input("data.heldout_fraction", "the held-out documents have no label (got 0)",
                  "documents of two tokens or more");
    return nats / static_cast<double>(count);
}

}  // namespace pith
