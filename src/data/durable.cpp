#include "data/durable.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "core/check.h"

namespace pith {

namespace fs = std::filesystem;

[[noreturn]] static void failed_call(const string& path, const char* what, int error) {
  failed(path, string(what) + " (" + strerror(error) + ")",
         error == ENOSPC || error == EDQUOT ? "free space on that disk"
                                            : "check the path and its permissions");
}

MappedFile::MappedFile(const string& path) : path_(path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) bad_input(path, text("cannot be opened (%s)", strerror(errno)), "check the path");
  struct stat info = {};
  void* map = nullptr;
  const bool is_file = fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
  if (is_file && info.st_size > 0)
    map = mmap(nullptr, size_t(info.st_size), PROT_READ, MAP_SHARED, fd, 0);
  close(fd);
  if (!is_file) bad_input(path, "is not a file (got a folder or device)", "name a file");
  if (map == MAP_FAILED) bad_input(path, "cannot be mapped", "check the memory limits");
  size_ = info.st_size;
  if (map)
    map_ = {static_cast<const char*>(map),
            [map, size = info.st_size](const char*) { munmap(map, size_t(size)); }};
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

void DurableFile::write(const void* bytes, int64_t size) {
  const char* next = static_cast<const char*>(bytes);
  for (const char* end = next + size; next < end;) {
    // Linux writes at most 2^31 - 4096 bytes a call.
    const ssize_t n = ::write(fd_, next, std::min<size_t>(end - next, 1 << 30));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) failed_call(temporary_, "cannot be written", errno);
    next += n;
    size_ += n;
  }
}

void DurableFile::finish() {
  if (fsync(fd_) != 0) failed_call(temporary_, "cannot be flushed to disk", errno);
  if (rename(temporary_.c_str(), path_.c_str()) != 0)
    failed_call(path_, "cannot be put in place", errno);
  close(fd_);
  fd_ = -1;
  sync_folder(folder_of(path_));
}

void write_file_durably(const string& path, const string& bytes) {
  DurableFile file(path);
  file.write(bytes.data(), int64_t(bytes.size()));
  file.finish();
}

string folder_of(const string& path) {
  const fs::path folder = fs::path(path).parent_path();
  return folder.empty() ? "." : folder.string();
}

void make_folders(const string& path) {
  std::error_code error;
  fs::create_directories(path, error);
  if (error) failed_call(path, "cannot be created", error.value());
}

void sync_folder(const string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) failed_call(path, "cannot be opened", errno);
  // Some network file systems cannot sync a folder; there the rename is as durable as it gets.
  const int error = fsync(fd) == 0 || errno == EINVAL || errno == ENOTSUP ? 0 : errno;
  close(fd);
  if (error) failed_call(path, "cannot be flushed to disk", error);
}

}  // namespace pith
