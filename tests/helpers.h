// helpers: folders of a test's own, and errors as text.
#pragma once
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "data/array_files.h"

namespace pith {

// An empty folder, of this process.
inline std::string fresh_folder(const std::string& name) {
  const std::string path = testing::TempDir() + "pith_" + name + "_" + std::to_string(getpid());
  std::filesystem::remove_all(path);
  std::filesystem::create_directories(path);
  return path;
}

// Writes a file, and the folder it is in.
inline void put(const std::string& path, const std::string& bytes) {
  std::filesystem::create_directories(std::filesystem::path(path).parent_path());
  std::ofstream(path, std::ios::binary) << bytes;
}

// Weights as a Hugging Face folder has them; bytes_of(tensor) is called in order.
void write_model_files(const std::string& folder, const std::vector<TensorDecl>& tensors,
    int64_t max_bytes, auto&& bytes_of) {
  const std::vector<Shard> shards = plan_shards(folder, tensors, max_bytes);
  for (const Shard& shard : shards) {
    DurableFile file(shard.path);
    write_header(file, shard.tensors);
    for (const TensorDecl& tensor : shard.tensors) file.write(bytes_of(tensor));
    file.finish();
  }
  write_index(folder, shards);
}

// What `action` fails with, which has this exit code; "no error" if it does not fail.
std::string error_of(int exit_code, auto&& action) {
  try {
    action();
  } catch (const Error& error) {
    EXPECT_EQ(error.exit_code, exit_code) << error.what();
    return error.what();
  }
  return "no error";
}
std::string error_of(auto&& action) { return error_of(kExitBadInput, action); }

inline void expect_part(const std::string& got, const std::string& part) {
  EXPECT_NE(got.find(part), std::string::npos) << "got:  " << got << "\nneed: " << part;
}
inline void expect_error(const std::string& got, const std::vector<std::string>& parts) {
  for (const std::string& part : parts) expect_part(got, part);
}

}  // namespace pith
