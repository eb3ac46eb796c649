// run_lock: two runs never write to one folder. defines: RunLock
#pragma once
#include "core/check.h"

namespace pith {

// Holds RUN/.lock (flock) while it lives; the kernel lets go of it however the process ends.
// Creates the folder where it is missing. Exit code 2, naming the process that holds it, if it is
// taken.
class RunLock {
 public:
  explicit RunLock(const string& folder);
  RunLock(const RunLock&) = delete;
  RunLock& operator=(const RunLock&) = delete;
  ~RunLock();

 private:
  int fd_ = -1;
};

}  // namespace pith
