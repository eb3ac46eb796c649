// report: what people read of a run: bytes before it, and a page and a line after it.
#pragma once
#include "observe/metrics.h"

namespace pith {

// Bytes.
struct RankMemory {
  int64_t weights = 0;       // F32 master shard
  int64_t compute_copy = 0;  // gathered weights
  int64_t gradients = 0;     // full accumulators and reduced shard
  int64_t optimizer = 0;
  int64_t activations = 0;  // estimate
  int64_t workspace = 0;    // estimate
  int64_t total() const {
    return weights + compute_copy + gradients + optimizer + activations + workspace;
  }
};

string memory_table(const vector<RankMemory>& ranks);
string memory_json(const vector<RankMemory>& ranks);

struct ReportRow {
  string name, value;
};

struct ReportInput {
  string title;
  vector<ReportRow> summary;
};

// Loss curve, expert load and key figures.
string report_html(const vector<StepMetrics>& steps, const ReportInput& input);

// A block is a mean; a dot: nothing is finite.
string sparkline(const vector<double>& values, int width);

}  // namespace pith
