#include "data/durable.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>

namespace pith {

namespace fs = std::filesystem;

[[noreturn]] static void failed_call(const string& path, const char* what, int error) {
  string why = text("%s (%s)", what, strerror(error));
  if (error == ENOENT || error == ENOTDIR || error == EACCES || error == EROFS)
    bad_input(path, why, "another path, or its permissions");
  failed(path, why, error == ENOSPC || error == EDQUOT ? "free space there" : "another disk");
}

MappedFile::MappedFile(const string& path) : path_(path) {
  int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) bad_input(path, text("cannot be opened (%s)", strerror(errno)), "check the path");
  struct stat info = {};
  void* map = nullptr;
  bool is_file = fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
  auto size = size_t(info.st_size);
  if (is_file && size > 0) map = mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
  close(fd);
  if (!is_file || map == MAP_FAILED)
    bad_input(path, is_file ? "cannot be mapped" : "is not a file", "another file");
  size_ = info.st_size;
  if (map) map_ = {static_cast<char*>(map), [size](char* begin) { munmap(begin, size); }};
}

DurableFile::DurableFile(const string& path) : path_(path), temporary_(path + ".tmp") {
  fd_ = open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd_ < 0) failed_call(temporary_, "cannot be created", errno);
}

DurableFile::~DurableFile() {
  if (fd_ < 0) return;
  close(fd_);
  unlink(temporary_.c_str());
}

static void write_all(int fd, const string& path, const void* bytes, i64 size) {
  const char* next = static_cast<const char*>(bytes);
  for (const char* end = next + size; next < end;) {
    ssize_t n = write(fd, next, min<size_t>(end - next, 1 << 30));  // Linux: < 2 GiB
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) failed_call(path, "cannot be written", errno);
    next += n;
  }
}

static void flush(int fd, const string& path) {
  if (fsync(fd) != 0) failed_call(path, "cannot be flushed to disk", errno);
}

void DurableFile::write(const void* bytes, i64 size) {
  write_all(fd_, temporary_, bytes, size);
  size_ += size;
}

void DurableFile::write_begin(const string& bytes) {
  if (pwrite(fd_, bytes.data(), bytes.size(), 0) != ssize_t(bytes.size()))
    failed_call(temporary_, "cannot be written", errno);
}

void DurableFile::finish() {
  flush(fd_, temporary_);
  if (rename(temporary_.c_str(), path_.c_str()) != 0)
    failed_call(path_, "cannot be put in place", errno);
  close(fd_);
  fd_ = -1;
  sync_folder(folder_of(path_));
}

void write_file_durably(const string& path, const string& bytes) {
  DurableFile file(path);
  file.write(bytes);
  file.finish();
}

void make_folders(const string& path) {
  std::error_code error;
  fs::create_directories(path, error);
  if (error) failed_call(path, "cannot be created", error.value());
}

void sync_folder(const string& path) {
  int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) failed_call(path, "cannot be opened", errno);
  // Some network file systems cannot sync a folder.
  int error = fsync(fd) == 0 || errno == EINVAL || errno == ENOTSUP ? 0 : errno;
  close(fd);
  if (error) failed_call(path, "cannot be flushed to disk", error);
}

string folder_of(const string& path) {
  const fs::path folder = fs::path(path).parent_path();
  return folder.empty() ? "." : folder.string();
}

vector<string> find_files(const string& path, const string& except) {
  vector<fs::path> found;
  try {
    if (fs::is_regular_file(path)) return {path};
    std::error_code absent;
    for (fs::recursive_directory_iterator it(path), end; it != end; ++it) {
      bool hidden = it->path().filename().native().starts_with('.');
      if (hidden || (it->is_directory() && fs::equivalent(it->path(), except, absent)))
        it.disable_recursion_pending();
      else if (it->is_regular_file())
        found.push_back(it->path());
    }
  } catch (const fs::filesystem_error& error) {
    bad_input(path, "cannot be listed (" + error.code().message() + ")", "another file or folder");
  }
  std::ranges::sort(found);
  return {found.begin(), found.end()};
}

LockedFile::LockedFile(const string& path, int operation)
    : path_(path), fd_(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666)) {
  if (fd_ < 0) failed_call(path, "cannot be opened", errno);
  int error;
  do error = flock(fd_, operation) == 0 ? 0 : errno;
  while (error == EINTR);
  held = error == 0;
  if (!held && error != EWOULDBLOCK) failed_call(path, "cannot be locked", error);
}

LockedFile::~LockedFile() { close(fd_); }

void LockedFile::append(const void* bytes, i64 size) { write_all(fd_, path_, bytes, size); }

void LockedFile::replace(const string& bytes) {
  if (ftruncate(fd_, 0) != 0 || lseek(fd_, 0, SEEK_SET) != 0)
    failed_call(path_, "cannot be emptied", errno);
  append(bytes.data(), i64(bytes.size()));
  if (!bytes.empty()) flush(fd_, path_);
}

RunLock::RunLock(const string& folder)
    : file((make_folders(folder), folder + "/.lock"), LOCK_EX | LOCK_NB) {
  if (!file.held) bad_input(folder, "another run writes there", "another run.folder");
}

}
