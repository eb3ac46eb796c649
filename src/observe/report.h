// report: a run on one page: report.html, which needs no network, and a line for the terminal.
// defines: ReportRow, ReportInput, report_html, sparkline
#pragma once

#include "observe/metrics.h"

namespace pith {

struct ReportRow {
  string name, value;
};

struct ReportInput {
  string title;               // "runs/quickstart"
  vector<ReportRow> summary;  // parameters, tokens, final numbers
  string config;              // the resolved configuration, folded away; empty: none
  double reference_loss = 0;  // horizontal line in the loss curve, nats; 0: none
  string reference_name;      // its label: "bigram model"
};

// The page: curves (loss, learning rate, gradient norm, tokens/s), expert load of each layer over
// time, both as inline SVG, and tables. Works for any number of steps, none included.
string report_html(const vector<StepMetrics>& steps, const ReportInput& input);

// A curve of Unicode block characters: `values` averaged into at most `width` blocks between their
// smallest and largest; a dot where nothing is finite. UTF-8.
string sparkline(const vector<double>& values, int width);

}  // namespace pith
