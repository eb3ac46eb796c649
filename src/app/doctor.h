#pragma once
#include "core/check.h"

namespace pith {

struct Finding {
  bool good;  // or training on the CPU will not work
  string name, value;
};

// What the machine offers. `root` stands before /proc and /sys; empty, except in tests. `folder` is
// where runs will be kept.
vector<Finding> examine_machine(const string& root, const string& folder);

}
