#include "data/safetensors.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <numeric>

#include "core/check.h"
#include "core/json.h"

namespace pith {

static constexpr struct {
    const char* name;
    int64_t bytes;
} kDTypes[] = {{"F32", 4},     {"F64", 8}, {"F16", 2}, {"BF16", 2}, {"F8_E4M3", 1},
               {"F8_E5M2", 1}, {"I64", 8}, {"I32", 4}, {"I16", 2},  {"I8", 1},
               {"U64", 8},     {"U32", 4}, {"U16", 2}, {"U8", 1},   {"BOOL", 1}};
static constexpr int64_t kMaxHeader = 100 * 1000 * 1000;  // as the reference implementation
static const char* const kRefetch = "fetch or write the file again";

int64_t size_of(FileDType dtype) { return kDTypes[static_cast<int>(dtype)].bytes; }
const char* name_of(FileDType dtype) { return kDTypes[static_cast<int>(dtype)].name; }
bool is_float(FileDType dtype) { return dtype <= FileDType::F8_E5M2; }

std::string describe(const TensorEntry& tensor) {
    std::string shape;
    for (const int64_t size : tensor.shape)
        shape += (shape.empty() ? "" : ",") + std::to_string(size);
    return "[" + shape + "] " + name_of(tensor.dtype);
}

// ---- reading ----

// Bytes of a shape; -1 if they do not fit 63 bits.
static int64_t bytes_of(FileDType dtype, const std::vector<int64_t>& shape) {
    int64_t bytes = size_of(dtype);
    for (const int64_t size : shape)
        if (__builtin_mul_overflow(bytes, size, &bytes)) return -1;
    return bytes;
}

// One entry of the header. `data` and `size` are the file's data section.
static TensorEntry read_entry(const std::string& name, const Json& json, const char* data,
                              int64_t size) {
    TensorEntry tensor;
    tensor.name = name;
    const std::string dtype = json["dtype"].as_string();
    int index = 0;
    while (index < static_cast<int>(std::size(kDTypes)) && dtype != kDTypes[index].name) index++;
    if (index == static_cast<int>(std::size(kDTypes)))
        bad_input(json.place(), "has an unknown dtype (got \"" + dtype + "\", need F32, BF16, ...)",
                  "convert the tensor with the safetensors package");
    tensor.dtype = static_cast<FileDType>(index);
    for (int64_t i = 0; i < json["shape"].size(); i++)
        tensor.shape.push_back(json["shape"][i].as_int(0));
    const std::vector<int64_t> offsets = json["data_offsets"].as_ints();
    if (offsets.size() != 2 || offsets[0] < 0 || offsets[1] < offsets[0])
        bad_input(json.place(), "has bad data_offsets (need [begin, end])", kRefetch);
    const long long begin = offsets[0], end = offsets[1];
    if (end > size)
        bad_input(json.place(),
                  text("lies beyond the end of the file, which may be cut short "
                       "(got %lld bytes of data, need %lld)",
                       static_cast<long long>(size), end),
                  kRefetch);
    tensor.bytes = end - begin;
    tensor.data = data + begin;
    if (tensor.bytes != bytes_of(tensor.dtype, tensor.shape))
        bad_input(json.place(),
                  text("has a size that is not its shape's (got %lld bytes, need %lld for %s)",
                       end - begin, static_cast<long long>(bytes_of(tensor.dtype, tensor.shape)),
                       describe(tensor).c_str()),
                  kRefetch);
    return tensor;
}

void SafetensorsReader::open_file(const std::string& path) {
    const MappedFile file(path);
    uint64_t length = 0;
    if (file.size() >= 8) memcpy(&length, file.data(), 8);
    const int64_t room = std::min(file.size() - 8, kMaxHeader);
    if (file.size() < 8 || length < 2 || length > static_cast<uint64_t>(room))
        bad_input(path,
                  text("is no safetensors file or is cut short (got %lld bytes and a header length "
                       "of %llu, need a header of 2 to %lld bytes)",
                       static_cast<long long>(file.size()), static_cast<unsigned long long>(length),
                       static_cast<long long>(std::max<int64_t>(room, 2))),
                  kRefetch);
    const int64_t header = static_cast<int64_t>(length);
    const Json json = Json::parse(std::string(file.data() + 8, length), path);
    const char* data = file.data() + 8 + header;
    const int64_t size = file.size() - 8 - header;
    const size_t first = tensors_.size();
    for (const std::string& name : json.keys()) {
        if (name == "__metadata__") {
            for (const std::string& key : json[name].keys())
                metadata_.emplace_back(key, json[name][key].as_string());
            continue;
        }
        tensors_.push_back(read_entry(name, json[name], data, size));
        tensors_.back().file = static_cast<int>(files_.size());
    }
    std::sort(tensors_.begin() + static_cast<int64_t>(first), tensors_.end(),
              [](const TensorEntry& a, const TensorEntry& b) {
                  return a.data != b.data ? a.data < b.data : a.bytes < b.bytes;
              });
    const char* end = data;
    for (size_t i = first; i < tensors_.size(); i++) {
        const TensorEntry& tensor = tensors_[i];
        if (tensor.data != end)
            bad_input(
                path + ": " + tensor.name,
                text("%s (got begin %lld, need %lld)",
                     tensor.data < end ? "overlaps the tensor before it" : "leaves a gap before it",
                     static_cast<long long>(tensor.data - data),
                     static_cast<long long>(end - data)),
                kRefetch);
        end += tensor.bytes;
    }
    if (end != data + size)
        bad_input(path,
                  text("has bytes behind its last tensor (got %lld bytes of data, need %lld)",
                       static_cast<long long>(size), static_cast<long long>(end - data)),
                  kRefetch);
    files_.push_back(file);
}

void SafetensorsReader::open_index(const std::string& folder, const std::string& index_path) {
    const Json index = Json::parse_file(index_path);
    const Json weights = index["weight_map"];
    std::map<std::string, std::string> shard_of;
    std::vector<std::string> shards;
    for (const std::string& name : weights.keys()) {
        const std::string shard = weights[name].as_string();
        if (shard.find('/') != std::string::npos || shard.empty())
            bad_input(weights[name].place(), "is not a file name (got \"" + shard + "\")",
                      kRefetch);
        shard_of[name] = shard;
        shards.push_back(shard);
    }
    std::sort(shards.begin(), shards.end());
    shards.erase(std::unique(shards.begin(), shards.end()), shards.end());
    if (shards.empty()) bad_input(index_path, "lists no tensors", kRefetch);
    for (const std::string& shard : shards) {
        const std::string path = folder + "/" + shard;
        if (access(path.c_str(), F_OK) != 0)
            bad_input(path, "is missing, but the index names it", "fetch the missing shard");
        open_file(path);
    }
    for (const TensorEntry& tensor : tensors_) {
        const auto listed = shard_of.find(tensor.name);
        const std::string path = files_[static_cast<size_t>(tensor.file)].path();
        if (listed == shard_of.end() || folder + "/" + listed->second != path)
            bad_input(path + ": " + tensor.name,
                      "is not where the index says (got this shard, need " +
                          (listed == shard_of.end() ? std::string("none") : listed->second) + ")",
                      "fetch index and shards again, from one version");
        shard_of.erase(listed);
    }
    if (!shard_of.empty())
        bad_input(folder + "/" + shard_of.begin()->second + ": " + shard_of.begin()->first,
                  "is missing, but the index says it is here",
                  "fetch index and shards again, from one version");
}

void SafetensorsReader::index_names() {
    by_name_.resize(tensors_.size());
    std::iota(by_name_.begin(), by_name_.end(), 0);
    std::sort(by_name_.begin(), by_name_.end(),
              [&](int a, int b) { return tensors_[a].name < tensors_[b].name; });
}

SafetensorsReader::SafetensorsReader(const std::string& path) : path_(path) {
    while (path_.size() > 1 && path_.back() == '/') path_.pop_back();
    const std::string single = path_ + "/model.safetensors";
    const std::string index = path_ + "/model.safetensors.index.json";
    if (access((path_ + "/.").c_str(), F_OK) != 0) {
        open_file(path_);
    } else if (access(single.c_str(), F_OK) == 0) {
        open_file(single);
    } else if (access(index.c_str(), F_OK) == 0) {
        open_index(path_, index);
    } else {
        bad_input(path_, "has no weights (need model.safetensors or model.safetensors.index.json)",
                  "name a folder in Hugging Face layout");
    }
    index_names();
}

const TensorEntry* SafetensorsReader::find(std::string_view name) const {
    const auto at =
        std::lower_bound(by_name_.begin(), by_name_.end(), name,
                         [&](int i, std::string_view n) { return tensors_[i].name < n; });
    return at != by_name_.end() && tensors_[*at].name == name ? &tensors_[*at] : nullptr;
}

const TensorEntry& SafetensorsReader::at(const std::string& name) const {
    const TensorEntry* tensor = find(name);
    if (!tensor)
        bad_input(path_ + ": " + name, text("is missing (got %zu other tensors)", tensors_.size()),
                  "check that the weights belong to this model's config.json");
    return *tensor;
}

std::string SafetensorsReader::place(const TensorEntry& tensor) const {
    return files_[static_cast<size_t>(tensor.file)].path() + ": " + tensor.name;
}

std::string SafetensorsReader::metadata(const std::string& key) const {
    for (const auto& [name, value] : metadata_)
        if (name == key) return value;
    return "";
}

// ---- writing ----

int64_t TensorDecl::bytes() const { return bytes_of(dtype, shape); }

SafetensorsWriter::SafetensorsWriter(const std::string& path,
                                     const std::vector<TensorDecl>& tensors,
                                     const Metadata& metadata)
    : file_(path) {
    JsonWriter json;
    json.object().key("__metadata__").object().key("format").value("pt");
    for (const auto& [key, value] : metadata) json.key(key).value(value);
    json.end();
    int64_t end = 0;
    for (const TensorDecl& tensor : tensors) {
        json.key(tensor.name).object().key("dtype").value(name_of(tensor.dtype));
        json.key("shape").array();
        for (const int64_t size : tensor.shape) json.value(size);
        json.end().key("data_offsets").array().value(end).value(end + tensor.bytes()).end().end();
        end += tensor.bytes();
    }
    std::string header = json.end().str();
    header.resize((header.size() + 7) / 8 * 8, ' ');  // so that the data are aligned
    if (static_cast<int64_t>(header.size()) > kMaxHeader)
        failed(path, "has too many tensors for one safetensors file");
    const uint64_t length = header.size();
    file_.write(&length, 8);
    file_.write(header.data(), static_cast<int64_t>(header.size()));
    total_bytes_ = file_.size() + end;
}

void SafetensorsWriter::write(const void* bytes, int64_t size) {
    if (size > bytes_left())
        failed(file_.path(),
               text("was given more bytes than declared (got %lld, need %lld)",
                    static_cast<long long>(size), static_cast<long long>(bytes_left())));
    file_.write(bytes, size);
}

void SafetensorsWriter::finish() {
    if (bytes_left() != 0)
        failed(file_.path(), text("was finished %lld bytes short of the declared tensors",
                                  static_cast<long long>(bytes_left())));
    file_.finish();
}

ShardedWriter::ShardedWriter(const std::string& folder, std::vector<TensorDecl> tensors,
                             int64_t max_shard_bytes)
    : folder_(folder), tensors_(std::move(tensors)) {
    int64_t filled = 0;
    for (size_t i = 0; i < tensors_.size(); i++) {
        if (i == 0 || filled + tensors_[i].bytes() > max_shard_bytes) {
            first_.push_back(static_cast<int>(i));
            filled = 0;
        }
        filled += tensors_[i].bytes();
    }
    if (first_.empty()) failed(folder, "cannot hold a model without tensors");
    first_.push_back(static_cast<int>(tensors_.size()));
    make_folders(folder_);
    open_next();
}

ShardedWriter::~ShardedWriter() {
    delete writer_;
    if (finished_) return;
    for (int i = 0; i < shard_; i++) unlink((folder_ + "/" + shard_name(i)).c_str());
}

std::string ShardedWriter::shard_name(int shard) const {
    if (num_shards() == 1) return "model.safetensors";
    return text("model-%05d-of-%05d.safetensors", shard + 1, num_shards());
}

void ShardedWriter::open_next() {
    shard_++;
    const auto begin = tensors_.begin() + first_[static_cast<size_t>(shard_)];
    const auto end = tensors_.begin() + first_[static_cast<size_t>(shard_) + 1];
    writer_ = new SafetensorsWriter(folder_ + "/" + shard_name(shard_), {begin, end});
}

void ShardedWriter::write(const void* bytes, int64_t size) {
    const char* next = static_cast<const char*>(bytes);
    while (size > 0) {
        if (writer_->bytes_left() == 0) {
            if (shard_ + 1 == num_shards()) break;
            writer_->finish();
            delete writer_;
            writer_ = nullptr;
            open_next();
        }
        const int64_t piece = std::min(size, writer_->bytes_left());
        writer_->write(next, piece);
        next += piece;
        size -= piece;
    }
    if (size > 0) writer_->write(next, size);  // more than was declared: refused there
}

void ShardedWriter::write_index() const {
    JsonWriter json(2);
    int64_t total = 0;
    for (const TensorDecl& tensor : tensors_) total += tensor.bytes();
    json.object().key("metadata").object().key("total_size").value(total).end();
    json.key("weight_map").object();
    for (int shard = 0; shard < num_shards(); shard++)
        for (int i = first_[static_cast<size_t>(shard)]; i < first_[static_cast<size_t>(shard) + 1];
             i++)
            json.key(tensors_[static_cast<size_t>(i)].name).value(shard_name(shard));
    write_file_durably(folder_ + "/model.safetensors.index.json", json.end().end().str() + "\n");
}

void ShardedWriter::finish() {
    if (shard_ + 1 < num_shards())
        failed(folder_, text("was finished at shard %d of %d", shard_ + 1, num_shards()));
    writer_->finish();
    shard_++;  // the last shard too is in place, and removed should the index fail
    if (num_shards() > 1) write_index();
    finished_ = true;
}

// ---- conversion ----

template <class T>
static T load(const void* src, int64_t i) {
    T value;
    memcpy(&value, static_cast<const char*>(src) + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    return value;
}

static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// IEEE half: its exponent and mantissa, placed as a float's, are 2^112 too small.
static float from_half(uint32_t half) {
    const bool top = (half & 0x7c00) == 0x7c00;  // Inf or NaN
    const float size = from_bits((half & 0x7fff) << 13 | (top ? 0x7f800000u : 0)) * 0x1p112f;
    return half & 0x8000 ? -size : size;
}

// An 8-bit float of 5 exponent bits with IEEE's Inf and NaN (E5M2), or of 4 with NaN only where all
// of them and the mantissa are set (E4M3; Micikevicius et al. 2022, arXiv:2209.05433, table 1).
static float from_f8(uint32_t bits, bool e5m2) {
    const int mantissa_bits = e5m2 ? 2 : 3, top = e5m2 ? 31 : 15;
    const int exponent = static_cast<int>(bits & 0x7f) >> mantissa_bits;
    const int mantissa = static_cast<int>(bits) & ((1 << mantissa_bits) - 1);
    const int whole = exponent ? mantissa + (1 << mantissa_bits) : mantissa;
    float size =
        std::ldexp(static_cast<float>(whole), std::max(exponent, 1) - top / 2 - mantissa_bits);
    if (exponent == top && e5m2) size = mantissa ? NAN : INFINITY;
    if (exponent == top && !e5m2 && mantissa == 7) size = NAN;
    return bits & 0x80 ? -size : size;
}

void to_f32(FileDType dtype, const void* src, float* dst, int64_t n) {
    float table[256];
    if (dtype == FileDType::F8_E4M3 || dtype == FileDType::F8_E5M2)
        for (uint32_t i = 0; i < 256; i++) table[i] = from_f8(i, dtype == FileDType::F8_E5M2);
    switch (dtype) {
        case FileDType::F32: memcpy(dst, src, static_cast<size_t>(n) * 4); break;
        case FileDType::F64:
            for (int64_t i = 0; i < n; i++) dst[i] = static_cast<float>(load<double>(src, i));
            break;
        case FileDType::BF16:
            for (int64_t i = 0; i < n; i++)
                dst[i] = from_bits(uint32_t{load<uint16_t>(src, i)} << 16);
            break;
        case FileDType::F16:
            for (int64_t i = 0; i < n; i++) dst[i] = from_half(load<uint16_t>(src, i));
            break;
        case FileDType::F8_E4M3:
        case FileDType::F8_E5M2:
            for (int64_t i = 0; i < n; i++) dst[i] = table[load<uint8_t>(src, i)];
            break;
        default: failed("to_f32", std::string("cannot convert ") + name_of(dtype) + " to F32");
    }
}

void f32_to_bf16(const float* src, uint16_t* dst, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = load<uint32_t>(src, i);
        const bool nan = (bits & 0x7fffffff) > 0x7f800000;
        const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
        dst[i] = static_cast<uint16_t>(nan ? bits >> 16 | 0x40 : rounded >> 16);
    }
}

void from_f32(FileDType dtype, const float* src, void* dst, int64_t n) {
    switch (dtype) {
        case FileDType::F32: memcpy(dst, src, static_cast<size_t>(n) * 4); break;
        case FileDType::BF16: f32_to_bf16(src, static_cast<uint16_t*>(dst), n); break;
        default: failed("from_f32", std::string("cannot write ") + name_of(dtype));
    }
}

}  // namespace pith
