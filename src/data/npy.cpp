#include "data/npy.h"

#include <algorithm>
#include <cctype>
#include <cstring>

#include "core/check.h"

namespace pith {

static constexpr struct {
    const char* name;
    int64_t bytes;
} kTypes[] = {{"|u1", 1}, {"<u2", 2}, {"<u4", 4}, {"<u8", 8},
              {"<i4", 4}, {"<i8", 8}, {"<f4", 4}, {"<f8", 8}};

int64_t size_of(NpyType type) { return kTypes[static_cast<int>(type)].bytes; }
const char* name_of(NpyType type) { return kTypes[static_cast<int>(type)].name; }

int64_t NpyHeader::numel() const {
    int64_t n = 1;
    for (const int64_t size : shape) n *= size;
    return n;
}

namespace {

constexpr char kMagic[] = "\x93NUMPY";
const char* const kRefetch = "write or fetch the file again";

// Reads the header's Python literal, {'descr': '<u2', 'fortran_order': False, 'shape': (3, 4), },
// whose keys may come in any order.
struct HeaderReader {
    const char* at;
    const char* end;
    const std::string& place;

    [[noreturn]] void refuse(const std::string& what) const {
        bad_input(place, "has a corrupt NPY header: " + what, kRefetch);
    }
    void skip_space() {
        while (at < end && isspace(static_cast<unsigned char>(*at))) at++;
    }
    bool take(char c) {
        skip_space();
        const bool found = at < end && *at == c;
        if (found) at++;
        return found;
    }
    void need(char c) {
        if (!take(c)) refuse(at < end ? text("got '%c', need '%c'", *at, c) : "it ends early");
    }
    std::string quoted() {
        skip_space();
        const char quote = at < end && *at == '"' ? '"' : '\'';
        need(quote);
        const char* begin = at;
        while (at < end && *at != quote) at++;
        const std::string word(begin, at);
        need(quote);
        return word;
    }
    bool boolean() {
        skip_space();
        const char* begin = at;
        while (at < end && isalpha(static_cast<unsigned char>(*at))) at++;
        const std::string word(begin, at);
        if (word != "True" && word != "False") refuse("fortran_order is neither True nor False");
        return word == "True";
    }
    std::vector<int64_t> shape() {
        std::vector<int64_t> sizes;
        int64_t numel = 1;
        need('(');
        while (!take(')')) {
            skip_space();
            int64_t size = 0;
            if (at >= end || !isdigit(static_cast<unsigned char>(*at))) refuse("shape is no tuple");
            for (; at < end && isdigit(static_cast<unsigned char>(*at)); at++)
                if (__builtin_mul_overflow(size, int64_t{10}, &size) ||
                    __builtin_add_overflow(size, int64_t{*at - '0'}, &size))
                    refuse("shape is too large");
            if (at < end && *at == 'L') at++;  // Python 2
            if (__builtin_mul_overflow(numel, std::max<int64_t>(size, 1), &numel) ||
                numel > INT64_MAX / 8)
                refuse("shape is too large");
            sizes.push_back(size);
            if (!take(',')) {
                need(')');
                break;
            }
        }
        return sizes;
    }
};

NpyType type_from(const std::string& descr, const std::string& place) {
    for (int i = 0; i < static_cast<int>(std::size(kTypes)); i++)
        if (descr.size() == 3 && descr.substr(1) == kTypes[i].name + 1 &&
            (descr[0] == '<' || descr[0] == kTypes[i].name[0]))
            return static_cast<NpyType>(i);
    if (descr == "=u1" || descr == ">u1") return NpyType::U1;
    bad_input(
        place,
        text("has an unknown dtype (got \"%s\", need u1, <u2, <u4, <u8, <i4, <i8, <f4 or <f8)",
             descr.c_str()),
        "convert the array with numpy");
}

}  // namespace

NpyHeader parse_npy_header(const char* data, int64_t size, const std::string& place) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(data);
    if (size < 10 || memcmp(data, kMagic, 6) != 0)
        bad_input(place,
                  size < 10
                      ? text("is cut short (got %lld bytes, need an NPY header of 10 or more)",
                             static_cast<long long>(size))
                      : std::string("is not an NPY array (its first bytes are others)"),
                  kRefetch);
    const int version = bytes[6];
    if (version < 1 || version > 3)
        bad_input(place, text("has an unknown NPY version (got %d, need 1, 2 or 3)", version),
                  "save it again with numpy.save");
    int64_t length = bytes[8] | bytes[9] << 8, begin = 10;
    if (version > 1) {
        begin = 12;
        if (size >= begin) length |= int64_t{bytes[10]} << 16 | int64_t{bytes[11]} << 24;
    }
    if (begin + length > size)
        bad_input(place,
                  text("is cut short (got %lld bytes, need a header of %lld)",
                       static_cast<long long>(size), static_cast<long long>(begin + length)),
                  kRefetch);

    HeaderReader in{data + begin, data + begin + length, place};
    NpyHeader header;
    header.header_bytes = begin + length;
    bool fortran = false, seen[3] = {};
    in.need('{');
    while (!in.take('}')) {
        const std::string key = in.quoted();
        in.need(':');
        const int which = key == "descr" ? 0 : key == "fortran_order" ? 1 : key == "shape" ? 2 : -1;
        if (which < 0 || seen[which]) in.refuse("key '" + key + "' is unknown or occurs twice");
        seen[which] = true;
        if (which == 0) header.type = type_from(in.quoted(), place);
        if (which == 1) fortran = in.boolean();
        if (which == 2) header.shape = in.shape();
        if (!in.take(',')) {
            in.need('}');
            break;
        }
    }
    if (!seen[0] || !seen[1] || !seen[2]) in.refuse("need descr, fortran_order and shape");
    if (fortran && header.shape.size() > 1)
        bad_input(place, "is in Fortran order (need C order)",
                  "save numpy.ascontiguousarray of it");
    if (header.data_bytes() > size - header.header_bytes)
        bad_input(place,
                  text("is cut short (got %lld bytes of data, need %lld)",
                       static_cast<long long>(size - header.header_bytes),
                       static_cast<long long>(header.data_bytes())),
                  kRefetch);
    return header;
}

std::string npy_header(NpyType type, const std::vector<int64_t>& shape, int64_t bytes) {
    std::string tuple;
    for (const int64_t size : shape) tuple += (tuple.empty() ? "" : ", ") + std::to_string(size);
    if (shape.size() == 1) tuple += ',';
    std::string dict = text("{'descr': '%s', 'fortran_order': False, 'shape': (%s), }",
                            name_of(type), tuple.c_str());
    const int64_t room = bytes - 10 - 1;
    if (static_cast<int64_t>(dict.size()) > room || room > 65534)
        failed("npy_header", text("needs more than %lld bytes", static_cast<long long>(bytes)));
    dict.resize(static_cast<size_t>(room), ' ');
    std::string header(kMagic, 6);
    header += std::string("\x01\x00", 2);
    header += static_cast<char>((room + 1) & 0xff);
    header += static_cast<char>((room + 1) >> 8);
    return header + dict + '\n';
}

void write_npy(const std::string& path, NpyType type, const std::vector<int64_t>& shape,
               const void* data) {
    NpyHeader header{type, shape};
    DurableFile file(path);
    const std::string head = npy_header(type, shape);
    file.write(head.data(), static_cast<int64_t>(head.size()));
    file.write(data, header.data_bytes());
    file.finish();
}

NpyArray read_npy(const std::string& path) {
    NpyArray array;
    array.file = MappedFile(path);
    array.header = parse_npy_header(array.file.data(), array.file.size(), path);
    array.data = array.file.data() + array.header.header_bytes;
    return array;
}

NpyAppender::NpyAppender(DurableFile& file, NpyType type)
    : file_(file), type_(type), begin_(file.size()) {
    const std::string head = npy_header(type_, {0});
    file_.write(head.data(), static_cast<int64_t>(head.size()));
}

void NpyAppender::append(const void* elements, int64_t count) {
    file_.write(elements, count * size_of(type_));
    count_ += count;
}

void NpyAppender::end() {
    const std::string head = npy_header(type_, {count_});
    file_.write_at(begin_, head.data(), static_cast<int64_t>(head.size()));
}

}  // namespace pith
