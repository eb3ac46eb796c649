#include "data/array_files.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "core/check.h"
#include "core/json.h"
#include "helpers.h"

namespace pith {

namespace fs = std::filesystem;

static std::string header_v(int version, const std::string& dict) {
  std::string bytes = std::string("\x93NUMPY") + static_cast<char>(version) + '\0';
  for (int i = 0; i < (version == 1 ? 2 : 4); i++)
    bytes += static_cast<char>(dict.size() >> 8 * i & 0xff);
  return bytes + dict;
}

TEST(Npy, RoundTripsEveryTypeAndRank) {
  const std::string path = fresh_folder("npy") + "/a.npy";
  const std::vector<int64_t> shapes[] = {{}, {0}, {5}, {3, 4}, {2, 0, 3}, {2, 3, 4}};
  for (const FileDType type : {FileDType::U16, FileDType::U32, FileDType::U64, FileDType::I32,
           FileDType::F32, FileDType::BOOL})
    for (const auto& shape : shapes) {
      const TensorDecl want{"", type, shape};
      std::string data(static_cast<size_t>(want.bytes()), 0);
      for (size_t i = 0; i < data.size(); i++) data[i] = static_cast<char>(i * 7 + shape.size());
      write_npy(path, type, shape, data.data());
      const NpyArray got = read_npy(path);
      EXPECT_EQ(got.header.dtype, type);
      EXPECT_EQ(got.header.shape, shape);
      EXPECT_EQ(got.header.header_bytes % 64, 0);
      EXPECT_EQ(std::string(got.data, data.size()), data) << name_of(type);
      EXPECT_FALSE(fs::exists(path + ".tmp"));
    }
}

TEST(Npy, ReadsHeadersOfOthers) {
  struct {
    int version;
    const char* dict;
    std::vector<int64_t> shape;
    FileDType type;
  } cases[] = {
      {1, "{'descr': '<u2', 'fortran_order': False, 'shape': (3,), }\n", {3}, FileDType::U16},
      {1, "{'descr': '<u4', 'fortran_order': False, 'shape': (2, 3), }  \n", {2, 3},
          FileDType::U32},
      {1, "{'descr': '<f4', 'fortran_order': False, 'shape': (), }  \n", {}, FileDType::F32},
      {1, "{'descr': '<i4', 'fortran_order': False, 'shape': (2,), }", {2}, FileDType::I32},
      {1, "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2, 3), }", {1, 2, 3},
          FileDType::F32},
  };
  for (const auto& c : cases) {
    const std::string head = header_v(c.version, c.dict);
    const std::string bytes = head + std::string(64, 'x');
    const NpyHeader got =
        parse_npy_header(bytes.data(), static_cast<int64_t>(bytes.size()), "f.npy");
    EXPECT_EQ(got.shape, c.shape) << c.dict;
    EXPECT_EQ(got.dtype, c.type) << c.dict;
    EXPECT_EQ(got.header_bytes, static_cast<int64_t>(head.size())) << c.dict;
  }
}

TEST(Npy, RefusesBadHeadersByName) {
  const std::string data(64, 'x');
  struct {
    std::string bytes;
    const char* error;
  } cases[] = {
      {"", "f.npy: is not an NPY array, or is cut short (got 0 bytes"},
      {"not an array at all", "f.npy: is not an NPY array"},
      {header_v(9, "{}"), "f.npy: has an unknown NPY version (got 9"},
      {header_v(1, "{'descr': '<u2'"),
          "f.npy: has a header that numpy does not write for an array in C order"},
      {header_v(1, "{'descr': '<u2', 'shape': (1,)}") + data,
          "f.npy: has a header that numpy does not write for an array in C order"},
      {header_v(1, "{'descr': '>u2', 'fortran_order': False, 'shape': (1,)}") + data,
          "has an unknown dtype (got \">u2\""},
      {header_v(1, "{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (1,)}") + data,
          "f.npy: has a header that numpy does not write for an array in C order"},
      {header_v(1, "{'descr': '<u2', 'fortran_order': True, 'shape': (2, 2)}") + data,
          "f.npy: has a header that numpy does not write for an array in C order"},
      {header_v(1, "{'descr': '<u2', 'fortran_order': False, 'shape': (2, -2)}") + data,
          "f.npy: has a bad shape (got {"},
      {header_v(1, "{'descr': '<u2', 'fortran_order': False, 'shape': (4611686018427387904, 4)}"),
          "has a shape that is too large"},
      {header_v(1, "{'descr': '<u8', 'fortran_order': False, 'shape': (9,)}") + data,
          "is cut short (got 64 bytes of data, need 72)"},
  };
  for (const auto& c : cases) {
    const std::string got = error_of(kExitBadInput,
        [&] { parse_npy_header(c.bytes.data(), static_cast<int64_t>(c.bytes.size()), "f.npy"); });
    EXPECT_NE(got.find(c.error), std::string::npos) << "got: " << got << "\nneed: " << c.error;
  }
}

TEST(Npy, EveryTruncationIsRefused) {
  const std::string folder = fresh_folder("npy_cut"), path = folder + "/a.npy";
  const uint16_t ids[3] = {1, 2, 3};
  write_npy(path, FileDType::U16, {3}, ids);
  const std::string whole = read_text_file(path);
  for (size_t n = 0; n < whole.size(); n++) {
    std::ofstream(path, std::ios::binary) << whole.substr(0, n);
    const std::string got = error_of(kExitBadInput, [&] { read_npy(path); });
    EXPECT_EQ(got.find(path + ": "), 0u) << n << " bytes: " << got;
  }
}

TEST(Npy, ArraysMayLieBackToBack) {
  const std::string path = fresh_folder("npy_append") + "/a.bin";
  const uint16_t ids[] = {1, 2, 3, 4, 5};
  const uint64_t ends[] = {2, 5};
  {
    DurableFile file(path);
    file.write(npy_header(FileDType::U16, {5}).data(), 128);
    file.write(ids, 4);
    file.write(ids + 2, 6);
    file.write(npy_header(FileDType::U64, {2}).data(), 128);
    file.write(ends, sizeof ends);
    file.finish();
  }
  const NpyArray first = read_npy(path);
  EXPECT_EQ(first.header.shape, std::vector<int64_t>{5});
  EXPECT_EQ(memcmp(first.data, ids, sizeof ids), 0);
  const char* rest = first.data + first.header.bytes();
  const NpyHeader second =
      parse_npy_header(rest, first.file.data() + first.file.size() - rest, path);
  EXPECT_EQ(second.shape, std::vector<int64_t>{2});
  EXPECT_EQ(memcmp(rest + second.header_bytes, ends, sizeof ends), 0);
}

TEST(Durable, UnfinishedLeavesNothing) {
  const std::string folder = fresh_folder("durable"), path = folder + "/a";
  write_file_durably(path, "old");
  {
    DurableFile file(path);
    file.write("new", 3);
    EXPECT_TRUE(fs::exists(path + ".tmp"));
  }
  EXPECT_FALSE(fs::exists(path + ".tmp"));
  EXPECT_EQ(read_text_file(path), "old");
  write_file_durably(path, "newer");
  EXPECT_EQ(read_text_file(path), "newer");
}

TEST(Durable, ErrorsNamePathAndReason) {
  EXPECT_NE(error_of(kExitBadInput, [] { write_file_durably("/no/such/folder/a", "x"); })
                .find("/no/such/folder/a.tmp: cannot be created (No such file or directory)"),
      std::string::npos);
  const std::string folder = fresh_folder("durable_full");
  write_file_durably(folder + "/file", "x");
  EXPECT_NE(error_of(kExitBadInput, [&] { make_folders(folder + "/file/below"); })
                .find("/file/below: cannot be created (Not a directory)"),
      std::string::npos);
  EXPECT_NE(error_of(kExitBadInput, [&] { MappedFile map(folder); }).find("is not a file"),
      std::string::npos);
  EXPECT_NE(error_of(kExitBadInput, [&] { MappedFile map(folder + "/none"); })
                .find("/none: cannot be opened (No such file or directory)"),
      std::string::npos);

  // A limit on the size of files stands in for a full disk.
  signal(SIGXFSZ, SIG_IGN);
  rlimit old;
  getrlimit(RLIMIT_FSIZE, &old);
  const rlimit small{1000, old.rlim_max};
  setrlimit(RLIMIT_FSIZE, &small);
  const std::string got =
      error_of(kExitFailed, [&] { write_file_durably(folder + "/file", std::string(5000, 'y')); });
  setrlimit(RLIMIT_FSIZE, &old);
  EXPECT_NE(got.find("/file.tmp: cannot be written (File too large)"), std::string::npos) << got;
  EXPECT_EQ(read_text_file(folder + "/file"), "x");
  EXPECT_FALSE(fs::exists(folder + "/file.tmp"));
}

}  // namespace pith
