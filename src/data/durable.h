#pragma once
#include <memory>

#include "core/check.h"

namespace pith {

// Read-only; copies share the mapping. Exit code 2 if it cannot be read.
class MappedFile {
 public:
  MappedFile() = default;
  explicit MappedFile(const string& path);
  const string& path() const { return path_; }
  const char* data() const { return map_.get(); }  // null when empty
  i64 size() const { return size_; }

 private:
  string path_;
  i64 size_ = 0;
  std::shared_ptr<const char> map_;
};

// Written under PATH.tmp, which finish() moves to PATH once on disk; else the destructor removes
// it. Failing system calls, here and below, are exit code 1.
class DurableFile {
 public:
  explicit DurableFile(const string& path);
  DurableFile(const DurableFile&) = delete;
  ~DurableFile();
  void write(const void* bytes, i64 size);
  void write(const auto& all) { write(all.data(), i64(all.size() * sizeof all[0])); }
  void write_begin(const string& bytes);  // over the first ones
  void finish();
  i64 size() const { return size_; }
  const string& path() const { return path_; }

 private:
  string path_, temporary_;
  int fd_ = -1;
  i64 size_ = 0;
};

void write_file_durably(const string& path, const string& bytes);
void make_folders(const string& path);
// Makes renames and removals inside the folder durable.
void sync_folder(const string& path);
// "b.txt" -> ".".
string folder_of(const string& path);

// `path`, or the files below it in path order, not hidden nor in linked folders or `except`.
vector<string> find_files(const string& path, const string& except = "");

// A file, made where missing, with flock()'s lock until the process ends.
class LockedFile {
 public:
  LockedFile(const string& path, int operation);
  LockedFile(const LockedFile&) = delete;
  ~LockedFile();
  void append(const void* bytes, i64 size);
  void replace(const string& bytes);  // on disk, unless empty
  bool held = false;                  // false: by another, where `operation` does not wait

 private:
  string path_;
  int fd_;
};

// Holds FOLDER/.lock. Exit code 2 if it is taken.
struct RunLock {
  explicit RunLock(const string& folder);
  LockedFile file;
};

}
