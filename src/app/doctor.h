// doctor: what the machine offers, examined without changing anything.
// defines: Finding, examine_machine
#pragma once
#include <cstdint>

#include "core/check.h"

namespace pith {

enum class Verdict : uint8_t { Pass, Warn, Fail };

struct Finding {
  Verdict verdict = Verdict::Pass;
  string name, value;
  string remedy;  // of a warning or failure
};

// `root` stands before /proc and /sys; empty, except in tests. The disk of `folder` is tried by
// writing to it (empty: not). A failure means that training on the CPU will not work.
vector<Finding> examine_machine(const string& root, const string& folder);

}  // namespace pith
