#include "observe/report.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "core/log.h"

namespace pith {

// The plot in a figure that is 920 wide.
static constexpr double kLeft = 62, kTop = 12, kWidth = 560, kHeight = 180;

// Values over the steps; what is not finite breaks the line.
struct Curve {
  const char* css;  // class of the line
  vector<double> x, y;
};

struct Range {
  double low = HUGE_VAL, high = -HUGE_VAL;
  void add(double v) {
    if (!std::isfinite(v)) return;
    low = std::min(low, v);
    high = std::max(high, v);
  }
  double share(double v) const { return high > low ? (v - low) / (high - low) : 0; }
};

static string escape(const string& raw) {
  string out;
  for (const char c : raw) out += c == '&' ? "&amp;" : c == '<' ? "&lt;" : string(1, c);
  return out;
}

static string label(double x, double y, const char* css, const string& words) {
  return text("<text x=\"%.1f\" y=\"%.1f\" class=\"%s\">", x, y, css) + escape(words) + "</text>";
}

static string path(const string& css, const string& d) {
  return "<path class=\"" + css + "\" d=\"" + d + "\"/>";
}

static string number_text(double v) {
  return std::fabs(v) >= 10000 ? with_commas(std::llround(v)) : text("%.4g", v);
}

// From data to the page.
struct Frame {
  Range x, y;
  double px(double v) const { return kLeft + x.share(v) * kWidth; }
  double py(double v) const { return kTop + (1 - y.share(v)) * kHeight; }
};

// A long curve is drawn through the extremes of 600 stretches, which keeps its spikes.
static string curve_svg(const Frame& frame, const Curve& curve) {
  const size_t n = curve.x.size(), bucket = n / 600 + 1;
  string line;
  bool broken = true;
  for (size_t i = 0; i < n; i += bucket) {
    Range range;
    for (size_t j = i; j < std::min(n, i + bucket); j++) range.add(curve.y[j]);
    const bool any = range.low <= range.high;
    if (any)
      line += text("%c%.1f %.1fV%.1f", broken ? 'M' : 'L', frame.px(curve.x[i]),
                   frame.py(range.high), frame.py(range.low));
    broken = !any;
  }
  return path(curve.css, line);
}

static string figure(const string& caption, double height, const string& svg) {
  return "<figure><figcaption>" + caption +
         text("</figcaption><svg viewBox=\"0 0 920 %.0f\">", height) + svg + "</svg></figure>\n";
}

// `reference`: a horizontal line; 0: none.
static string chart_html(const char* caption, const vector<Curve>& curves, double reference = 0,
                         const string& reference_name = "") {
  Frame f;
  for (const Curve& curve : curves) {
    for (const double x : curve.x) f.x.add(x);
    for (const double y : curve.y) f.y.add(y);
  }
  if (reference > 0) f.y.add(reference);
  if (f.y.low > f.y.high) f.y = {0, 1};
  const auto across = [&](const char* css, double y) {
    return path(css, text("M%.1f %.1fh%.1f", kLeft, f.py(y), kWidth));
  };
  string svg;
  for (int i = 0; i <= 4; i++) {
    const double x = f.x.low + (f.x.high - f.x.low) * i / 4;
    const double y = f.y.low + (f.y.high - f.y.low) * i / 4;
    svg += across("grid", y) + label(kLeft - 7, f.py(y) + 4, "end", number_text(y)) +
           label(f.px(x), kTop + kHeight + 17, "middle", with_commas(std::llround(x)));
  }
  for (const Curve& curve : curves) svg += curve_svg(f, curve);
  if (reference > 0)
    svg += across("reference", reference) + label(kLeft + kWidth + 8, f.py(reference) + 4, "start",
                                                  reference_name + " " + number_text(reference));
  return figure(caption, kTop + kHeight + 26, svg);
}

// Means of at most `columns` stretches of the values; NaN where nothing is finite.
static vector<double> stretches(const vector<double>& values, int columns) {
  const size_t n = std::min(values.size(), size_t(std::max(columns, 0)));
  vector<double> means;
  for (size_t c = 0; c < n; c++) {
    double sum = 0, count = 0;
    for (size_t i = c * values.size() / n; i < (c + 1) * values.size() / n; i++) {
      if (!std::isfinite(values[i])) continue;
      sum += values[i];
      count++;
    }
    means.push_back(sum / count);
  }
  return means;
}

// Cells of one shade share one path, so that 100 layers stay a small page.
static string load_html(const vector<StepMetrics>& steps) {
  const vector<ExpertLoad>& last = steps.back().load;
  vector<vector<double>> rows;
  Range range{1, 2};
  for (size_t l = 0; l < last.size(); l++) {
    vector<double> layer;
    for (const StepMetrics& m : steps)
      layer.push_back(l < m.load.size() ? m.load[l].max_over_mean : NAN);
    rows.push_back(stretches(layer, 120));
    for (const double v : rows.back()) range.add(v);
  }
  string cells[11], svg;  // cells by shade, in tenths; rows are 14 high
  for (size_t l = 0; l < rows.size(); l++) {
    const double width = kWidth / double(rows[l].size()), y = 14.0 * l;
    for (size_t c = 0; c < rows[l].size(); c++)
      if (std::isfinite(rows[l][c]))
        cells[std::lround(range.share(rows[l][c]) * 10)] +=
            text("M%.1f %.0fh%.1fv13h-%.1fz", kLeft + c * width, y, width, width);
    svg += label(kLeft - 7, y + 11, "end", text("layer %zu", l)) +
           label(kLeft + kWidth + 8, y + 11, "start",
                 text("max %.2f, p95 %.2f, dead %.1f%%, entropy %.3f", last[l].max_over_mean,
                      last[l].p95_over_mean, 100 * last[l].dead_share, last[l].entropy));
  }
  for (int shade = 1; shade <= 10; shade++)
    svg += text("<g opacity=\"%.1f\">", shade / 10.0) + path("cell", cells[shade]) + "</g>";
  return figure(text("<b>Expert load</b> fullest expert over the mean, from 1 (empty) to %.1f "
                     "(full), a row a layer; the numbers are the last step's",
                     range.high),
                14.0 * rows.size(), svg);
}

static const char* const kStyle = R"(
:root{color-scheme:light dark}
body{margin:auto;max-width:1080px;padding:24px;font:15px/1.45 system-ui,sans-serif}
svg text{font-size:12px;fill:currentColor}.end{text-anchor:end}.middle{text-anchor:middle}
path{fill:none;stroke-width:2;stroke-linecap:round}.grid{stroke:#8884}
.reference{stroke:currentColor;stroke-dasharray:6 4}
.a{stroke:#3b82c4;color:#3b82c4}.b{stroke:#d1603d;color:#d1603d}.cell{fill:#d1603d}
td{padding:3px 24px 3px 0;border-top:1px solid #8884}
)";

// What the steps say by themselves.
static vector<ReportRow> numbers_of(const vector<StepMetrics>& steps, const ReportInput& input) {
  StepMetrics sum;
  int64_t skipped = 0;
  vector<ReportRow> rows = {{"training loss, last step", text("%.4f", steps.back().loss)}};
  for (const StepMetrics& m : steps) {
    sum.seconds += m.seconds;
    sum.tokens += m.tokens;
    sum.checkpoint_stall_s += m.checkpoint_stall_s;
    sum.mfu += m.mfu / double(steps.size());
    sum.peak_memory_bytes = std::max(sum.peak_memory_bytes, m.peak_memory_bytes);
    skipped += m.skipped;
    if (m.eval_loss) sum.eval_loss = m.eval_loss;
  }
  if (sum.eval_loss) rows.push_back({"held-out loss", text("%.4f", *sum.eval_loss)});
  if (input.reference_loss > 0)
    rows.push_back({input.reference_name, text("%.4f", input.reference_loss)});
  rows.push_back({"tokens trained on", with_commas(sum.tokens)});
  rows.push_back({"tokens a second", with_commas(std::llround(sum.tokens_per_second()))});
  if (sum.mfu > 0) rows.push_back({"MFU", text("%.1f%%", 100 * sum.mfu)});
  rows.push_back({"time in steps", duration_text(sum.seconds)});
  rows.push_back({"waiting for checkpoints", text("%.2f s", sum.checkpoint_stall_s)});
  rows.push_back({"peak memory, fullest rank", bytes_text(sum.peak_memory_bytes)});
  rows.push_back({"updates skipped: not finite", with_commas(skipped)});
  return rows;
}

static string charts_html(const vector<StepMetrics>& steps, const ReportInput& input) {
  Curve train{"a"}, held_out{"b"}, lr{"a"}, norm{"a"}, speed{"a"};
  for (const StepMetrics& m : steps) {
    const double x = double(m.step);
    for (Curve* curve : {&train, &lr, &norm, &speed}) curve->x.push_back(x);
    train.y.push_back(m.loss);
    lr.y.push_back(m.learning_rate);
    norm.y.push_back(m.gradient_norm);
    speed.y.push_back(m.tokens_per_second());
    if (!m.eval_loss) continue;
    held_out.x.push_back(x);
    held_out.y.push_back(*m.eval_loss);
  }
  return chart_html(
             "<b>Loss</b>, nats a token: <b class=\"a\">training</b>, "
             "<b class=\"b\">held-out</b>",
             {train, held_out}, input.reference_loss, input.reference_name) +
         chart_html("<b>Learning rate</b>", {lr}) + chart_html("<b>Gradient norm</b>", {norm}) +
         chart_html("<b>Tokens a second</b>", {speed}) +
         (steps.back().load.empty() ? "" : load_html(steps));
}

string report_html(const vector<StepMetrics>& steps, const ReportInput& input) {
  const string title = escape(input.title);
  string out = "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/><title>" + title +
               "</title><style>" + kStyle + "</style></head>\n<body><h1>" + title + "</h1>\n";
  vector<ReportRow> rows;
  if (steps.empty()) {
    out += "<p>no step yet</p>\n";
  } else {
    const StepMetrics& last = steps.back();
    out += "<p>step " + with_commas(last.step) + " of " + with_commas(last.steps) +
           (last.forced_balanced ? "; ROUTER FORCED: balanced" : "") + "</p>\n" +
           charts_html(steps, input);
    rows = numbers_of(steps, input);
  }
  rows.insert(rows.end(), input.summary.begin(), input.summary.end());
  out += "<table>";
  for (const ReportRow& row : rows)
    out += "<tr><td>" + escape(row.name) + "</td><td>" + escape(row.value) + "</td></tr>\n";
  out += "</table>\n";
  if (!input.config.empty())
    out += "<details><summary>Configuration</summary><pre>" + escape(input.config) +
           "</pre></details>\n";
  return out + "</body></html>\n";
}

string sparkline(const vector<double>& values, int width) {
  const vector<double> means = stretches(values, width);
  Range range;
  for (const double v : means) range.add(v);
  string out;
  for (const double v : means) {
    // U+2581 to U+2588 are e2 96 81 to e2 96 88.
    const int level = std::isfinite(v) ? std::min(7, int(range.share(v) * 8)) : -1;
    out += level < 0 ? "\u00b7" : string("\xe2\x96") + char(0x81 + level);
  }
  return out;
}

}  // namespace pith
