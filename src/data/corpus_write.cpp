// corpus_write: one token file, written under a locked temporary name.
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "core/check.h"
#include "data/corpus_parts.h"
#include "data/durable.h"

namespace pith {
// Documents whose ends stay in memory: a file with more spills them.
constexpr size_t kEndsInMemory = 1 << 16;
constexpr int64_t kHeaderBytes = 128;

[[noreturn]] static void io_failed(const string& path, const char* what) {
  failed(path, text("%s (%s)", what, strerror(errno)), "free space, permissions, another --output");
}

static void write_all(int fd, const void* bytes, size_t n, const string& path) {
  for (const char* at = static_cast<const char*>(bytes); n;) {
    const ssize_t done = ::write(fd, at, n);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) io_failed(path, "cannot be written");
    at += done;
    n -= done;
  }
}

TokenFileWriter::TokenFileWriter(string path, string part, NpyType type)
    : path_(std::move(path)), part_(std::move(part)), type_(type) {}

TokenFileWriter::~TokenFileWriter() {
  // Removed before the lock goes with the descriptor, so nobody's work is removed.
  if (fd_ >= 0) unlink(part_.c_str()), close(fd_);
  if (ends_fd_ >= 0) close(ends_fd_);
}

Claim TokenFileWriter::claim() {
  struct stat mine, named;
  if (access(path_.c_str(), F_OK) == 0) return Claim::Finished;
  make_folders(folder_of(part_));
  const int fd = open(part_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (fd < 0) io_failed(part_, "cannot be created");
  if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
    const int error = errno;
    close(fd);
    if (error == EWOULDBLOCK) return Claim::Elsewhere;
    errno = error;
    io_failed(part_, "cannot be locked");
  }
  // Between open and lock the other process may have finished, or given up, this very file.
  const bool same = fstat(fd, &mine) == 0 && stat(part_.c_str(), &named) == 0 &&
                    mine.st_ino == named.st_ino && mine.st_dev == named.st_dev;
  const bool finished = access(path_.c_str(), F_OK) == 0;
  if (!same || finished) {
    if (same) unlink(part_.c_str());
    close(fd);
    return finished ? Claim::Finished : Claim::Elsewhere;
  }
  fd_ = fd;
  if (ftruncate(fd_, 0) != 0) io_failed(part_, "cannot be emptied");
  const string room(kHeaderBytes, '\0');  // until the number of tokens is known
  write(room.data(), room.size());
  return Claim::Mine;
}

void TokenFileWriter::write(const void* bytes, size_t n) { write_all(fd_, bytes, n, part_); }

void TokenFileWriter::append(const vector<uint32_t>& tokens, const vector<uint64_t>& ends) {
  const size_t width = size_of(type_);
  if (width == 4) {
    write(tokens.data(), tokens.size() * 4);
  } else {
    narrow_.resize(tokens.size() * width);
    for (size_t i = 0; i < tokens.size(); i++)
      memcpy(narrow_.data() + i * width, &tokens[i], width);  // little endian
    write(narrow_.data(), narrow_.size());
  }
  for (const uint64_t end : ends) ends_.push_back(num_tokens_ + end);
  num_tokens_ += tokens.size();
  num_documents_ += ends.size();
  if (ends_.size() >= kEndsInMemory) spill_ends();
}

void TokenFileWriter::spill_ends() {
  if (ends_fd_ < 0) {
    const string name = part_ + ".ends";
    ends_fd_ = open(name.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (ends_fd_ < 0) io_failed(name, "cannot be created");
    unlink(name.c_str());
  }
  write_all(ends_fd_, ends_.data(), ends_.size() * 8, part_);
  ends_.clear();
}

void TokenFileWriter::finish() {
  const string ends_header = npy_header(NpyType::U8, {num_documents_}, kHeaderBytes);
  write(ends_header.data(), ends_header.size());
  if (ends_fd_ >= 0) {
    spill_ends();
    string block(1 << 20, '\0');
    lseek(ends_fd_, 0, SEEK_SET);
    for (ssize_t got; (got = ::read(ends_fd_, block.data(), block.size())) != 0;) {
      if (got < 0) io_failed(part_, "its document ends cannot be read back");
      write(block.data(), got);
    }
  }
  write(ends_.data(), ends_.size() * 8);
  const string header = npy_header(type_, {num_tokens_}, kHeaderBytes);
  if (pwrite(fd_, header.data(), header.size(), 0) != kHeaderBytes)
    io_failed(part_, "cannot be written");
  if (fsync(fd_) != 0) io_failed(part_, "cannot be brought to disk");
  make_folders(folder_of(path_));
  if (rename(part_.c_str(), path_.c_str()) != 0) io_failed(path_, "cannot be renamed to");
  sync_folder(folder_of(path_));
  close(fd_);
  fd_ = -1;
}

}  // namespace pith
