// report: a run on one page: report.html, which needs no network, and a line for the terminal.
// defines: ReportRow, ReportInput, report_html, sparkline, load_rows
#pragma once
#include <string>
#include <vector>

#include "observe/metrics.h"

namespace pith {

struct ReportRow {
    std::string name, value;
};

struct ReportInput {
    std::string title;               // "runs/quickstart"
    std::vector<ReportRow> summary;  // parameters, tokens, final numbers: shown above the curves
    std::string config;              // the resolved configuration, folded away; empty: none
    double reference_loss = 0;       // horizontal line in the loss curve, nats; 0: none
    std::string reference_name;      // its label: "bigram model"
};

// The page: summary, curves (loss, learning rate, gradient norm, tokens/s), expert load of each
// layer over time, as inline SVG. Works for any number of steps, none included.
std::string report_html(const std::vector<StepMetrics>& steps, const ReportInput& input);

// A curve of Unicode block characters: `values` averaged into at most `width` blocks between their
// smallest and largest; a dot where nothing is finite. UTF-8.
std::string sparkline(const std::vector<double>& values, int width);
// The same for the expert load, a line for each MoE layer: last max/mean, dead experts, and
// max/mean over the steps on one scale from 1. Empty if no load was counted.
std::string load_rows(const std::vector<StepMetrics>& steps, int width);

}  // namespace pith
