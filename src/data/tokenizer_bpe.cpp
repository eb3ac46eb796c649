#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <queue>

#include "data/tokenizer_parts.h"

namespace pith {

// ---- ids by string ----

static uint32_t hash_of(string_view key) { return uint32_t(XXH3_64bits(key.data(), key.size())); }

StringIds::StringIds(size_t most) : slots_(std::bit_ceil(2 * most + 1)), keys_(slots_.size()) {}

size_t StringIds::slot_of(string_view key, uint32_t hash) const {
  size_t at = hash & (slots_.size() - 1);
  while (slots_[at].id != kNoId && (slots_[at].hash != hash || keys_[at] != key))
    at = (at + 1) & (slots_.size() - 1);
  return at;
}

void StringIds::set(string_view key, uint32_t id) {
  const size_t at = slot_of(key, hash_of(key));
  size_ += slots_[at].id == kNoId;
  slots_[at] = {hash_of(key), id};
  keys_[at] = key;
}

uint32_t StringIds::find(string_view key) const { return slots_[slot_of(key, hash_of(key))].id; }

// ---- merges ----

// A merge is packed into 64 bits, so that a look-up mostly touches one cache line.
static constexpr uint64_t kNoPair = UINT64_MAX;
static uint64_t pair_key(uint32_t left, uint32_t right) {
  return uint64_t{left} << kIdBits | right;
}
static size_t pair_slot(uint64_t key, size_t slots) {
  return (key * 0x9e3779b97f4a7c15 >> 32) & (slots - 1);
}

Bpe::Bpe(const vector<Merge>& merges, const vector<string_view>& bytes, bool ignore_merges)
    : pairs_(std::bit_ceil(2 * merges.size() + 1), kNoPair), whole_(bytes.size()) {
  for (const Merge& merge : merges) {
    const uint64_t key = pair_key(merge.left, merge.right);
    size_t at = pair_slot(key, pairs_.size());
    while (pairs_[at] != kNoPair && pairs_[at] >> kRankBits != key)
      at = (at + 1) & (pairs_.size() - 1);
    pairs_[at] = key << kRankBits | joined_.size();  // of equal pairs the last one counts
    joined_.push_back(merge.joined);
  }
  byte_ids_.fill(kNoId);
  for (uint32_t id = 0; id < bytes.size(); id++)
    if (bytes[id].size() == 1) byte_ids_[uint8_t(bytes[id][0])] = id;
  EncodeScratch scratch(0);
  for (uint32_t id = 0; id < bytes.size(); id++) {
    if (bytes[id].empty()) continue;
    if (!ignore_merges) encode_word(bytes[id], scratch);
    if (ignore_merges || scratch.ids_ == vector<uint32_t>{id}) whole_.set(bytes[id], id);
  }
}

uint32_t Bpe::rank_of(uint32_t left, uint32_t right) const {
  const uint64_t key = pair_key(left, right);
  for (size_t at = pair_slot(key, pairs_.size());; at = (at + 1) & (pairs_.size() - 1)) {
    const uint64_t pair = pairs_[at];
    if (pair >> kRankBits == key) return uint32_t(pair & ((1u << kRankBits) - 1));
    if (pair == kNoPair) return kNoId;
  }
}

// Merges the pair of the lowest rank, of equal ones the leftmost, until none is left.
void Bpe::merge_short(vector<uint32_t>& ids, vector<uint32_t>& ranks) const {
  size_t size = ids.size();
  ranks.resize(size);
  for (size_t i = 0; i + 1 < size; i++) ranks[i] = rank_of(ids[i], ids[i + 1]);
  while (size > 1) {
    size_t best = 0;
    for (size_t i = 1; i < size - 1; i++) best = ranks[i] < ranks[best] ? i : best;
    if (ranks[best] == kNoId) break;
    ids[best] = joined_[ranks[best]];
    size--;
    for (size_t i = best + 1; i < size; i++) {
      ids[i] = ids[i + 1];
      ranks[i - 1] = ranks[i];
    }
    if (best + 1 < size) ranks[best] = rank_of(ids[best], ids[best + 1]);
    if (best > 0) ranks[best - 1] = rank_of(ids[best - 1], ids[best]);
  }
  ids.resize(size);
}

// The same with a heap and links, in O(n log n).
void Bpe::merge_long(vector<uint32_t>& ids) const {
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
    look_up(i);
  }
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
  ids.resize(count);
}

// The ids of a word, into scratch.ids_.
void Bpe::encode_word(string_view word, EncodeScratch& scratch) const {
  constexpr size_t kLong = 96;
  scratch.ids_.clear();
  if (const uint32_t id = whole_.find(word); id != kNoId) return scratch.ids_.push_back(id);
  for (const char c : word)  // a byte without a token is dropped
    if (const uint32_t id = byte_ids_[uint8_t(c)]; id != kNoId) scratch.ids_.push_back(id);
  if (scratch.ids_.size() > kLong)
    merge_long(scratch.ids_);
  else
    merge_short(scratch.ids_, scratch.ranks_);
}

// ---- words through the cache ----

static constexpr size_t kFirstEntries = 4096;

EncodeScratch::EncodeScratch(size_t cache_bytes)
    : most_entries_(std::bit_floor(std::max(cache_bytes / sizeof(Entry), size_t{2}))) {}

void EncodeScratch::use(uint64_t tokenizer) {
  if (!cache_.empty() && owner_ == tokenizer) return;
  owner_ = tokenizer;
  cache_.assign(std::min(most_entries_, kFirstEntries), Entry{});
  used_ = 0;
}

// A word has two places, of which the newer one takes the second where the first is taken.
EncodeScratch::Entry& EncodeScratch::place_of(const Entry& key) {
  const auto mixed = static_cast<unsigned __int128>(key.word[0] ^ key.word[2] * 0x9fb21c651e98df25 ^ 0x9e3779b97f4a7c15) *
                     (key.word[1] ^ key.word[3] * 0xe7037ed1a0b428db ^ 0xd6e8feb86659fd93);
  return cache_[(uint64_t(mixed) ^ uint64_t(mixed >> 64)) & (cache_.size() - 1)];
}

static bool same_word(const uint64_t* a, const uint64_t* b) {
  return ((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3])) == 0;
}

void EncodeScratch::insert(const Entry& entry) {
  if (++used_ > cache_.size() / 2 && cache_.size() < most_entries_) {
    vector<Entry> old(2 * cache_.size());
    old.swap(cache_);
    used_ = 0;
    for (const Entry& each : old)
      if (each.word[3]) insert(each);
  }
  Entry* place = &place_of(entry);
  if (place->word[3]) place = &cache_[size_t(place - cache_.data()) ^ 1];
  *place = entry;
}

// The key of a word of less than 32 bytes; up to `end` may be read.
static void set_word(uint64_t (&key)[4], string_view word, const char* end) {
  static constexpr auto kMask = [] {
    std::array<uint8_t, 64> mask{};
    std::fill_n(mask.begin(), 32, 0xff);
    return mask;
  }();
  if (end - word.data() >= 32) {
    uint64_t mask[4];
    memcpy(mask, &kMask[32 - word.size()], 32);
    memcpy(key, word.data(), 32);
    for (int i = 0; i < 4; i++) key[i] &= mask[i];
  } else {
    memset(key, 0, 32);
    memcpy(key, word.data(), word.size());
  }
  key[3] |= uint64_t{word.size()} << 56;
}

void Bpe::encode(const vector<string_view>& words, EncodeScratch& scratch,
                 vector<uint32_t>& out) const {
  using Entry = EncodeScratch::Entry;
  constexpr size_t kBatch = 64;
  Entry keys[kBatch];
  size_t slots[kBatch];
  if (words.empty()) return;
  const char* end = words.back().data() + words.back().size();
  for (size_t done = 0; done < words.size(); done += kBatch) {
    const size_t batch = std::min(words.size() - done, kBatch);
    for (size_t i = 0; i < batch; i++) {
      const string_view word = words[done + i];
      if (word.size() >= sizeof keys[i].word) continue;
      set_word(keys[i].word, word, end);
      slots[i] = &scratch.place_of(keys[i]) - scratch.cache_.data();
      __builtin_prefetch(&scratch.cache_[slots[i]]);
    }
    const size_t size = scratch.cache_.size();
    for (size_t i = 0; i < batch; i++) {
      const string_view word = words[done + i];
      const bool is_short = word.size() < sizeof keys[i].word;
      if (is_short) {
        if (scratch.cache_.size() != size) slots[i] = &scratch.place_of(keys[i]) - scratch.cache_.data();
        const Entry* entry = &scratch.cache_[slots[i]];
        if (!same_word(entry->word, keys[i].word)) entry = &scratch.cache_[slots[i] ^ 1];
        if (same_word(entry->word, keys[i].word)) {
          out.insert(out.end(), entry->ids, entry->ids + entry->count);
          continue;
        }
      }
      encode_word(word, scratch);
      const vector<uint32_t>& ids = scratch.ids_;
      out.insert(out.end(), ids.begin(), ids.end());
      if (!is_short || ids.size() > std::size(keys[i].ids)) continue;
      std::copy(ids.begin(), ids.end(), keys[i].ids);
      keys[i].count = ids.size();
      scratch.insert(keys[i]);
    }
  }
}

}  // namespace pith
