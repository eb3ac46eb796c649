#include "data/run_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "core/check.h"
#include "core/log.h"
#include "data/durable.h"

namespace pith {

// What the holder wrote: "process 1234 on host7"; empty if it has not yet.
static std::string holder_of(int fd) {
    char name[400];
    const ssize_t n = pread(fd, name, sizeof(name), 0);
    return std::string(name, n > 0 ? static_cast<size_t>(n) : 0);
}

RunLock::RunLock(const std::string& folder) {
    make_folders(folder);
    const std::string path = folder + "/.lock";
    fd_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd_ < 0)
        failed(path, text("cannot be opened (%s)", strerror(errno)),
               "check the permissions of the folder");
    if (flock(fd_, LOCK_EX | LOCK_NB) != 0) {
        const int error = errno;
        const std::string holder = holder_of(fd_);
        if (error == EWOULDBLOCK) {
            close(fd_);
            bad_input(folder, "another run writes there (" + (holder.empty() ? path : holder) + ")",
                      "wait for it to end, or name another run.folder");
        }
        log_warning("%s: this file system has no locks (%s); see that no other run uses the folder",
                    path.c_str(), strerror(error));
    }
    char host[256] = "";
    gethostname(host, sizeof(host) - 1);
    const std::string me = text("process %d on %s", static_cast<int>(getpid()), host);
    // The name only informs; the lock is the kernel's.
    if (ftruncate(fd_, 0) != 0 || pwrite(fd_, me.data(), me.size(), 0) < 0)
        log_warning("%s: cannot be written (%s)", path.c_str(), strerror(errno));
}

RunLock::~RunLock() { close(fd_); }

}  // namespace pith
