#pragma once
#include "observe/metrics.h"

namespace pith {

// Bytes.
struct RankMemory {
  i64 weights = 0, compute_copy = 0, gradients = 0, optimizer = 0;
  i64 activations = 0, workspace = 0;  // estimates
  i64 total() const {
    return weights + compute_copy + gradients + optimizer + activations + workspace;
  }
};

string memory_table(const vector<RankMemory>& ranks);

// Of lines of metrics.jsonl, and lines of text.
string report_html(const vector<Json>& steps, const string& title, const string& notes);

// A block is a mean; a dot: nothing is finite.
string sparkline(const vector<double>& values, int width);

}
