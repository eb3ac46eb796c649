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

RunLock::RunLock(const string& folder) {
  make_folders(folder);
  const string path = folder + "/.lock";
  fd_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (fd_ < 0)
    failed(path, text("cannot be opened (%s)", strerror(errno)),
           "check the permissions of the folder");
  char name[400] = "";  // "process 1234 on host7": it informs; the lock is the kernel's
  if (flock(fd_, LOCK_EX | LOCK_NB) != 0) {
    if (errno == EWOULDBLOCK) {
      const bool named = pread(fd_, name, sizeof name - 1, 0) > 0;
      close(fd_);
      bad_input(folder, text("another run writes there (%s)", named ? name : path.c_str()),
                "wait for it to end, or name another run.folder");
    }
    log_warning("%s: this file system has no locks (%s); see that no other run uses the folder",
                path.c_str(), strerror(errno));
  }
  char host[256] = "";
  gethostname(host, sizeof host - 1);
  const int length = snprintf(name, sizeof name, "process %d on %s", getpid(), host);
  if (ftruncate(fd_, 0) != 0 || pwrite(fd_, name, size_t(length), 0) < 0)
    log_warning("%s: cannot be written (%s)", path.c_str(), strerror(errno));
}

RunLock::~RunLock() { close(fd_); }

}  // namespace pith
