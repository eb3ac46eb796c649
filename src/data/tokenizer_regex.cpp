#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <cstring>
#include <utility>

#include "core/check.h"
#include "data/tokenizer_parts.h"

namespace pith {

// ---- Oniguruma's patterns as PCRE2's ----

// Oniguruma has Unicode 16; PCRE2's own tables may be older, and its \s, \w and \d differ. So
// properties and these escapes are written out as members of a class.

namespace {
enum class Kind : uint8_t { Property, Space, Word };

bool in_property(const char* property, const char* category) {
    return !strncmp(category, property, strlen(property));
}

bool is_space(uint32_t code) {
    return (code >= 9 && code <= 13) || code == 0x85 || category_of(code)[0] == 'Z';
}

bool is_word(uint32_t code) {
    const char* category = category_of(code);
    for (const char* property : {"L", "M", "Nd", "Nl", "Pc"})
        if (in_property(property, category)) return true;
    for (const uint32_t more : {0xb2, 0xb3, 0xb9, 0xbc, 0xbd, 0xbe})
        if (code == more) return true;
    return (code >= 0x24b6 && code <= 0x24e9) || (code >= 0x1f130 && code <= 0x1f149) ||
           (code >= 0x1f150 && code <= 0x1f169) || (code >= 0x1f170 && code <= 0x1f189);
}

std::string range_text(uint32_t first, uint32_t last) {
    return text(first == last ? "\\x{%x}" : "\\x{%x}-\\x{%x}", first, last);
}

// The code points for which `in` is `wanted`, as ranges.
std::string ranges(auto&& in, bool wanted) {
    std::string out;
    int64_t first = -1;
    for (uint32_t code = 0; code <= 0x110000; code++) {
        const bool surrogate = code >= 0xd800 && code < 0xe000;
        const bool inside = code < 0x110000 && !surrogate && in(code) == wanted;
        if (inside && first < 0) first = code;
        if (!inside && first >= 0) {
            out += range_text(static_cast<uint32_t>(first), code - 1);
            first = -1;
        }
    }
    return out;
}

class Translator {
  public:
    Translator(const std::string& pattern, const std::string& place)
        : pattern_(pattern), place_(place) {}

    std::string run() {
        while (at_ < pattern_.size()) {
            const char c = pattern_[at_];
            if (c == '\\') {
                escape();
            } else if (c == '[') {
                open_class();
            } else if (c == ']' && in_class_) {
                in_class_ = false;
                keep(1);
            } else if (in_class_) {
                if (pattern_.compare(at_, 2, "&&") == 0) refuse("&&");
                keep(1);
            } else if (c == '(' && pattern_.compare(at_, 2, "(?") == 0) {
                group();
            } else if (c == '{') {
                repeat();
            } else {
                keep(1);
            }
        }
        return out_;
    }

  private:
    [[noreturn]] void refuse(const std::string& what) {
        bad_input(place_, "uses " + what + " in a regular expression, which is not supported",
                  "another tokenizer");
    }

    void keep(size_t count) {
        out_ += pattern_.substr(at_, count);
        at_ += count;
    }

    void open_class() {
        if (in_class_) refuse("a class inside a class");
        in_class_ = true;
        keep(pattern_.compare(at_, 2, "[^") == 0 ? 2 : 1);
        if (at_ < pattern_.size() && pattern_[at_] == ']') refuse("a class that starts with ]");
    }

    // (?: (?= (?! (?> (?<= (?<! (?i) (?i: (?-i: and so on; (?m) and (?x) mean other things here.
    void group() {
        static const char* const kSame[] = {
            "(?:", "(?=", "(?!", "(?>", "(?<=", "(?<!", "(?i)", "(?i:", "(?-i)", "(?-i:"};
        for (const char* group : kSame)
            if (pattern_.compare(at_, strlen(group), group) == 0) return keep(strlen(group));
        refuse("the group " + pattern_.substr(at_, 4));
    }

    // {n}, {n,} and {n,m}, not followed by +, which Oniguruma reads as another repetition.
    void repeat() {
        size_t end = at_ + 1;
        while (end < pattern_.size() && (isdigit(pattern_[end]) || pattern_[end] == ',')) end++;
        if (end == at_ + 1 || pattern_[at_ + 1] == ',' || pattern_.compare(end, 1, "}") != 0 ||
            pattern_.compare(end + 1, 1, "+") == 0)
            refuse("the repetition " + pattern_.substr(at_, end + 2 - at_));
        keep(end + 1 - at_);
    }

    void members(const std::string& inside, bool negated) {
        out_ += in_class_ ? inside : (negated ? "[^" : "[") + inside + "]";
    }

    void property() {
        const bool negated = pattern_[at_ + 1] == 'P';
        std::string name = pattern_.substr(at_ + 2, 1);
        size_t size = 3;
        if (name == "{") {
            const size_t end = pattern_.find('}', at_);
            if (end == std::string::npos) refuse("an unclosed \\p{");
            name = pattern_.substr(at_ + 3, end - at_ - 3);
            size = end + 1 - at_;
        }
        static const char* const kMinors[][2] = {{"L", "ultmo"},   {"M", "nce"},  {"N", "dlo"},
                                                 {"P", "cdseifo"}, {"S", "mcko"}, {"Z", "slp"}};
        bool known = false;
        for (const auto& [major, minors] : kMinors)
            known |= name.substr(0, 1) == major &&
                     (name.size() == 1 || (name.size() == 2 && strchr(minors, name[1])));
        if (!known) refuse("\\p{" + name + "}");
        if (in_class_ && negated) {
            out_ += ranges(
                [&](uint32_t code) { return in_property(name.c_str(), category_of(code)); }, false);
        } else {
            std::string inside = "\\p{" + name + "}";
            for (const CategoryRange& range : newer_code_points())
                if (in_property(name.c_str(), range.category))
                    inside += range_text(range.first, range.last);
            members(inside, negated);
        }
        at_ += size;
    }

    void escape() {
        if (at_ + 1 == pattern_.size()) refuse("a \\ at the end");
        const char c = pattern_[at_ + 1];
        const bool negated = isupper(static_cast<unsigned char>(c));
        if (c == 'p' || c == 'P') return property();
        if (strchr("sSwWdD", c)) {
            const auto in = [&](uint32_t code) {
                return c == 's' || c == 'S'   ? is_space(code)
                       : c == 'w' || c == 'W' ? is_word(code)
                                              : !strcmp(category_of(code), "Nd");
            };
            members(ranges(in, !(in_class_ && negated)), negated);
            at_ += 2;
        } else if (isalnum(static_cast<unsigned char>(c)) && !strchr("rntfvaexAz", c)) {
            refuse(std::string("\\") + c);
        } else {
            keep(2);
        }
    }

    const std::string& pattern_;
    const std::string& place_;
    std::string out_;
    size_t at_ = 0;
    bool in_class_ = false;
};
}  // namespace

std::string escape_regex(const std::string& literal) {
    std::string out;
    for (const char c : literal) {
        if (strchr("\\.+*?()|[]{}^$#&-~", c) && c) out += '\\';
        out += c;
    }
    return out;
}

// ---- matching ----

static std::string pcre2_message(int code) {
    char message[256] = "";
    pcre2_get_error_message(code, reinterpret_cast<PCRE2_UCHAR*>(message), sizeof message);
    return message;
}

Regex::Regex(const std::string& pattern, const std::string& place) : place_(place) {
    const std::string translated = Translator(pattern, place).run();
    int error = 0;
    PCRE2_SIZE offset = 0;
    // In Ruby's syntax ^ and $ are those of lines, which only \n ends.
    pcre2_compile_context* context = pcre2_compile_context_create(nullptr);
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    code_ = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                          PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NO_UTF_CHECK, &error,
                          &offset, context);
    pcre2_compile_context_free(context);
    if (!code_)
        bad_input(place, "has a malformed regular expression: " + pcre2_message(error),
                  "fetch the file again");
    pcre2_jit_compile(static_cast<pcre2_code*>(code_), PCRE2_JIT_COMPLETE);
}

Regex::Regex(Regex&& o) noexcept : code_(std::exchange(o.code_, nullptr)), place_(o.place_) {}
Regex& Regex::operator=(Regex&& o) noexcept {
    std::swap(code_, o.code_);
    std::swap(place_, o.place_);
    return *this;
}
Regex::~Regex() { pcre2_code_free(static_cast<pcre2_code*>(code_)); }

void Regex::matches(std::string_view text, std::vector<Match>& out) const {
    out.clear();
    const auto* code = static_cast<const pcre2_code*>(code_);
    const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
    pcre2_match_data* data = pcre2_match_data_create_from_pattern(code, nullptr);
    const PCRE2_SIZE* found = pcre2_get_ovector_pointer(data);
    size_t from = 0, done = 0;
    bool any = false;
    int result = 0;
    while (from <= text.size()) {
        result = pcre2_match(code, subject, text.size(), from, PCRE2_NO_UTF_CHECK, data, nullptr);
        if (result == PCRE2_ERROR_JIT_STACKLIMIT)
            result = pcre2_match(code, subject, text.size(), from,
                                 PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, data, nullptr);
        if (result < 0) break;
        const size_t begin = found[0], end = found[1];
        // An empty match right behind the last one does not count.
        if (begin == end && any && end == done) {
            from = end + (end < text.size() ? decode_char(text.data() + end).size : 1);
            continue;
        }
        if (done < begin) out.push_back({done, begin, false});
        out.push_back({begin, end, true});
        from = done = end;
        any = true;
    }
    pcre2_match_data_free(data);
    if (result < 0 && result != PCRE2_ERROR_NOMATCH)
        failed(place_, "the regular expression could not be matched: " + pcre2_message(result));
    if (done < text.size()) out.push_back({done, text.size(), false});
}

}  // namespace pith
