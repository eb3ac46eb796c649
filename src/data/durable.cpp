#include "data/durable.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "core/check.h"

namespace pith {

[[noreturn]] static void failed_call(const std::string& path, const char* what) {
    const int error = errno;
    const char* remedy = error == ENOSPC || error == EDQUOT ? "free space on that disk"
                         : error == EACCES || error == EPERM || error == EROFS
                             ? "check the permissions of the folder"
                             : "check the path and the disk";
    failed(path, std::string(what) + " (" + strerror(error) + ")", remedy);
}

MappedFile::MappedFile(const std::string& path) : path_(path) {
    const auto refuse = [&](const char* what) {
        bad_input(path, text("%s (%s)", what, strerror(errno)), "check the path");
    };
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) refuse("cannot be opened");
    struct stat info;
    void* map = MAP_FAILED;
    const bool is_file = fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
    if (is_file && info.st_size > 0)
        map = mmap(nullptr, static_cast<size_t>(info.st_size), PROT_READ, MAP_SHARED, fd, 0);
    const int error = errno;
    close(fd);
    errno = error;
    if (!is_file) bad_input(path, "is not a file (got a folder or device)", "name a file");
    if (info.st_size > 0 && map == MAP_FAILED) refuse("cannot be mapped");
    size_ = info.st_size;
    if (size_ > 0) data_ = static_cast<const char*>(map);
    refs_ = new int(1);
}
MappedFile::MappedFile(const MappedFile& o)
    : path_(o.path_), data_(o.data_), size_(o.size_), refs_(o.refs_) {
    if (refs_) __atomic_add_fetch(refs_, 1, __ATOMIC_RELAXED);
}
MappedFile::MappedFile(MappedFile&& o) noexcept
    : path_(std::move(o.path_)), data_(o.data_), size_(o.size_), refs_(o.refs_) {
    o.refs_ = nullptr;
}
MappedFile& MappedFile::operator=(MappedFile o) noexcept {
    path_.swap(o.path_);
    std::swap(data_, o.data_);
    std::swap(size_, o.size_);
    std::swap(refs_, o.refs_);
    return *this;
}
MappedFile::~MappedFile() {
    if (!refs_ || __atomic_sub_fetch(refs_, 1, __ATOMIC_ACQ_REL) > 0) return;
    if (data_) munmap(const_cast<char*>(data_), static_cast<size_t>(size_));
    delete refs_;
}

DurableFile::DurableFile(const std::string& path) : path_(path), temporary_(path + ".tmp") {
    fd_ = open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd_ < 0) failed_call(temporary_, "cannot be created");
}
DurableFile::DurableFile(DurableFile&& o) noexcept
    : path_(std::move(o.path_)), temporary_(std::move(o.temporary_)), fd_(o.fd_), size_(o.size_) {
    o.fd_ = -1;
}
DurableFile::~DurableFile() {
    if (fd_ < 0) return;
    close(fd_);
    unlink(temporary_.c_str());
}

void DurableFile::write(const void* bytes, int64_t size) { write_at(size_, bytes, size); }

void DurableFile::write_at(int64_t offset, const void* bytes, int64_t size) {
    if (fd_ < 0) failed(path_, "was finished before the last write");
    const char* next = static_cast<const char*>(bytes);
    size_ = std::max(size_, offset + size);
    while (size > 0) {
        // Linux writes at most 2^31 - 4096 bytes a call.
        const size_t piece = static_cast<size_t>(std::min<int64_t>(size, 1 << 30));
        const ssize_t n = pwrite(fd_, next, piece, offset);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) failed_call(temporary_, "cannot be written");
        next += n;
        offset += n;
        size -= n;
    }
}

void DurableFile::finish() {
    if (fd_ < 0) failed(path_, "was finished twice");
    if (fsync(fd_) != 0) failed_call(temporary_, "cannot be flushed to disk");
    const int fd = fd_;
    fd_ = -1;
    if (close(fd) != 0 || rename(temporary_.c_str(), path_.c_str()) != 0) {
        const int error = errno;
        unlink(temporary_.c_str());
        errno = error;
        failed_call(path_, "cannot be put in place");
    }
    sync_folder(folder_of(path_));
}

void write_file_durably(const std::string& path, const std::string& bytes) {
    DurableFile file(path);
    file.write(bytes.data(), static_cast<int64_t>(bytes.size()));
    file.finish();
}

std::string folder_of(const std::string& path) {
    const size_t slash = path.rfind('/');
    if (slash == std::string::npos) return ".";
    return slash == 0 ? "/" : path.substr(0, slash);
}

void make_folders(const std::string& path) {
    for (size_t at = path.find('/', 1);; at = path.find('/', at + 1)) {
        const std::string part = path.substr(0, at);
        if (mkdir(part.c_str(), 0777) != 0 && errno != EEXIST)
            failed_call(part, "cannot be created");
        if (at == std::string::npos) break;
    }
    struct stat info;
    if (stat(path.c_str(), &info) != 0) failed_call(path, "cannot be created");
    if (!S_ISDIR(info.st_mode)) {
        errno = ENOTDIR;
        failed_call(path, "cannot be created");
    }
}

void sync_folder(const std::string& path) {
    const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) failed_call(path, "cannot be opened");
    // Some network file systems cannot sync a folder; there the rename is as durable as it gets.
    const bool done = fsync(fd) == 0 || errno == EINVAL || errno == ENOTSUP;
    const int error = errno;
    close(fd);
    errno = error;
    if (!done) failed_call(path, "cannot be flushed to disk");
}

}  // namespace pith
