#include <utf8proc.h>

#include <sstream>

#include "data/tokenizer.h"

namespace pith {

// Categories in Unicode 15.0 to 16.0, which libraries may be too old to know.
static constexpr const char* kNewer =
    "Cf 13439-1343f Ll 1c8a a7cd a7db 10d70-10d85 1df25-1df2a Lm 10d4e 10d6f 16d40-16d42 "
    "16d6b-16d6c 1e030-1e06d 1e4eb Lo 105c0-105f3 10d4a-10d4d 10d4f 10ec2-10ec4 1123f-11240 "
    "11380-11389 1138b 1138e 11390-113b5 113b7 113d1 113d3 11bc0-11be0 11f02 11f04-11f10 "
    "11f12-11f33 1342f 13441-13446 13460-143fa 16100-1611d 16d43-16d6a 18cff 1b132 1b155 "
    "1e4d0-1e4ea 1e5d0-1e5ed 1e5f0 2b739 2ebf0-2ee5d 31350-323af Lu 1c89 a7cb-a7cc a7da a7dc "
    "10d50-10d65 Mc cf3 113b8-113ba 113c2 113c5 113c7-113ca 113cc-113cd 113cf 11f03 11f34-11f35 "
    "11f3e-11f3f 11f41 1612a-1612c Mn 897 ece 10d69-10d6d 10efc-10eff 11241 113bb-113c0 113ce "
    "113d0 113d2 113e1-113e2 11f00-11f01 11f36-11f3a 11f40 11f42 11f5a 13440 13447-13455 "
    "1611e-16129 1612d-1612f 1e08f 1e4ec-1e4ef 1e5ee-1e5ef Nd 10d40-10d49 116d0-116e3 "
    "11bf0-11bf9 11f50-11f59 16130-16139 16d70-16d79 1ccf0-1ccf9 1e4f0-1e4f9 1e5f1-1e5fa No "
    "1d2c0-1d2d3 Pd 10d6e Po 1b4e-1b4f 1b7f 113d4-113d5 113d7-113d8 11b00-11b09 11be1 "
    "11f43-11f4f 16d6d-16d6f 1e5ff Sm 10d8e-10d8f So 2427-2429 2ffc-2fff 31e4-31e5 31ef "
    "1cc00-1ccef 1cd00-1ceb3 1f6dc 1f774-1f776 1f77b-1f77f 1f7d9 1f8b2-1f8bb 1f8c0-1f8c1 "
    "1fa75-1fa77 1fa87-1fa89 1fa8f 1faad-1faaf 1fabb-1fabf 1fac6 1face-1facf 1fada-1fadc 1fadf "
    "1fae8-1fae9 1faf7-1faf8 1fbcb-1fbef";

// Marks of Unicode 10 to 14, which are ordinary characters to Hugging Face's NFC, of Unicode 9.
static constexpr const char* kUnknownMarks =
    "7fd 898-89f 8ca-8d3 9fe c3c d3b-d3c eba 1715 1abf-1ace 1df6-1dfa a82c 10d24-10d27 "
    "10eab-10eac 10f46-10f50 10f82-10f85 11070 1133b 1145e 11839-1183a 11930 1193d-1193e 11943 "
    "119e0 11a34 11a47 11a99 11d42 11d44-11d45 11d97 16ff0-16ff1 1e130-1e136 1e2ae 1e2ec-1e2ef";

// What \w has besides letters, marks, numbers and connectors: joiners, and letters in circles.
static constexpr const char* kMoreOfWords =
    "200c-200d 24b6-24e9 1f130-1f149 1f150-1f169 1f170-1f189";

// Calls action(category, first, last) for each range of "Ll 1c8a a7cd Lm 16d40-16d42".
static void for_each_range(const char* list, auto&& action) {
  std::istringstream words(list);
  for (string word, category; words >> word;) {
    if (isupper(word[0])) {
      category = word;
      continue;
    }
    string last = word.substr(word.find('-') + 1);
    action(category, std::stoul(word, nullptr, 16), std::stoul(last, nullptr, 16));
  }
}

string newer_members(string_view category) {
  string members;
  for_each_range(kNewer, [&](const string& of, u64 first, u64 last) {
    if (of.starts_with(category)) members += text("\\x{%lx}-\\x{%lx}", first, last);
  });
  return members;
}

static string compose(string_view utf8) {
  // "Stable" keeps what Unicode excludes from composition apart.
  constexpr auto kOptions = utf8proc_option_t(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
  u8* out = nullptr;
  auto size = utf8proc_map(reinterpret_cast<const u8*>(utf8.data()), utf8.size(), &out, kOptions);
  if (size < 0) failed("NFC", utf8proc_errmsg(size));
  string composed(reinterpret_cast<char*>(out), size);
  free(out);
  return composed;
}

static u16 flags_of(u32 code, const string& category) {
  char major = category[0], minor = category[1];
  bool uncased = major == 'M' || (major == 'L' && (minor == 'm' || minor == 'o'));
  u16 flags = 0;
  if (major == 'L') flags |= kLetter;
  if (major == 'M') flags |= kMark;
  if (major == 'N') flags |= kNumber;
  if (major == 'Z' || (code >= 9 && code <= 13) || code == 0x85) flags |= kSpace;
  if (uncased || (major == 'L' && minor != 'l')) flags |= kUpper;
  if (uncased || (major == 'L' && minor == 'l')) flags |= kLower;
  if (flags & (kLetter | kMark) || (major == 'N' && minor != 'o') || category == "Pc")
    flags |= kWordChar;
  return flags;
}

// What NFC may join to what is before it: a later part of a decomposition.
static void mark_unstable(vector<u16>& flags) {
  u8 utf8[4];
  int parts[32];
  for (u32 code = 0xc0; code < 0x30000; code++) {
    if (code >= 0xd800 && code < 0xe000) continue;
    auto count = utf8proc_decompose_char(code, parts, 32, UTF8PROC_DECOMPOSE, nullptr);
    for (int i = 1; i < count; i++) flags[parts[i]] |= kUnstable;
    string_view text(reinterpret_cast<char*>(utf8), utf8proc_encode_char(code, utf8));
    if (utf8proc_get_property(code)->combining_class || compose(text) != text)
      flags[code] |= kUnstable;
  }
  for (u16& flag : flags)
    if (flag & kUnknownToNfc) flag &= ~kUnstable;
}

const u16* char_flags() {
  static const vector<u16> table = [] {
    vector<u16> flags(0x110000);
    for (u32 code = 0; code < flags.size(); code++)
      if (code < 0x40000 || code >> 12 == 0xe0)  // the rest has no flags
        flags[code] = flags_of(code, utf8proc_category_string(int(code)));
    for_each_range(kNewer, [&](const string& category, u64 code, u64 last) {
      for (; code <= last; code++) flags[code] = flags_of(code, category) | kUnknownToNfc;
    });
    auto add = [&](const char* list, u16 flag) {
      for_each_range(list, [&](const string&, u64 code, u64 last) {
        for (; code <= last; code++) flags[code] |= flag;
      });
    };
    add(kMoreOfWords, kWordChar);
    add(kUnknownMarks, kUnknownToNfc);
    mark_unstable(flags);
    return flags;
  }();
  return table.data();
}

static const char* skip_ascii(const char* p, const char* end) {
  for (u64 bytes; end - p >= 8; p += 8) {
    memcpy(&bytes, p, 8);
    if (bytes & 0x8080808080808080) break;
  }
  while (p < end && u8(*p) < 0x80) p++;
  return p;
}

string_view to_nfc(string_view text, string& buffer) {
  const u16* flags = char_flags();
  const char *const begin = text.data(), *const end = begin + text.size(), *done = begin;
  buffer.clear();
  for (const char* p = skip_ascii(begin, end); p < end; p = skip_ascii(p, end)) {
    if (const Char c = decode_char(p); !(flags[c.code] & kUnstable)) {
      p += c.size;
      continue;
    }
    const char* first = p > begin ? char_before(p) : p;  // which may join in
    if (flags[decode_char(first).code] & kUnknownToNfc) first = p;
    for (Char next; p < end && flags[(next = decode_char(p)).code] & kUnstable;) p += next.size;
    string composed = compose({first, p});
    if (composed == string_view(first, p)) continue;
    buffer.append(done, first) += composed;
    done = p;
  }
  if (done == begin) return text;
  return buffer.append(done, end);
}

size_t valid_utf8_prefix(string_view bytes) {
  const char *const begin = bytes.data(), *const end = begin + bytes.size();
  const char* p = begin;
  int code = 0;
  while ((p = skip_ascii(p, end)) < end) {
    auto size = utf8proc_iterate(reinterpret_cast<const u8*>(p), end - p, &code);
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
    size_t valid = valid_utf8_prefix(bytes);
    out += bytes.substr(0, valid);
    bytes.remove_prefix(valid);
    if (bytes.empty()) return out;
    bytes.remove_prefix(invalid_part(bytes));
    out += "\ufffd";
  }
}

}
