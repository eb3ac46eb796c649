#include <utf8proc.h>

#include <algorithm>

#include "data/tokenizer_parts.h"

namespace pith {

// Of Unicode 15.0, 15.1 and 16.0.
static constexpr NewerCodes kNewer[] = {
    {"Cf", "13439-1343f"},
    {"Ll", "1c8a a7cd a7db 10d70-10d85 1df25-1df2a"},
    {"Lm", "10d4e 10d6f 16d40-16d42 16d6b-16d6c 1e030-1e06d 1e4eb"},
    {"Lo",
     "105c0-105f3 10d4a-10d4d 10d4f 10ec2-10ec4 1123f-11240 11380-11389 1138b 1138e "
     "11390-113b5 113b7 113d1 113d3 11bc0-11be0 11f02 11f04-11f10 11f12-11f33 1342f "
     "13441-13446 13460-143fa 16100-1611d 16d43-16d6a 18cff 1b132 1b155 1e4d0-1e4ea "
     "1e5d0-1e5ed 1e5f0 2b739 2ebf0-2ee5d 31350-323af"},
    {"Lu", "1c89 a7cb-a7cc a7da a7dc 10d50-10d65"},
    {"Mc",
     "cf3 113b8-113ba 113c2 113c5 113c7-113ca 113cc-113cd 113cf 11f03 11f34-11f35 "
     "11f3e-11f3f 11f41 1612a-1612c"},
    {"Mn",
     "897 ece 10d69-10d6d 10efc-10eff 11241 113bb-113c0 113ce 113d0 113d2 113e1-113e2 "
     "11f00-11f01 11f36-11f3a 11f40 11f42 11f5a 13440 13447-13455 1611e-16129 1612d-1612f "
     "1e08f 1e4ec-1e4ef 1e5ee-1e5ef"},
    {"Nd",
     "10d40-10d49 116d0-116e3 11bf0-11bf9 11f50-11f59 16130-16139 16d70-16d79 1ccf0-1ccf9 "
     "1e4f0-1e4f9 1e5f1-1e5fa"},
    {"No", "1d2c0-1d2d3"},
    {"Pd", "10d6e"},
    {"Po",
     "1b4e-1b4f 1b7f 113d4-113d5 113d7-113d8 11b00-11b09 11be1 11f43-11f4f 16d6d-16d6f "
     "1e5ff"},
    {"Sm", "10d8e-10d8f"},
    {"So",
     "2427-2429 2ffc-2fff 31e4-31e5 31ef 1cc00-1ccef 1cd00-1ceb3 1f6dc 1f774-1f776 "
     "1f77b-1f77f 1f7d9 1f8b2-1f8bb 1f8c0-1f8c1 1fa75-1fa77 1fa87-1fa89 1fa8f 1faad-1faaf "
     "1fabb-1fabf 1fac6 1face-1facf 1fada-1fadc 1fadf 1fae8-1fae9 1faf7-1faf8 1fbcb-1fbef"},
};

// Marks of Unicode 10 to 14, which are ordinary characters to Hugging Face's NFC, of Unicode 9.
static constexpr const char* kUnknownMarks =
    "7fd 898-89f 8ca-8d3 9fe c3c d3b-d3c eba 1715 1abf-1ace 1df6-1dfa a82c 10d24-10d27 "
    "10eab-10eac 10f46-10f50 10f82-10f85 11070 1133b 1145e 11839-1183a 11930 1193d-1193e "
    "11943 119e0 11a34 11a47 11a99 11d42 11d44-11d45 11d97 16ff0-16ff1 1e130-1e136 1e2ae "
    "1e2ec-1e2ef";

// What \w has besides letters, marks, numbers and connectors: joiners, and letters in circles.
static constexpr const char* kMoreOfWords =
    "200c-200d 24b6-24e9 1f130-1f149 1f150-1f169 1f170-1f189";

std::span<const NewerCodes> newer_codes() { return kNewer; }

// Calls action(code) for all of "1c89 a7cb-a7cc".
static void for_each_code(const char* ranges, auto&& action) {
  for (char* at; *ranges; ranges = at + (*at == ' ')) {
    const u32 first = strtoul(ranges, &at, 16);
    const u32 last = *at == '-' ? strtoul(at + 1, &at, 16) : first;
    for (u32 code = first; code <= last; code++) action(code);
  }
}

static u16 flags_of(u32 code, const char* category) {
  const char major = category[0], minor = category[1];
  const bool uncased = major == 'M' || (major == 'L' && (minor == 'm' || minor == 'o'));
  u16 flags = 0;
  if (major == 'L') flags |= kLetter;
  if (major == 'M') flags |= kMark;
  if (major == 'N') flags |= kNumber;
  if (major == 'P' || major == 'S') flags |= kPunct;
  if (major == 'Z' || (code >= 9 && code <= 13) || code == 0x85) flags |= kSpace;
  if (uncased || (major == 'L' && minor != 'l')) flags |= kUpper;
  if (uncased || (major == 'L' && minor == 'l')) flags |= kLower;
  if (flags & (kLetter | kMark) || (major == 'N' && minor != 'o') || !strcmp(category, "Pc"))
    flags |= kWordChar;
  return flags;
}

static void append_decomposed(int code, vector<int>& out) {
  int parts[32];
  const auto count =
      utf8proc_decompose_char(code, parts, std::size(parts), UTF8PROC_DECOMPOSE, nullptr);
  out.insert(out.end(), parts, parts + count);
}

static auto combining_class(int code) { return utf8proc_get_property(code)->combining_class; }

// `codes` become NFC. utf8proc's own sort takes time quadratic in the marks on one letter.
static void compose(vector<int>& codes) {
  vector<int> parts;
  for (const int code : codes) append_decomposed(code, parts);
  for (auto at = parts.begin(); at != parts.end();) {
    const auto end = std::find_if(at, parts.end(), [](int c) { return !combining_class(c); });
    std::stable_sort(at, end, [](int a, int b) { return combining_class(a) < combining_class(b); });
    at = end == parts.end() ? end : end + 1;
  }
  // "Stable" keeps what Unicode excludes from composition apart.
  const auto options = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
  parts.resize(utf8proc_normalize_utf32(parts.data(), i64(parts.size()), options));
  codes.swap(parts);
}

// What joins the character before it is a later part of some decomposition.
static void mark_unstable(vector<u16>& flags) {
  const auto mark = [&](u32 code) {
    if (!(flags[code] & kUnknownToNfc)) flags[code] |= kUnstable;
  };
  vector<int> codes;
  for (u32 code = 0xc0; code < 0x30000; code++) {
    if (code >= 0xac00 && code < 0xe000) continue;  // Hangul syllables, surrogates
    if (combining_class(int(code))) mark(code);
    codes.clear();
    append_decomposed(int(code), codes);
    if (codes.size() == 1 && codes[0] == int(code)) continue;
    for (size_t i = 1; i < codes.size(); i++) mark(u32(codes[i]));
    compose(codes);
    if (codes.size() != 1 || codes[0] != int(code)) mark(code);
  }
  for (u32 code = 0x1161; code <= 0x1175; code++) mark(code);  // jamo vowels
  for (u32 code = 0x11a8; code <= 0x11c2; code++) mark(code);  // and finals
}

const u16* char_flags() {
  static const vector<u16> table = [] {
    vector<u16> flags(0x110000);
    for (u32 code = 0; code < flags.size(); code++)
      if (code < 0x40000 || code >> 12 == 0xe0)  // the rest has no flags
        flags[code] = flags_of(code, utf8proc_category_string(int(code)));
    for (const auto& [category, ranges] : kNewer)
      for_each_code(ranges,
                    [&](u32 code) { flags[code] = flags_of(code, category) | kUnknownToNfc; });
    for_each_code(kMoreOfWords, [&](u32 code) { flags[code] |= kWordChar; });
    for_each_code(kUnknownMarks, [&](u32 code) { flags[code] |= kUnknownToNfc; });
    mark_unstable(flags);
    return flags;
  }();
  return table.data();
}

// The first byte from `p` on that is not ASCII, or `end`.
static const char* skip_ascii(const char* p, const char* end) {
  for (u64 bytes; end - p >= 8; p += 8) {
    memcpy(&bytes, p, 8);
    if (bytes & 0x8080808080808080) break;
  }
  while (p < end && u8(*p) < 0x80) p++;
  return p;
}

bool to_nfc(string_view text, string& out) {
  const u16* flags = char_flags();
  const char *const begin = text.data(), *const end = begin + text.size(), *done = begin;
  vector<int> codes, before;
  for (const char* p = skip_ascii(begin, end); p < end; p = skip_ascii(p, end)) {
    const Char c = decode_char(p);
    if (!(flags[c.code] & kUnstable)) {
      p += c.size;
      continue;
    }
    const char* first = p > begin ? char_before(p) : p;  // which may join in
    if (flags[decode_char(first).code] & kUnknownToNfc) first = p;
    codes.clear();
    if (first < p) codes.push_back(int(decode_char(first).code));
    for (Char next; p < end && flags[(next = decode_char(p)).code] & kUnstable; p += next.size)
      codes.push_back(int(next.code));
    before = codes;
    compose(codes);
    if (codes == before) continue;
    if (done == begin) out.clear();
    out.append(done, first);
    for (const int code : codes) append_char(out, u32(code));
    done = p;
  }
  if (done == begin) return false;
  out.append(done, end);
  return true;
}

void append_char(string& out, u32 code) {
  u8 bytes[4];
  const auto size = utf8proc_encode_char(int(code), bytes);
  out.append(reinterpret_cast<const char*>(bytes), size_t(size));
}

size_t valid_utf8_prefix(string_view bytes) {
  const char *const begin = bytes.data(), *const end = begin + bytes.size();
  const char* p = begin;
  int code = 0;
  while ((p = skip_ascii(p, end)) < end) {
    const auto size = utf8proc_iterate(reinterpret_cast<const u8*>(p), end - p, &code);
    if (size < 0) break;
    p += size;
  }
  return size_t(p - begin);
}

bool is_valid_utf8(string_view bytes) { return valid_utf8_prefix(bytes) == bytes.size(); }

// How many of `bytes`, which start with no whole character, could start one; at least 1.
static size_t invalid_part(string_view bytes) {
  for (size_t size = min<size_t>(bytes.size(), 3); size > 1; size--)
    for (size_t missing = 1; size + missing <= 4; missing++)
      for (const char filler : {'\x80', '\xbf'})
        if (is_valid_utf8(string(bytes.substr(0, size)) + string(missing, filler))) return size;
  return 1;
}

string replace_invalid_utf8(string_view bytes) {
  string out;
  for (;;) {
    const size_t valid = valid_utf8_prefix(bytes);
    out += bytes.substr(0, valid);
    bytes.remove_prefix(valid);
    if (bytes.empty()) return out;
    bytes.remove_prefix(invalid_part(bytes));
    out += "\ufffd";
  }
}

}
