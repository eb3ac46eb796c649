#include "observe/report.h"

#include <algorithm>
#include <cmath>

#include "core/log.h"

namespace pith {

static constexpr double kLeft = 70, kWidth = 560, kHeight = 180;

struct Range {
  double low = HUGE_VAL, high = -HUGE_VAL;
  void add(const vector<double>& values) {
    for (const double v : values) {
      if (!std::isfinite(v)) continue;
      low = std::min(low, v);
      high = std::max(high, v);
    }
  }
  double share(double v) const { return high > low ? (v - low) / (high - low) : 0; }
};

// Means of at most `columns` stretches of the values; NaN where nothing is finite.
static vector<double> stretches(const vector<double>& values, int columns) {
  const size_t n = std::min(values.size(), size_t(columns));
  vector<double> sum(n), count(n);
  for (size_t i = 0; n > 0 && i < values.size(); i++) {
    if (!std::isfinite(values[i])) continue;
    sum[i * n / values.size()] += values[i];
    count[i * n / values.size()]++;
  }
  for (size_t i = 0; i < n; i++) sum[i] /= count[i];
  return sum;
}

static string escape(const string& raw) {
  string out;
  for (const char c : raw) out += c == '&' ? "&amp;" : c == '<' ? "&lt;" : string(1, c);
  return out;
}

static string label(double x, double y, const string& words) {
  return text("<text x=\"%.1f\" y=\"%.1f\">", x, y) + words + "</text>";
}

static string figure(const string& caption, double height, const string& svg) {
  return "<figure><figcaption>" + caption +
         text("</figcaption><svg viewBox=\"0 0 720 %.0f\">", height) + svg + "</svg></figure>\n";
}

static string loss_html(const vector<StepMetrics>& steps) {
  vector<double> train, held_out;
  for (const StepMetrics& m : steps) {
    train.push_back(m.loss);
    held_out.push_back(m.eval_loss.value_or(NAN));
  }
  const vector<double> curves[] = {stretches(train, 280), stretches(held_out, 280)};
  Range range;
  for (const auto& curve : curves) range.add(curve);
  string svg = label(kLeft, kHeight + 18, text("step %ld", steps[0].step)) +
               label(kWidth, kHeight + 18, text("step %ld", steps.back().step));
  if (range.low <= range.high)
    svg += label(0, 12, text("%.4g", range.high)) + label(0, kHeight, text("%.4g", range.low));
  for (const auto& curve : curves) {
    string line;
    for (size_t i = 0; i < curve.size(); i++)
      if (std::isfinite(curve[i]))
        line += text("%c%.1f %.1f", line.empty() ? 'M' : 'L',
                     kLeft + kWidth * double(i) / double(curve.size()),
                     kHeight * (1 - range.share(curve[i])));
    svg += text("<path class=\"%c\" d=\"", &curve == curves ? 'a' : 'b') + line + "\"/>";
  }
  return figure("Loss, nats a token: <b class=\"a\">training</b>, <b class=\"b\">held-out</b>",
                kHeight + 24, svg);
}

static string load_html(const vector<StepMetrics>& steps) {
  vector<vector<double>> rows(steps.back().load.max_over_mean.size());
  Range range{1, 2};
  for (size_t l = 0; l < rows.size(); l++) {
    for (const StepMetrics& m : steps) {
      const vector<double>& load = m.load.max_over_mean;
      rows[l].push_back(l < load.size() ? load[l] : NAN);
    }
    rows[l] = stretches(rows[l], 60);
    range.add(rows[l]);
  }
  string svg;
  for (size_t l = 0; l < rows.size(); l++) {
    const double width = kWidth / double(rows[l].size()), y = 14.0 * double(l);
    svg += label(0, y + 11, text("layer %zu", l));
    for (size_t c = 0; c < rows[l].size(); c++)
      if (std::isfinite(rows[l][c]))
        svg += text("<path opacity=\"%.2f\" d=\"M%.1f %.0fh%.1fv13h-%.1fz\"/>",
                    range.share(rows[l][c]), kLeft + double(c) * width, y, width, width);
  }
  return figure(text("Fullest expert over the mean, from 1 (empty) to %.1f (full)", range.high),
                14.0 * double(rows.size()), svg);
}

static vector<ReportRow> rows_of(const vector<StepMetrics>& steps) {
  StepMetrics sum = steps.back();
  sum.tokens = 0;
  sum.seconds = 0;
  int64_t skipped = 0;
  for (const StepMetrics& m : steps) {
    sum.tokens += m.tokens;
    sum.seconds += m.seconds;
    sum.peak_memory_bytes = std::max(sum.peak_memory_bytes, m.peak_memory_bytes);
    skipped += m.skipped;
  }
  return {{"steps", with_commas(sum.step) + " of " + with_commas(sum.steps)},
          {"router forced", sum.router_forced.empty() ? "no" : sum.router_forced},
          {"tokens trained on", with_commas(sum.tokens)},
          {"tokens a second", with_commas(std::llround(sum.tokens_per_second()))},
          {"peak memory, fullest rank", bytes_text(sum.peak_memory_bytes)},
          {"updates skipped: not finite", with_commas(skipped)}};
}

static const char* const kStyle = R"(
body{margin:auto;max-width:900px;font:15px/1.5 sans-serif}svg text{font-size:12px}
path{fill:#d1603d}.a,.b{fill:none;stroke-width:2}td{padding-right:24px}
.a{stroke:#3b82c4;color:#3b82c4}.b{stroke:#d1603d;color:#d1603d}
)";

string report_html(const vector<StepMetrics>& steps, const ReportInput& input) {
  const string title = escape(input.title);
  string out = "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/><title>" + title +
               "</title><style>" + kStyle + "</style></head>\n<body><h1>" + title + "</h1>\n";
  vector<ReportRow> rows = input.summary;
  if (!steps.empty()) {
    out += loss_html(steps) + load_html(steps);
    for (const ReportRow& row : rows_of(steps)) rows.push_back(row);
  }
  out += "<table>";
  for (const ReportRow& row : rows)
    out += "<tr><td>" + escape(row.name) + "</td><td>" + escape(row.value) + "</td></tr>\n";
  return out + "</table></body></html>\n";
}

string sparkline(const vector<double>& values, int width) {
  const vector<double> means = stretches(values, width);
  Range range;
  range.add(means);
  string out;
  for (const double v : means) {
    // U+2581 to U+2588 are e2 96 81 to e2 96 88.
    const int level = std::min(7, int(range.share(v) * 8));
    out += std::isfinite(v) ? string("\xe2\x96") + char(0x81 + level) : "\u00b7";
  }
  return out;
}

}  // namespace pith
