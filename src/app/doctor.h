// What the machine offers, examined without changing anything.
#pragma once
#include "core/check.h"

namespace pith {

struct Finding {
  bool good = true;  // or training on the CPU will not work
  string name, value;
  string remedy;  // where it is not good
};

// `root` stands before /proc and /sys; empty, except in tests. `folder` is where runs will be kept.
vector<Finding> examine_machine(const string& root, const string& folder);

}  // namespace pith
