#include <emmintrin.h>
#include <utf8proc.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "data/tokenizer_parts.h"

namespace pith {

// Code points of Unicode 15.0, 15.1 and 16.0 that older libraries do not know.
static constexpr CategoryRange kNewer[] = {
    {0x897, 0x897, "Mn"},     {0xcf3, 0xcf3, "Mc"},     {0xece, 0xece, "Mn"},
    {0x1b4e, 0x1b4f, "Po"},   {0x1b7f, 0x1b7f, "Po"},   {0x1c89, 0x1c89, "Lu"},
    {0x1c8a, 0x1c8a, "Ll"},   {0x2427, 0x2429, "So"},   {0x2ffc, 0x2fff, "So"},
    {0x31e4, 0x31e5, "So"},   {0x31ef, 0x31ef, "So"},   {0xa7cb, 0xa7cc, "Lu"},
    {0xa7cd, 0xa7cd, "Ll"},   {0xa7da, 0xa7da, "Lu"},   {0xa7db, 0xa7db, "Ll"},
    {0xa7dc, 0xa7dc, "Lu"},   {0x105c0, 0x105f3, "Lo"}, {0x10d40, 0x10d49, "Nd"},
    {0x10d4a, 0x10d4d, "Lo"}, {0x10d4e, 0x10d4e, "Lm"}, {0x10d4f, 0x10d4f, "Lo"},
    {0x10d50, 0x10d65, "Lu"}, {0x10d69, 0x10d6d, "Mn"}, {0x10d6e, 0x10d6e, "Pd"},
    {0x10d6f, 0x10d6f, "Lm"}, {0x10d70, 0x10d85, "Ll"}, {0x10d8e, 0x10d8f, "Sm"},
    {0x10ec2, 0x10ec4, "Lo"}, {0x10efc, 0x10eff, "Mn"}, {0x1123f, 0x11240, "Lo"},
    {0x11241, 0x11241, "Mn"}, {0x11380, 0x11389, "Lo"}, {0x1138b, 0x1138b, "Lo"},
    {0x1138e, 0x1138e, "Lo"}, {0x11390, 0x113b5, "Lo"}, {0x113b7, 0x113b7, "Lo"},
    {0x113b8, 0x113ba, "Mc"}, {0x113bb, 0x113c0, "Mn"}, {0x113c2, 0x113c2, "Mc"},
    {0x113c5, 0x113c5, "Mc"}, {0x113c7, 0x113ca, "Mc"}, {0x113cc, 0x113cd, "Mc"},
    {0x113ce, 0x113ce, "Mn"}, {0x113cf, 0x113cf, "Mc"}, {0x113d0, 0x113d0, "Mn"},
    {0x113d1, 0x113d1, "Lo"}, {0x113d2, 0x113d2, "Mn"}, {0x113d3, 0x113d3, "Lo"},
    {0x113d4, 0x113d5, "Po"}, {0x113d7, 0x113d8, "Po"}, {0x113e1, 0x113e2, "Mn"},
    {0x116d0, 0x116e3, "Nd"}, {0x11b00, 0x11b09, "Po"}, {0x11bc0, 0x11be0, "Lo"},
    {0x11be1, 0x11be1, "Po"}, {0x11bf0, 0x11bf9, "Nd"}, {0x11f00, 0x11f01, "Mn"},
    {0x11f02, 0x11f02, "Lo"}, {0x11f03, 0x11f03, "Mc"}, {0x11f04, 0x11f10, "Lo"},
    {0x11f12, 0x11f33, "Lo"}, {0x11f34, 0x11f35, "Mc"}, {0x11f36, 0x11f3a, "Mn"},
    {0x11f3e, 0x11f3f, "Mc"}, {0x11f40, 0x11f40, "Mn"}, {0x11f41, 0x11f41, "Mc"},
    {0x11f42, 0x11f42, "Mn"}, {0x11f43, 0x11f4f, "Po"}, {0x11f50, 0x11f59, "Nd"},
    {0x11f5a, 0x11f5a, "Mn"}, {0x1342f, 0x1342f, "Lo"}, {0x13439, 0x1343f, "Cf"},
    {0x13440, 0x13440, "Mn"}, {0x13441, 0x13446, "Lo"}, {0x13447, 0x13455, "Mn"},
    {0x13460, 0x143fa, "Lo"}, {0x16100, 0x1611d, "Lo"}, {0x1611e, 0x16129, "Mn"},
    {0x1612a, 0x1612c, "Mc"}, {0x1612d, 0x1612f, "Mn"}, {0x16130, 0x16139, "Nd"},
    {0x16d40, 0x16d42, "Lm"}, {0x16d43, 0x16d6a, "Lo"}, {0x16d6b, 0x16d6c, "Lm"},
    {0x16d6d, 0x16d6f, "Po"}, {0x16d70, 0x16d79, "Nd"}, {0x18cff, 0x18cff, "Lo"},
    {0x1b132, 0x1b132, "Lo"}, {0x1b155, 0x1b155, "Lo"}, {0x1cc00, 0x1ccef, "So"},
    {0x1ccf0, 0x1ccf9, "Nd"}, {0x1cd00, 0x1ceb3, "So"}, {0x1d2c0, 0x1d2d3, "No"},
    {0x1df25, 0x1df2a, "Ll"}, {0x1e030, 0x1e06d, "Lm"}, {0x1e08f, 0x1e08f, "Mn"},
    {0x1e4d0, 0x1e4ea, "Lo"}, {0x1e4eb, 0x1e4eb, "Lm"}, {0x1e4ec, 0x1e4ef, "Mn"},
    {0x1e4f0, 0x1e4f9, "Nd"}, {0x1e5d0, 0x1e5ed, "Lo"}, {0x1e5ee, 0x1e5ef, "Mn"},
    {0x1e5f0, 0x1e5f0, "Lo"}, {0x1e5f1, 0x1e5fa, "Nd"}, {0x1e5ff, 0x1e5ff, "Po"},
    {0x1f6dc, 0x1f6dc, "So"}, {0x1f774, 0x1f776, "So"}, {0x1f77b, 0x1f77f, "So"},
    {0x1f7d9, 0x1f7d9, "So"}, {0x1f8b2, 0x1f8bb, "So"}, {0x1f8c0, 0x1f8c1, "So"},
    {0x1fa75, 0x1fa77, "So"}, {0x1fa87, 0x1fa89, "So"}, {0x1fa8f, 0x1fa8f, "So"},
    {0x1faad, 0x1faaf, "So"}, {0x1fabb, 0x1fabf, "So"}, {0x1fac6, 0x1fac6, "So"},
    {0x1face, 0x1facf, "So"}, {0x1fada, 0x1fadc, "So"}, {0x1fadf, 0x1fadf, "So"},
    {0x1fae8, 0x1fae9, "So"}, {0x1faf7, 0x1faf8, "So"}, {0x1fbcb, 0x1fbef, "So"},
    {0x2b739, 0x2b739, "Lo"}, {0x2ebf0, 0x2ee5d, "Lo"}, {0x31350, 0x323af, "Lo"},
};

// Combining marks, and second halves of a composition, of Unicode 10 to 14: Hugging Face's NFC has
// the tables of Unicode 9, for which they are ordinary characters.
static constexpr CategoryRange kUnknownToNfc[] = {
    {0x7fd, 0x7fd},     {0x898, 0x89f},     {0x8ca, 0x8d3},     {0x9fe, 0x9fe},
    {0xc3c, 0xc3c},     {0xd3b, 0xd3c},     {0xeba, 0xeba},     {0x1715, 0x1715},
    {0x1abf, 0x1ace},   {0x1df6, 0x1dfa},   {0xa82c, 0xa82c},   {0x10d24, 0x10d27},
    {0x10eab, 0x10eac}, {0x10f46, 0x10f50}, {0x10f82, 0x10f85}, {0x11070, 0x11070},
    {0x1133b, 0x1133b}, {0x1145e, 0x1145e}, {0x11839, 0x1183a}, {0x11930, 0x11930},
    {0x1193d, 0x1193e}, {0x11943, 0x11943}, {0x119e0, 0x119e0}, {0x11a34, 0x11a34},
    {0x11a47, 0x11a47}, {0x11a99, 0x11a99}, {0x11d42, 0x11d42}, {0x11d44, 0x11d45},
    {0x11d97, 0x11d97}, {0x16ff0, 0x16ff1}, {0x1e130, 0x1e136}, {0x1e2ae, 0x1e2ae},
    {0x1e2ec, 0x1e2ef},
};

// By utf8proc_category_t.
static constexpr const char* kCategories[] = {
    "Cn", "Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Pc", "Pd", "Ps",
    "Pe", "Pi", "Pf", "Po", "Sm", "Sc", "Sk", "So", "Zs", "Zl", "Zp", "Cc", "Cf", "Cs", "Co"};

static constexpr uint32_t kCodes = 0x110000;

std::span<const CategoryRange> newer_code_points() { return kNewer; }

// The range of a sorted table that holds `code`, or null.
static const CategoryRange* range_of(std::span<const CategoryRange> ranges, uint32_t code) {
  const auto at = std::partition_point(ranges.begin(), ranges.end(),
                                       [&](const auto& range) { return range.last < code; });
  return at != ranges.end() && at->first <= code ? &*at : nullptr;
}

static bool unknown_to_nfc(uint32_t code) {
  return range_of(kUnknownToNfc, code) || range_of(kNewer, code);
}

static uint16_t flags_of(uint32_t code) {
  const int known = utf8proc_category(int32_t(code));
  const CategoryRange* newer = known ? nullptr : range_of(kNewer, code);
  const char* category = newer ? newer->category : kCategories[known];
  const char major = category[0], minor = category[1];
  const bool word = major == 'L' || major == 'M', punct = major == 'P' || major == 'S';
  const bool uncased = major == 'M' || (major == 'L' && (minor == 'm' || minor == 'o'));
  const bool cjk = (code >= 0x4e00 && code <= 0x9fa5) || (code >= 0x3040 && code <= 0x30ff);
  const bool circled = code >= 0x24b6 && code <= 0x1f189 && major == 'S' &&
                       (code <= 0x24e9 || (code >= 0x1f130 && code <= 0x1f149) ||
                        (code >= 0x1f150 && code <= 0x1f169) || code >= 0x1f170);
  uint16_t flags = cjk ? kCjk : 0;
  if (major == 'L') flags |= kLetter;
  if (major == 'M') flags |= kMark;
  if (major == 'N') flags |= kNumber;
  if (major == 'Z' || (code >= 9 && code <= 13) || code == 0x85) flags |= kSpace;
  if (uncased || (major == 'L' && minor != 'l')) flags |= kUpper;
  if (uncased || (major == 'L' && minor == 'l')) flags |= kLower;
  if (word || (major == 'N' && minor != 'o') || (major == 'P' && minor == 'c') || circled ||
      code == 0x200c || code == 0x200d)
    flags |= kWordChar;
  if (word) flags |= cjk ? kCjkWord : kDeepSeekWord;
  if (punct) flags |= cjk ? kCjkPunct : kDeepSeekPunct;
  return flags;
}

// ---- NFC ----

// Decomposes, orders and composes: `codes` become NFC. The order is by our own stable sort, because
// utf8proc's takes time quadratic in the marks on one letter.
static void compose(vector<int32_t>& codes) {
  vector<int32_t> parts;
  for (const int32_t code : codes) {
    int32_t part[32];
    const auto count =
        utf8proc_decompose_char(code, part, std::size(part), UTF8PROC_DECOMPOSE, nullptr);
    parts.insert(parts.end(), part, part + count);
  }
  const auto order = [](int32_t code) { return utf8proc_get_property(code)->combining_class; };
  for (auto at = parts.begin(); at != parts.end();) {
    const auto end = std::find_if(at, parts.end(), [&](int32_t c) { return order(c) == 0; });
    std::stable_sort(at, end, [&](int32_t a, int32_t b) { return order(a) < order(b); });
    at = end == parts.end() ? end : end + 1;
  }
  // "Stable" keeps what Unicode excludes from composition apart.
  const auto options = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
  const auto size = utf8proc_normalize_utf32(parts.data(), int64_t(parts.size()), options);
  parts.resize(size_t(size));
  codes.swap(parts);
}

// Sets kUnstable on everything that NFC moves, replaces or joins to the character before it. (What
// composes with something before it is a later part of some decomposition.)
static void mark_unstable(auto&& at) {
  vector<int32_t> codes;
  for (uint32_t code = 0xc0; code < 0x30000; code++) {
    if (code >= 0xac00 && code < 0xe000) continue;  // Hangul syllables, surrogates
    const utf8proc_property_t* property = utf8proc_get_property(int32_t(code));
    bool unstable = property->combining_class != 0;
    int32_t part[32];
    const auto count =
        utf8proc_decompose_char(int32_t(code), part, std::size(part), UTF8PROC_DECOMPOSE, nullptr);
    if (count > 1 || part[0] != int32_t(code)) {
      for (int64_t i = 1; i < count; i++)
        if (!unknown_to_nfc(uint32_t(part[i]))) at(uint32_t(part[i])) |= kUnstable;
      codes.assign(1, int32_t(code));
      compose(codes);
      unstable |= codes.size() != 1 || codes[0] != int32_t(code);
    }
    if (unstable && !unknown_to_nfc(code)) at(code) |= kUnstable;
  }
  for (uint32_t code = 0x1161; code <= 0x1175; code++) at(code) |= kUnstable;  // jamo vowels
  for (uint32_t code = 0x11a8; code <= 0x11c2; code++) at(code) |= kUnstable;  // and finals
}

CharTable::CharTable() : block_(kCodes / 128) {
  constexpr uint32_t kLast = 0x40000;  // no character from here to U+E0000 has a flag
  vector<uint16_t> all(kLast);
  for (uint32_t code = 0; code < kLast; code++) all[code] = flags_of(code);
  mark_unstable([&](uint32_t code) -> uint16_t& { return all[code]; });
  all.resize(kLast + 512);
  for (uint32_t i = 0; i < 512; i++) all[kLast + i] = flags_of(0xe0000 + i);
  std::map<vector<uint16_t>, uint16_t> known;
  for (uint32_t begin = 0; begin < all.size(); begin += 128) {
    const vector<uint16_t> block(all.begin() + begin, all.begin() + begin + 128);
    const auto [at, is_new] = known.emplace(block, uint16_t(known.size()));
    if (is_new) flags_.insert(flags_.end(), block.begin(), block.end());
    block_[(begin < kLast ? begin : begin - kLast + 0xe0000) / 128] = at->second;
  }
  const uint16_t none = known.at(vector<uint16_t>(128));
  for (uint32_t code = kLast; code < kCodes; code += 128)
    if (code < 0xe0000 || code >= 0xe0000 + 512) block_[code / 128] = none;
}

// The first byte from `p` on that is not below `limit`, or `end`.
static const char* skip_below(const char* p, const char* end, uint8_t limit) {
  const __m128i last = _mm_set1_epi8(char(limit - 1));
  for (; end - p >= 16; p += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i low = _mm_cmpeq_epi8(_mm_max_epu8(bytes, last), last);
    const unsigned mask = static_cast<unsigned>(_mm_movemask_epi8(low)) ^ 0xffff;
    if (mask) return p + __builtin_ctz(mask);
  }
  while (p < end && uint8_t(*p) < limit) p++;
  return p;
}

bool nfc(const CharTable& chars, string_view text, string& out) {
  const char *const begin = text.data(), *const end = begin + text.size();
  const char* done = begin;
  bool changed = false;
  vector<int32_t> codes, before;
  // Everything below U+0300, whose first byte is 0xcc, is stable.
  for (const char* p = skip_below(begin, end, 0xcc); p < end; p = skip_below(p, end, 0xcc)) {
    const Char c = decode_char(p);
    if (!(chars[c.code] & kUnstable)) {
      p += c.size;
      continue;
    }
    const char* first = p;
    if (first > begin) {
      do first--;
      while ((*first & 0xc0) == 0x80);
      if (unknown_to_nfc(decode_char(first).code)) first = p;
    }
    codes.clear();
    if (first < p) codes.push_back(int32_t(decode_char(first).code));
    while (p < end) {
      const Char next = decode_char(p);
      if (!(chars[next.code] & kUnstable)) break;
      codes.push_back(int32_t(next.code));
      p += next.size;
    }
    before = codes;
    compose(codes);
    if (codes == before) continue;
    if (!changed) out.clear();
    changed = true;
    out.append(done, first);
    for (const int32_t code : codes) append_char(out, uint32_t(code));
    done = p;
  }
  if (changed) out.append(done, end);
  return changed;
}

// ---- UTF-8 ----

void append_char(string& out, uint32_t code) {
  uint8_t bytes[4];
  const auto size = utf8proc_encode_char(int32_t(code), bytes);
  out.append(reinterpret_cast<const char*>(bytes), size_t(size));
}

// Bytes of the longest start of a character at `p`, and whether it is a whole one; RFC 3629.
static size_t char_prefix(const uint8_t* p, const uint8_t* end, bool& whole) {
  const uint8_t lead = *p;
  const size_t size = lead < 0x80                    ? 1
                      : lead >= 0xc2 && lead <= 0xdf ? 2
                      : lead >= 0xe0 && lead <= 0xef ? 3
                      : lead >= 0xf0 && lead <= 0xf4 ? 4
                                                     : 0;
  size_t have = size ? 1 : 0;
  while (have < size && p + have < end) {
    const uint8_t byte = p[have];
    uint8_t low = 0x80, high = 0xbf;
    if (have == 1 && lead == 0xe0) low = 0xa0;
    if (have == 1 && lead == 0xed) high = 0x9f;
    if (have == 1 && lead == 0xf0) low = 0x90;
    if (have == 1 && lead == 0xf4) high = 0x8f;
    if (byte < low || byte > high) break;
    have++;
  }
  whole = size && have == size;
  return std::max<size_t>(have, 1);
}

size_t valid_utf8_prefix(string_view bytes) {
  const char *const begin = bytes.data(), *const end = begin + bytes.size();
  const char* p = begin;
  while ((p = skip_below(p, end, 0x80)) < end) {
    const auto* b = reinterpret_cast<const uint8_t*>(p);
    const auto trail = [&](int i) { return (b[i] & 0xc0) == 0x80; };
    if (end - p >= 4 && b[0] >= 0xe1 && b[0] <= 0xec && trail(1) && trail(2)) {
      p += 3;  // most of what is not ASCII
      continue;
    }
    bool whole = false;
    const size_t size = char_prefix(b, reinterpret_cast<const uint8_t*>(end), whole);
    if (!whole) break;
    p += size;
  }
  return size_t(p - begin);
}

bool is_valid_utf8(string_view bytes) { return valid_utf8_prefix(bytes) == bytes.size(); }

string replace_invalid_utf8(string_view bytes) {
  string out;
  for (;;) {
    const size_t valid = valid_utf8_prefix(bytes);
    out.append(bytes.substr(0, valid));
    bytes.remove_prefix(valid);
    if (bytes.empty()) return out;
    bool whole = false;
    const auto* b = reinterpret_cast<const uint8_t*>(bytes.data());
    bytes.remove_prefix(char_prefix(b, b + bytes.size(), whole));
    out += "\xef\xbf\xbd";
  }
}

}  // namespace pith
