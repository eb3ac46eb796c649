#define XXH_INLINE_ALL
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
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

static size_t power_of_two_above(size_t count) {
    size_t size = 16;
    while (size < count) size *= 2;
    return size;
}

// ---- ids by string ----

void StringIds::reserve(size_t count) { slots_.resize(power_of_two_above(2 * count)); }

static uint32_t hash_string(std::string_view key) {
    return static_cast<uint32_t>(XXH3_64bits(key.data(), key.size()));
}

void StringIds::set(std::string_view key, uint32_t id) {
    if (2 * (used_ + 1) > slots_.size()) {
        std::vector<Slot> old;
        old.swap(slots_);
        slots_.resize(power_of_two_above(2 * old.size()));
        used_ = 0;
        for (const Slot& slot : old)
            if (slot.id != kNoId) set(slot.key, slot.id);
    }
    const uint32_t hash = hash_string(key);
    size_t at = hash & (slots_.size() - 1);
    for (; slots_[at].id != kNoId; at = (at + 1) & (slots_.size() - 1))
        if (slots_[at].hash == hash && slots_[at].key == key) break;
    used_ += slots_[at].id == kNoId;
    slots_[at] = {key, hash, id};
}

uint32_t StringIds::find(std::string_view key) const {
    if (slots_.empty()) return kNoId;
    const uint32_t hash = hash_string(key);
    for (size_t at = hash & (slots_.size() - 1); slots_[at].id != kNoId;
         at = (at + 1) & (slots_.size() - 1))
        if (slots_[at].hash == hash && slots_[at].key == key) return slots_[at].id;
    return kNoId;
}

// ---- merges ----

static uint64_t pair_key(uint32_t left, uint32_t right) { return uint64_t{left} << 32 | right; }

Bpe::Bpe(const std::vector<Merge>& merges, const StringIds& ids,
         const std::vector<std::string_view>& bytes, bool ignore_merges)
    : pairs_(power_of_two_above(2 * merges.size())), ids_(&ids), whole_(bytes.size()) {
    for (uint32_t rank = 0; rank < merges.size(); rank++) {
        const Merge& merge = merges[rank];
        const uint64_t key = pair_key(merge.left, merge.right);
        size_t at = mix(key, 0) & (pairs_.size() - 1);
        while (pairs_[at].key != UINT64_MAX && pairs_[at].key != key)
            at = (at + 1) & (pairs_.size() - 1);
        pairs_[at] = {key, rank, merge.joined};  // of equal pairs the last one counts
    }
    for (int byte = 0; byte < 256; byte++) {
        const char text = static_cast<char>(byte);
        byte_ids_[static_cast<size_t>(byte)] = ids.find({&text, 1});
    }
    EncodeScratch::State scratch(0);
    for (uint32_t id = 0; id < bytes.size(); id++)
        whole_[id] = ignore_merges || (merge_word(bytes[id], scratch) == 1 && scratch.ids[0] == id);
}

Bpe::Pair Bpe::find_pair(uint32_t left, uint32_t right) const {
    const uint64_t key = pair_key(left, right);
    for (size_t at = mix(key, 0) & (pairs_.size() - 1);; at = (at + 1) & (pairs_.size() - 1))
        if (pairs_[at].key == key || pairs_[at].key == UINT64_MAX) return pairs_[at];
}

// Merges as byte-pair encoding does: the pair of the lowest rank, of equal ones the leftmost, until
// none is left. The ids are left in scratch.ids; returns their number.
size_t Bpe::merge_word(std::string_view word, EncodeScratch::State& scratch) const {
    constexpr size_t kLong = 96;
    scratch.ids.clear();
    for (const char c : word) {
        const uint32_t id = byte_ids_[static_cast<uint8_t>(c)];
        if (id != kNoId) scratch.ids.push_back(id);  // a byte without a token is dropped
    }
    size_t size = scratch.ids.size();
    if (size > kLong) return merge_long(scratch.ids);
    scratch.joined.resize(kLong);
    scratch.ranks.resize(kLong);
    uint32_t *ids = scratch.ids.data(), *joined = scratch.joined.data();
    uint32_t* ranks = scratch.ranks.data();
    const auto look_up = [&](size_t i) {
        const Pair pair = find_pair(ids[i], ids[i + 1]);
        ranks[i] = pair.rank;
        joined[i] = pair.joined;
    };
    for (size_t i = 0; i + 1 < size; i++) look_up(i);
    while (size > 1) {
        const size_t best = static_cast<size_t>(std::min_element(ranks, ranks + size - 1) - ranks);
        if (ranks[best] == kNoId) break;
        ids[best] = joined[best];
        size--;
        std::copy(ids + best + 2, ids + size + 1, ids + best + 1);
        if (best + 1 < size) {
            std::copy(ranks + best + 2, ranks + size, ranks + best + 1);
            std::copy(joined + best + 2, joined + size, joined + best + 1);
            look_up(best);
        }
        if (best > 0) look_up(best - 1);
    }
    return size;
}

// The same for long words, with a heap and links, in O(n log n).
size_t Bpe::merge_long(std::vector<uint32_t>& ids) const {
    const auto size = static_cast<uint32_t>(ids.size());
    std::vector<uint32_t> previous(size), next(size);
    std::vector<Pair> pairs(size);
    using Candidate = std::pair<uint32_t, uint32_t>;  // rank, position
    std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> heap;
    const auto look_up = [&](uint32_t i) {
        pairs[i] = next[i] < size ? find_pair(ids[i], ids[next[i]]) : Pair{};
        if (pairs[i].rank != kNoId) heap.emplace(pairs[i].rank, i);
    };
    for (uint32_t i = 0; i < size; i++) {
        previous[i] = i - 1;
        next[i] = i + 1;
    }
    for (uint32_t i = 0; i < size; i++) look_up(i);
    while (!heap.empty()) {
        const auto [rank, i] = heap.top();
        heap.pop();
        if (pairs[i].rank != rank) continue;  // one of the two has been merged since
        const uint32_t right = next[i];
        ids[i] = pairs[i].joined;
        next[i] = next[right];
        if (next[i] < size) previous[next[i]] = i;
        pairs[right] = Pair{};
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

const EncodeScratch::State::Entry* EncodeScratch::State::find_long(std::string_view word,
                                                                   uint64_t hash) const {
    const uint64_t high = long_high(word.size());
    for (size_t at = hash & (table.size() - 1); table[at].high; at = (at + 1) & (table.size() - 1))
        if (table[at].low == hash && table[at].high == high &&
            !memcmp(&store[table[at].ids[0] + table[at].count], word.data(), word.size()))
            return &table[at];
    return nullptr;
}

void EncodeScratch::State::insert(std::string_view word, uint64_t low, uint64_t high, uint64_t hash,
                                  const uint32_t* word_ids, size_t count) {
    const bool is_long = word.size() > kShort;
    const size_t in_store =
        (is_long || count > 3 ? count : 0) + (is_long ? (word.size() + 3) / 4 : 0);
    if ((store.size() + in_store) * 4 > cache_bytes / 2) clear();
    if (2 * (used + 1) > table.size()) {
        if (4 * table.size() * sizeof(Entry) > cache_bytes) {
            clear();
        } else {
            std::vector<Entry> old(2 * table.size());
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
    entry = {low, high, {0, 0, 0}, static_cast<uint32_t>(count)};
    used++;
    if (!in_store) {
        std::copy(word_ids, word_ids + count, entry.ids);
        return;
    }
    entry.ids[0] = static_cast<uint32_t>(store.size());
    store.insert(store.end(), word_ids, word_ids + count);
    store.resize(entry.ids[0] + in_store);
    if (is_long) memcpy(&store[entry.ids[0] + count], word.data(), word.size());
}

// The ids of a word that is not in the cache, into scratch.ids; returns their number.
size_t Bpe::encode_word(std::string_view word, EncodeScratch::State& scratch) const {
    const uint32_t id = ids_->find(word);
    if (id == kNoId || !whole_[id]) return merge_word(word, scratch);
    scratch.ids.assign(1, id);
    return 1;
}

void Bpe::encode(const std::string_view* words, size_t count, EncodeScratch::State& scratch,
                 std::vector<uint32_t>& out) const {
    for (size_t i = 0; i < count; i++) {
        const std::string_view word = words[i];
        uint64_t key[2] = {0, 0}, hash = 0;
        const EncodeScratch::State::Entry* entry = nullptr;
        if (word.size() <= kShort) {
            memcpy(key, word.data(), word.size());
            key[1] |= uint64_t{word.size()} << 56;
            hash = mix(key[0], key[1]);
            const size_t mask = scratch.table.size() - 1;
            for (size_t at = hash & mask; scratch.table[at].high; at = (at + 1) & mask)
                if (scratch.table[at].low == key[0] && scratch.table[at].high == key[1]) {
                    entry = &scratch.table[at];
                    break;
                }
        } else if (word.size() <= kLongestCached) {
            key[0] = hash = XXH3_64bits(word.data(), word.size());
            key[1] = long_high(word.size());
            entry = scratch.find_long(word, hash);
        }
        if (entry) {
            const uint32_t* ids = word.size() > kShort || entry->count > 3
                                      ? &scratch.store[entry->ids[0]]
                                      : entry->ids;
            out.insert(out.end(), ids, ids + entry->count);
            continue;
        }
        const size_t size = encode_word(word, scratch);
        out.insert(out.end(), scratch.ids.begin(),
                   scratch.ids.begin() + static_cast<int64_t>(size));
        if (word.size() <= kLongestCached)
            scratch.insert(word, key[0], key[1], hash, scratch.ids.data(), size);
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
