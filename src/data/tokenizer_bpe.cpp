#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <queue>

#include "data/tokenizer.h"

namespace pith {

static constexpr u64 kNoPair = UINT64_MAX;

size_t Bpe::slot_of(u32 left, u32 right) const {
  u64 key = u64{left} << kIdBits | right;
  size_t at = key * 0x9e3779b97f4a7c15 >> 32 & (pairs_.size() - 1);
  while (pairs_[at] != kNoPair && pairs_[at] >> kRankBits != key)
    at = (at + 1) & (pairs_.size() - 1);
  return at;
}

u32 Bpe::rank_of(u32 left, u32 right) const {
  u64 pair = pairs_[slot_of(left, right)];
  return pair == kNoPair ? kNoId : u32(pair & ((1u << kRankBits) - 1));
}

Bpe::Bpe(const vector<Merge>& merges, const vector<string_view>& bytes, bool ignore_merges)
    : pairs_(std::bit_ceil(2 * merges.size() + 1), kNoPair) {
  for (const auto& [left, right, joined] : merges) {  // of equal pairs the last one counts
    u64 key = u64{left} << kIdBits | right;
    pairs_[slot_of(left, right)] = key << kRankBits | joined_.size();
    joined_.push_back(joined);
  }
  byte_ids_.fill(kNoId);
  for (u32 id = 0; id < bytes.size(); id++) {
    if (bytes[id].size() == 1) byte_ids_[u8(bytes[id][0])] = id;
    if (ignore_merges) whole_.emplace(bytes[id], id);
  }
  for (u32 pair = 0; pair < byte_pairs_.size(); pair++)
    byte_pairs_[pair] = rank_of(byte_ids_[pair >> 8], byte_ids_[pair & 255]);
}

// The lowest rank first, of equal ones the leftmost. ranks: of each id and the next one. Equal ones
// are merged in one pass, unless that makes a lower rank.
void Bpe::merge(vector<u32>& ids, vector<u32>& ranks) const {
  if (ids.size() > 96) return merge_long(ids, ranks);
  while (!ids.empty()) {
    u32 lowest = *std::min_element(ranks.begin(), ranks.end());
    if (lowest == kNoId) break;
    bool merges = true;
    size_t size = 0;
    for (size_t i = 0; i < ids.size(); i++, size++) {
      bool joins = merges && ranks[i] == lowest;
      ids[size] = joins ? joined_[lowest] : ids[i];
      ranks[size] = ranks[i];
      if (!joins) continue;
      i++;
      ranks[size] = i + 1 < ids.size() ? rank_of(ids[size], ids[i + 1]) : kNoId;
      if (size > 0) ranks[size - 1] = rank_of(ids[size - 1], ids[size]);
      merges = ranks[size] > lowest && (size == 0 || ranks[size - 1] > lowest);
    }
    ids.resize(size);
    ranks.resize(size);
  }
}

// The same with links and a heap, in O(n log n).
void Bpe::merge_long(vector<u32>& ids, vector<u32>& ranks) const {
  u32 size = u32(ids.size());
  vector<u32> before(size), after(size);
  using Candidate = std::pair<u32, u32>;  // rank, position
  std::priority_queue<Candidate, vector<Candidate>, std::greater<>> heap;
  for (u32 i = 0; i < size; i++) {
    before[i] = i - 1;
    after[i] = i + 1;
    if (ranks[i] != kNoId) heap.emplace(ranks[i], i);
  }
  auto look_up = [&](u32 i) {
    ranks[i] = after[i] < size ? rank_of(ids[i], ids[after[i]]) : kNoId;
    if (ranks[i] != kNoId) heap.emplace(ranks[i], i);
  };
  while (!heap.empty()) {
    const auto [rank, i] = heap.top();
    heap.pop();
    if (ranks[i] != rank) continue;  // one of the two has been merged since
    u32 right = after[i];
    ids[i] = joined_[rank];
    after[i] = after[right];
    if (after[i] < size) before[after[i]] = i;
    ranks[right] = kNoId;
    look_up(i);
    if (i > 0) look_up(before[i]);
  }
  size_t count = 0;
  for (u32 i = 0; i < size; i = after[i]) ids[count++] = ids[i];
  ids.resize(count);
}

void Bpe::encode_word(string_view word, EncodeScratch& scratch) const {
  vector<u32>& ids = scratch.ids_;
  ids.clear();
  if (auto known = whole_.find(word); known != whole_.end()) return ids.push_back(known->second);
  scratch.ranks_.clear();
  u8 before = 0;
  for (const char c : word) {
    u8 byte = u8(c);
    if (byte_ids_[byte] == kNoId) continue;  // a byte without a token is dropped
    if (!ids.empty()) scratch.ranks_.push_back(byte_pairs_[before << 8 | byte]);
    ids.push_back(byte_ids_[byte]);
    before = byte;
  }
  scratch.ranks_.push_back(kNoId);
  merge(ids, scratch.ranks_);
}

EncodeScratch::EncodeScratch(size_t cache_bytes)
    : entries_(std::bit_floor(max(cache_bytes / sizeof(Entry), size_t{2}))) {}

void EncodeScratch::use(u64 tokenizer) {
  if (!cache_.empty() && owner_ == tokenizer) return;
  cache_.assign(entries_, {});
  owner_ = tokenizer;
}

void Bpe::encode(const vector<string_view>& words, EncodeScratch& scratch, vector<u32>& out) const {
  using Entry = EncodeScratch::Entry;
  constexpr size_t kBatch = 64, kIds = std::size(Entry{}.ids);
  Entry keys[kBatch], *slots[kBatch];
  size_t last_slot = scratch.cache_.size() - 1;
  const auto is_short = [](string_view word) { return word.size() < sizeof Entry::key; };
  size_t used = out.size();
  for (size_t done = 0; done < words.size(); done += kBatch) {
    size_t batch = min(words.size() - done, kBatch);
    for (size_t i = 0; i < batch; i++) {
      string_view word = words[done + i];
      if (!is_short(word)) continue;
      memset(keys[i].key, 0, sizeof Entry::key);
      memcpy(keys[i].key, word.data(), word.size());
      reinterpret_cast<u8*>(keys[i].key)[sizeof Entry::key - 1] = u8(word.size());
    }
    for (size_t i = 0; i < batch; i++) {  // read at once, a key just written in parts would stall
      if (!is_short(words[done + i])) continue;
      slots[i] = &scratch.cache_[XXH3_64bits(keys[i].key, sizeof Entry::key) & last_slot & ~1];
      __builtin_prefetch(slots[i]);
    }
    out.resize(used + batch * kIds);
    for (size_t i = 0; i < batch; i++) {
      string_view word = words[done + i];
      if (is_short(word)) {
        auto holds = [&](const Entry& e) { return !memcmp(e.key, keys[i].key, sizeof e.key); };
        if (!holds(slots[i][0]) && holds(slots[i][1])) std::swap(slots[i][0], slots[i][1]);
        if (holds(slots[i][0])) {
          memcpy(&out[used], slots[i]->ids, sizeof Entry::ids);
          used += slots[i]->count;
          continue;
        }
      }
      encode_word(word, scratch);
      const vector<u32>& ids = scratch.ids_;
      if (ids.size() > kIds) out.resize(out.size() + ids.size());
      std::copy(ids.begin(), ids.end(), out.begin() + used);
      used += ids.size();
      if (!is_short(word) || ids.size() > kIds) continue;
      keys[i].count = u32(ids.size());
      std::copy(ids.begin(), ids.end(), keys[i].ids);
      slots[i][1] = std::exchange(slots[i][0], keys[i]);
    }
  }
  out.resize(used);
}

}
