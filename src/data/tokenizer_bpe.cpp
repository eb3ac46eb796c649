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
}

// The lowest rank first, of equal ones the leftmost.
void Bpe::merge(string_view word, EncodeScratch& scratch, vector<u32>& out) const {
  if (auto known = whole_.find(word); known != whole_.end()) return out.push_back(known->second);
  vector<EncodeScratch::Part>& parts = scratch.parts;
  parts.clear();
  for (const char c : word)
    if (u32 id = byte_ids_[u8(c)]; id != kNoId)  // a byte without a token is dropped
      parts.push_back({id, kNoId, u32(parts.size()) - 1, u32(parts.size()) + 1});
  using Candidate = std::pair<u32, u32>;  // rank, part
  std::priority_queue<Candidate, vector<Candidate>, std::greater<>> heap;
  auto look_up = [&](u32 i) {
    u32 after = parts[i].after;
    parts[i].rank = after < parts.size() ? rank_of(parts[i].id, parts[after].id) : kNoId;
    if (parts[i].rank != kNoId) heap.emplace(parts[i].rank, i);
  };
  for (u32 i = 0; i < parts.size(); i++) look_up(i);
  while (!heap.empty()) {
    const auto [rank, i] = heap.top();
    heap.pop();
    if (parts[i].rank != rank) continue;  // one of the two has been merged since
    auto &left = parts[i], &right = parts[left.after];
    left.id = joined_[rank];
    left.after = right.after;
    if (right.after < parts.size()) parts[right.after].before = i;
    right.rank = kNoId;
    look_up(i);
    if (i > 0) look_up(left.before);
  }
  for (u32 i = 0; i < parts.size(); i = parts[i].after) out.push_back(parts[i].id);
}

EncodeScratch::EncodeScratch(size_t cache_bytes)
    : cache(std::bit_floor(max(cache_bytes / sizeof(Entry), size_t{2}))) {}

void Bpe::encode(
    std::span<const string_view> words, EncodeScratch& scratch, vector<u32>& out) const {
  using Entry = EncodeScratch::Entry;
  constexpr size_t kBatch = 64, kIds = std::size(Entry{}.ids), kKey = sizeof Entry::key;
  Entry entries[kBatch], *slots[kBatch];
  while (!words.empty()) {
    const auto batch = words.first(min(words.size(), kBatch));
    words = words.subspan(batch.size());
    for (size_t i = 0; i < batch.size(); i++) {  // of a long word a key that is never kept
      memset(entries[i].key, 0, kKey);
      memcpy(entries[i].key, batch[i].data(), min(batch[i].size(), kKey));
      entries[i].key[kKey - 1] = char(min(batch[i].size(), kKey));
    }
    for (size_t i = 0; i < batch.size(); i++) {  // read at once, a key just written would stall
      slots[i] = &scratch.cache[XXH3_64bits(entries[i].key, kKey) & (scratch.cache.size() - 2)];
      __builtin_prefetch(slots[i]);
    }
    for (size_t i = 0; i < batch.size(); i++) {
      Entry *slot = slots[i], &entry = entries[i];
      const auto holds = [&](const Entry& e) { return !memcmp(e.key, entry.key, kKey); };
      if (!holds(slot[0]) && holds(slot[1])) std::swap(slot[0], slot[1]);
      size_t before = out.size();
      if (holds(slot[0])) {
        out.resize(before + kIds);
        memcpy(&out[before], slot->ids, sizeof slot->ids);
        out.resize(before + slot->count);
        continue;
      }
      merge(batch[i], scratch, out);
      size_t count = out.size() - before;
      if (batch[i].size() >= kKey || count > kIds) continue;
      entry.count = u32(count);
      std::copy_n(&out[before], count, entry.ids);
      slot[1] = std::exchange(slot[0], entry);
    }
  }
}

}
