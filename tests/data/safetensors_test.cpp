#include "data/array_files.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "core/check.h"
#include "core/json.h"
#include "helpers.h"

namespace pith {

namespace fs = std::filesystem;

static void write_raw(const std::string& path, const std::string& header, size_t data_bytes) {
  const uint64_t length = header.size();
  std::ofstream out(path, std::ios::binary);
  out.write(reinterpret_cast<const char*>(&length), 8);
  out << header << std::string(data_bytes, '\1');
}

static std::string pattern(int64_t bytes, int seed) {
  std::string data(static_cast<size_t>(bytes), 0);
  for (size_t i = 0; i < data.size(); i++) data[i] = static_cast<char>(i * 31 + 7 * seed);
  return data;
}

static const std::vector<TensorDecl> kTensors = {
    {"b.weight", FileDType::F32, {3, 5}},
    {"a.weight", FileDType::BF16, {4}},
    {"empty", FileDType::F32, {0, 7}},
    {"scalar", FileDType::F32, {}},
    {"bytes", FileDType::U8, {3}},
    {"odd", FileDType::I64, {2}},
};

TEST(Safetensors, RoundTripsInAnyChunking) {
  const std::string path = fresh_folder("st") + "/a.safetensors";
  std::string all;
  for (size_t i = 0; i < kTensors.size(); i++) all += pattern(kTensors[i].bytes(), int(i));
  for (const size_t chunk : {size_t{1}, size_t{7}, all.size()}) {
    DurableFile file(path);
    write_header(file, kTensors);
    for (size_t at = 0; at < all.size(); at += chunk)
      file.write(all.data() + at, int64_t(std::min(chunk, all.size() - at)));
    file.finish();
    const Safetensors all_read = open_safetensors(path);
    ASSERT_EQ(all_read.tensors.size(), kTensors.size());
    EXPECT_NE(read_text_file(path).find(R"({"format": "pt"})"), std::string::npos);
    for (size_t i = 0; i < kTensors.size(); i++) {
      const TensorEntry& got = all_read.tensors.at(kTensors[i].name);
      EXPECT_EQ(got.dtype, kTensors[i].dtype);
      EXPECT_EQ(got.shape, kTensors[i].shape);
      EXPECT_EQ(std::string(got.data, size_t(got.bytes())), pattern(kTensors[i].bytes(), int(i)));
    }
  }
}

TEST(Safetensors, RefusesCorruptHeadersByName) {
  const std::string path = fresh_folder("st_bad") + "/a.safetensors";
  const std::string ok = R"("a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]})";
  struct {
    std::string header;
    size_t data_bytes;
    const char* error;
  } cases[] = {
      {"{" + ok + "}", 8, "no error"},
      {"{" + ok + "}  ", 8, "no error"},
      {"{" + ok + "}", 7,
          "a: has bad data_offsets, or the file is cut short (got [0,8], need 8 bytes for [2] "
          "F32 from 0 on, up to 7)"},
      {"{" + ok + "}", 9, "has bytes behind its last tensor (got 9 bytes of data, need 8)"},
      {"{" + ok + R"(,"b":{"dtype":"U8","shape":[8],"data_offsets":[4,12]}})", 12,
          "b: has bad data_offsets, or the file is cut short (got [4,12], need 8 bytes for [8] U8 "
          "from 8 on"},
      {"{" + ok + R"(,"b":{"dtype":"U8","shape":[8],"data_offsets":[9,17]}})", 17,
          "b: has bad data_offsets, or the file is cut short (got [9,17], need 8 bytes for [8] U8 "
          "from 8 on"},
      {R"({"a":{"dtype":"F31","shape":[2],"data_offsets":[0,8]}})", 8,
          "a: has an unknown dtype (got \"F31\""},
      {R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", 8,
          "a: has bad data_offsets, or the file is cut short (got [0,8], need 12 bytes for [3] F32 "
          "from 0 on"},
      {R"({"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})", 8, "a.shape[0]: is out of"},
      {R"({"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}})", 8,
          "a: has bad data_offsets"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})", 8, "a: has bad data_offsets"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,9]}})", 8, "bad data_offsets"},
      {R"({"a":{"dtype":"F32","shape":[2]}})", 8, "a.data_offsets: is missing"},
      {R"({"a":{"dtype":4,"shape":[2],"data_offsets":[0,8]}})", 8, "a.dtype: is a number"},
      {R"([1, 2])", 8, "is an array"},
      {R"({"a":)", 8, "is not valid JSON"},
  };
  for (const auto& c : cases) {
    write_raw(path, c.header, c.data_bytes);
    const std::string got = error_of(kExitBadInput, [&] { open_safetensors(path); });
    expect_part(got, c.error);
    EXPECT_TRUE(got == "no error" || got.find(path) == 0) << got;
  }
  for (const uint64_t length : {uint64_t{0}, uint64_t{1} << 62, ~uint64_t{0}, uint64_t{9}}) {
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(&length), 8)
        .write("{}      ", 8);
    expect_part(error_of(kExitBadInput, [&] { open_safetensors(path); }),
        "is no safetensors file or is cut short (got 16 bytes");
  }
}

TEST(Safetensors, EveryTruncationIsRefused) {
  const std::string path = fresh_folder("st_cut") + "/a.safetensors";
  DurableFile file(path);
  write_header(file, kTensors);
  for (const TensorDecl& tensor : kTensors) file.write(pattern(tensor.bytes(), 1));
  file.finish();
  const std::string whole = read_text_file(path);
  for (size_t n = 0; n < whole.size(); n++) {
    std::ofstream(path, std::ios::binary) << whole.substr(0, n);
    const std::string got = error_of(kExitBadInput, [&] { open_safetensors(path); });
    EXPECT_EQ(got.find(path), 0u) << n << " bytes: " << got;
  }
}

// Eight tensors of 10 to 80 F32s.
static std::vector<TensorDecl> eight() {
  std::vector<TensorDecl> tensors;
  for (int i = 1; i <= 8; i++)
    tensors.push_back({"layers." + std::to_string(i), FileDType::F32, {10 * i}});
  return tensors;
}

static void write_shards(const std::string& folder, int64_t max_bytes) {
  int i = 0;
  write_model_files(folder, eight(), max_bytes,
      [&](const TensorDecl& tensor) { return pattern(tensor.bytes(), ++i); });
}

TEST(Safetensors, ShardsHoldEveryTensorOnce) {
  struct {
    int64_t max_bytes;
    int shards;
  } cases[] = {{100000, 1}, {1440, 1}, {1439, 2}, {400, 5}, {1, 8}};
  for (const auto& c : cases) {
    const std::string folder = fresh_folder("st_shards");
    write_shards(folder, c.max_bytes);
    const Safetensors reader = open_safetensors(folder);
    EXPECT_EQ(int(reader.files.size()), c.shards) << c.max_bytes;
    EXPECT_EQ(fs::exists(folder + "/model.safetensors.index.json"), c.shards > 1);
    for (int i = 1; i <= 8; i++) {
      const TensorEntry& tensor = reader.tensors.at("layers." + std::to_string(i));
      EXPECT_EQ(std::string(tensor.data, size_t(tensor.bytes())), pattern(40 * i, i));
    }
    if (c.shards == 1) continue;
    const Json index = Json::parse_file(folder + "/model.safetensors.index.json");
    EXPECT_EQ(index["metadata"]["total_size"].as_int(), 1440);
    EXPECT_EQ(index["weight_map"]["layers.1"].as_string(),
        text("model-00001-of-%05d.safetensors", c.shards));
  }
}

TEST(Safetensors, IndexAndShardsMustAgree) {
  const auto broken = [](const char* name, auto&& breaking) {
    const std::string folder = fresh_folder(name);
    write_shards(folder, 400);
    breaking(folder);
    return error_of(kExitBadInput, [&] { open_safetensors(folder); });
  };
  const std::string index = "/model.safetensors.index.json";
  expect_part(
      broken("st_missing",
          [](const std::string& f) { fs::remove(f + "/model-00002-of-00005.safetensors"); }),
      "/model-00002-of-00005.safetensors: cannot be opened (No such file or directory)");
  expect_part(broken("st_twice",
                  [&](const std::string& f) {
                    fs::copy_file(f + "/model-00001-of-00005.safetensors",
                        f + "/model-00002-of-00005.safetensors",
                        fs::copy_options::overwrite_existing);
                  }),
      "/model-00002-of-00005.safetensors: layers.1: is in two shards");
  expect_part(broken("st_none", [&](const std::string& f) { fs::remove(f + index); }),
      "has no weights (need model.safetensors or");
}

TEST(Safetensors, ConvertsFloats) {
  struct {
    FileDType dtype;
    uint64_t bits;
    float value;
  } cases[] = {
      {FileDType::BF16, 0x3f80, 1},
      {FileDType::BF16, 0xc040, -3},
      {FileDType::BF16, 0x7f80, INFINITY},
      {FileDType::BF16, 0x7fc0, NAN},
      {FileDType::F32, 0xbf800000, -1},
      {FileDType::F64, 0x3ff8000000000000, 1.5},
  };
  for (const auto& c : cases) {
    char unaligned[9];
    memcpy(unaligned + 1, &c.bits, 8);
    float got = 0;
    to_f32(c.dtype, unaligned + 1, &got, 1);
    if (std::isnan(c.value))
      EXPECT_TRUE(std::isnan(got)) << name_of(c.dtype) << " " << c.bits << " " << got;
    else
      EXPECT_EQ(got, c.value) << name_of(c.dtype) << " " << c.bits;
  }
  float out;
  for (const FileDType other : {FileDType::F16, FileDType::I32, FileDType::F8_E4M3}) {
    EXPECT_FALSE(is_float(other));
    EXPECT_THROW(to_f32(other, &out, &out, 1), Error);
  }
}

TEST(Safetensors, RoundsToNearestEvenBf16) {
  struct {
    uint32_t bits;
    uint16_t want;
  } cases[] = {
      {0x3f800000, 0x3f80},
      {0x3f807fff, 0x3f80},
      {0x3f808000, 0x3f80},
      {0x3f808001, 0x3f81},
      {0x3f818000, 0x3f82},
      {0xbf818000, 0xbf82},
      {0x7f7fffff, 0x7f80},
      {0x7f800000, 0x7f80},
      {0x00000001, 0x0000},
      {0x80000000, 0x8000},
      {0x7f800001, 0x7fc0},
      {0xffffffff, 0xffff},
  };
  for (const auto& c : cases) {
    float value;
    memcpy(&value, &c.bits, 4);
    uint16_t got;
    from_f32(FileDType::BF16, &value, &got, 1);
    EXPECT_EQ(got, c.want) << std::hex << c.bits;
  }
  for (uint32_t i = 0; i < 65536; i++) {  // every bf16 survives
    const uint16_t bits = uint16_t(i);
    float wide;
    uint16_t back;
    to_f32(FileDType::BF16, &bits, &wide, 1);
    from_f32(FileDType::BF16, &wide, &back, 1);
    ASSERT_TRUE(std::isnan(wide) || back == bits) << bits << " " << back;
  }
}

}  // namespace pith
