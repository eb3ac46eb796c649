#define XXH_INLINE_ALL
#include <emmintrin.h>
#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <queue>

#include "core/check.h"
#include "data/tokenizer_parts.h"

namespace pith {

static uint64_t mix(uint64_t a, uint64_t b) {
  const auto product =
      static_cast<unsigned __int128>(a ^ 0x9e3779b97f4a7c15) * (b ^ 0xd6e8feb86659fd93);
  return uint64_t(product) ^ uint64_t(product >> 64);
}

static size_t power_of_two_above(size_t count) {
  size_t size = 16;
  while (size < count) size *= 2;
  return size;
}

// ---- ids by string ----

static uint32_t hash_string(string_view key) {
  return uint32_t(XXH3_64bits(key.data(), key.size()));
}

void StringIds::reserve(size_t count) {
  vector<Slot> slots(power_of_two_above(2 * count));
  vector<string_view> keys(slots.size());
  slots.swap(slots_);
  keys.swap(keys_);
  used_ = 0;
  for (size_t i = 0; i < slots.size(); i++)
    if (slots[i].id != kNoId) set(keys[i], slots[i].id);
}

void StringIds::set(string_view key, uint32_t id) {
  if (2 * (used_ + 1) > slots_.size()) reserve(2 * (used_ + 1));
  const uint32_t hash = hash_string(key);
  size_t at = hash & (slots_.size() - 1);
  for (; slots_[at].id != kNoId; at = (at + 1) & (slots_.size() - 1))
    if (slots_[at].hash == hash && keys_[at] == key) break;
  used_ += slots_[at].id == kNoId;
  slots_[at] = {hash, id};
  keys_[at] = key;
}

uint32_t StringIds::find(string_view key) const {
  if (slots_.empty()) return kNoId;
  const uint32_t hash = hash_string(key);
  for (size_t at = hash & (slots_.size() - 1); slots_[at].id != kNoId;
       at = (at + 1) & (slots_.size() - 1))
    if (slots_[at].hash == hash && keys_[at] == key) return slots_[at].id;
  return kNoId;
}

// ---- merges ----

// A merge is packed into 64 bits, so that a look-up mostly touches one cache line.
static constexpr uint64_t kNoPair = UINT64_MAX;
static uint64_t pair_key(uint32_t left, uint32_t right) {
  return uint64_t{left} << kIdBits | right;
}
static size_t pair_slot(uint64_t key, size_t slots) {
  return (key * 0x9e3779b97f4a7c15 >> 32) & (slots - 1);
}

Bpe::Bpe(const vector<Merge>& merges, const StringIds& ids, const vector<string_view>& bytes,
         bool ignore_merges)
    : pairs_(power_of_two_above(2 * merges.size()), kNoPair),
      byte_ranks_(256 * 256),
      ids_(&ids),
      whole_(bytes.size()) {
  joined_.reserve(merges.size());
  for (const Merge& merge : merges) {
    const uint64_t key = pair_key(merge.left, merge.right);
    size_t at = pair_slot(key, pairs_.size());
    while (pairs_[at] != kNoPair && pairs_[at] >> kRankBits != key)
      at = (at + 1) & (pairs_.size() - 1);
    pairs_[at] = key << kRankBits | joined_.size();  // of equal pairs the last one counts
    joined_.push_back(merge.joined);
  }
  for (int byte = 0; byte < 256; byte++) {
    const char character = char(byte);
    byte_ids_[size_t(byte)] = ids.find({&character, 1});
  }
  for (size_t i = 0; i < byte_ranks_.size(); i++) {
    const uint32_t left = byte_ids_[i >> 8], right = byte_ids_[i & 255];
    byte_ranks_[i] = left == kNoId || right == kNoId ? kNoId : rank_of(left, right);
  }
  EncodeScratch::State scratch(0);
  for (uint32_t id = 0; id < bytes.size(); id++)
    whole_[id] = ignore_merges || (merge_word(bytes[id], scratch) == 1 && scratch.ids[0] == id);
}

uint32_t Bpe::rank_of(uint32_t left, uint32_t right) const {
  const uint64_t key = pair_key(left, right);
  for (size_t at = pair_slot(key, pairs_.size());; at = (at + 1) & (pairs_.size() - 1)) {
    const uint64_t pair = pairs_[at];
    if (pair >> kRankBits == key) return uint32_t(pair & ((1u << kRankBits) - 1));
    if (pair == kNoPair) return kNoId;
  }
}

// Merges as byte-pair encoding does: the pair of the lowest rank, of equal ones the leftmost, until
// none is left. The ids are left in scratch.ids; returns their number.
size_t Bpe::merge_word(string_view word, EncodeScratch::State& scratch) const {
  constexpr size_t kLong = 96;
  scratch.ids.resize(word.size());
  scratch.ranks.resize(word.size());
  uint32_t *ids = scratch.ids.data(), *ranks = scratch.ranks.data();
  size_t size = 0, before = 0;
  for (const char c : word) {
    const auto byte = uint8_t(c);
    if (byte_ids_[byte] == kNoId) continue;  // a byte without a token is dropped
    if (size) ranks[size - 1] = byte_ranks_[before << 8 | byte];
    ids[size++] = byte_ids_[byte];
    before = byte;
  }
  if (size > kLong) {
    scratch.ids.resize(size);
    return merge_long(scratch.ids);
  }
  while (size > 1) {
    size_t best = 0;
    uint32_t lowest = ranks[0];
    for (size_t i = 1; i < size - 1; i++) {
      best = ranks[i] < lowest ? i : best;
      lowest = std::min(lowest, ranks[i]);
    }
    if (lowest == kNoId) break;
    ids[best] = joined_[lowest];
    size--;
    for (size_t i = best + 1; i < size; i++) {
      ids[i] = ids[i + 1];
      ranks[i - 1] = ranks[i];
    }
    if (best + 1 < size) ranks[best] = rank_of(ids[best], ids[best + 1]);
    if (best > 0) ranks[best - 1] = rank_of(ids[best - 1], ids[best]);
  }
  return size;
}

// The same for long words, with a heap and links, in O(n log n).
size_t Bpe::merge_long(vector<uint32_t>& ids) const {
  const auto size = uint32_t(ids.size());
  vector<uint32_t> previous(size), next(size), ranks(size, kNoId);
  using Candidate = std::pair<uint32_t, uint32_t>;  // rank, position
  std::priority_queue<Candidate, vector<Candidate>, std::greater<>> heap;
  const auto look_up = [&](uint32_t i) {
    ranks[i] = next[i] < size ? rank_of(ids[i], ids[next[i]]) : kNoId;
    if (ranks[i] != kNoId) heap.emplace(ranks[i], i);
  };
  for (uint32_t i = 0; i < size; i++) {
    previous[i] = i - 1;
    next[i] = i + 1;
  }
  for (uint32_t i = 0; i < size; i++) look_up(i);
  while (!heap.empty()) {
    const auto [rank, i] = heap.top();
    heap.pop();
    if (ranks[i] != rank) continue;  // one of the two has been merged since
    const uint32_t right = next[i];
    ids[i] = joined_[rank];
    next[i] = next[right];
    if (next[i] < size) previous[next[i]] = i;
    ranks[right] = kNoId;
    look_up(i);
    if (i > 0) look_up(previous[i]);
  }
  size_t count = 0;
  for (uint32_t i = 0; i < size; i = next[i]) ids[count++] = ids[i];
  return count;
}

// ---- words through the cache ----

static constexpr size_t kShort = 15;           // bytes of a word that is its own key
static constexpr size_t kLongestCached = 256;  // longer ones hardly come again
static constexpr size_t kFirstEntries = 4096;

void EncodeScratch::State::use(const std::shared_ptr<const int>& tokenizer) {
  if (owner == tokenizer) return;
  owner = tokenizer;
  clear();
}

void EncodeScratch::State::clear() {
  const size_t most = std::max<size_t>(cache_bytes / 2 / sizeof(Entry), 64);
  table.assign(std::min(kFirstEntries, power_of_two_above(most) / 2), Entry{});
  used = 0;
  store.clear();
}

static uint64_t long_high(size_t size) { return uint64_t{0xff} << 56 | size; }

const EncodeScratch::State::Entry* EncodeScratch::State::find(string_view word, uint64_t low,
                                                              uint64_t high, uint64_t hash) const {
  for (size_t at = hash & (table.size() - 1);; at = (at + 1) & (table.size() - 1)) {
    const Entry& entry = table[at];
    if (entry.low == low && entry.high == high &&
        (word.size() <= kShort ||
         !memcmp(&store[entry.ids[0] + entry.count], word.data(), word.size())))
      return &entry;
    if (!entry.high) return nullptr;
  }
}

void EncodeScratch::State::insert(string_view word, uint64_t low, uint64_t high, uint64_t hash,
                                  const uint32_t* word_ids, size_t count) {
  const bool is_long = word.size() > kShort;
  const size_t in_store =
      (is_long || count > 3 ? count : 0) + (is_long ? (word.size() + 3) / 4 : 0);
  if ((store.size() + in_store) * 4 > cache_bytes / 2) clear();
  if (2 * (used + 1) > table.size()) {
    if (4 * table.size() * sizeof(Entry) > cache_bytes) {
      clear();
    } else {
      vector<Entry> old(2 * table.size());
      old.swap(table);
      for (const Entry& entry : old) {
        if (!entry.high) continue;
        const bool hashed = entry.high >> 56 == 0xff;
        size_t at = (hashed ? entry.low : mix(entry.low, entry.high)) & (table.size() - 1);
        while (table[at].high) at = (at + 1) & (table.size() - 1);
        table[at] = entry;
      }
    }
  }
  size_t at = hash & (table.size() - 1);
  while (table[at].high) at = (at + 1) & (table.size() - 1);
  Entry& entry = table[at];
  entry = {low, high, {0, 0, 0}, uint32_t(count)};
  used++;
  if (!in_store) {
    std::copy(word_ids, word_ids + count, entry.ids);
    return;
  }
  entry.ids[0] = uint32_t(store.size());
  store.insert(store.end(), word_ids, word_ids + count);
  store.resize(entry.ids[0] + in_store);
  if (is_long) memcpy(&store[entry.ids[0] + count], word.data(), word.size());
}

// The ids of a word that is not in the cache, into scratch.ids; returns their number.
size_t Bpe::encode_word(string_view word, EncodeScratch::State& scratch) const {
  const uint32_t id = ids_->find(word);
  if (id == kNoId || !whole_[id]) return merge_word(word, scratch);
  scratch.ids.assign(1, id);
  return 1;
}

// The key of a short word; `readable` is the end of what may be read.
static __m128i short_key(string_view word, const char* readable) {
  static constexpr char kMask[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  __m128i bytes = _mm_setzero_si128();
  if (readable - word.data() >= 16) {
    const char* mask = kMask + kShort - word.size();
    bytes = _mm_and_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(word.data())),
                          _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask)));
  } else {
    memcpy(&bytes, word.data(), word.size());
  }
  return bytes;
}

void Bpe::encode(const string_view* words, size_t count, EncodeScratch::State& scratch,
                 vector<uint32_t>& out) const {
  constexpr size_t kBatch = 64;
  struct {
    uint64_t low, high, hash;
  } keys[kBatch];
  uint32_t ids[3 * kBatch + 3];
  for (; count > 0; words += kBatch, count -= std::min(count, kBatch)) {
    const size_t batch = std::min(count, kBatch);
    const char* readable = words[batch - 1].data() + words[batch - 1].size();
    for (size_t i = 0; i < batch; i++) {
      const string_view word = words[i];
      auto& key = keys[i];
      if (word.size() <= kShort) {
        const __m128i bytes = short_key(word, readable);
        memcpy(&key.low, &bytes, 16);
        key.high |= uint64_t{word.size()} << 56;
        key.hash = mix(key.low, key.high);
      } else if (word.size() <= kLongestCached) {
        key.low = key.hash = XXH3_64bits(word.data(), word.size());
        key.high = long_high(word.size());
      } else {
        key.high = 0;
        continue;
      }
      __builtin_prefetch(&scratch.table[key.hash & (scratch.table.size() - 1)]);
    }
    size_t filled = 0;
    for (size_t i = 0; i < batch; i++) {
      const auto& key = keys[i];
      const EncodeScratch::State::Entry* entry =
          key.high ? scratch.find(words[i], key.low, key.high, key.hash) : nullptr;
      if (entry && entry->count <= 3 && words[i].size() <= kShort) {
        memcpy(ids + filled, entry->ids, sizeof entry->ids);
        filled += entry->count;
        continue;
      }
      out.insert(out.end(), ids, ids + filled);
      filled = 0;
      const uint32_t* found = entry ? &scratch.store[entry->ids[0]] : nullptr;
      size_t size = entry ? entry->count : encode_word(words[i], scratch);
      if (!entry) found = scratch.ids.data();
      out.insert(out.end(), found, found + size);
      if (!entry && key.high) scratch.insert(words[i], key.low, key.high, key.hash, found, size);
    }
    out.insert(out.end(), ids, ids + filled);
  }
}

// ---- the public scratch ----

EncodeScratch::EncodeScratch(size_t cache_bytes) : state_(std::make_unique<State>(cache_bytes)) {}
EncodeScratch::EncodeScratch(EncodeScratch&&) noexcept = default;
EncodeScratch& EncodeScratch::operator=(EncodeScratch&& o) noexcept {
  state_.swap(o.state_);
  return *this;
}
EncodeScratch::~EncodeScratch() = default;

}  // namespace pith
