// report: a run on one page, which needs no network, and as a line for the terminal.
#pragma once
#include "observe/metrics.h"

namespace pith {

struct ReportRow {
  string name, value;
};

struct ReportInput {
  string title;
  vector<ReportRow> summary;
};

// Loss curve and expert load as inline SVG, and a table; of any number of steps.
string report_html(const vector<StepMetrics>& steps, const ReportInput& input);

// `values` as at most `width` blocks; a dot where nothing is finite.
string sparkline(const vector<double>& values, int width);

}  // namespace pith
