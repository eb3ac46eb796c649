#include "observe/report.h"

#include <algorithm>

#include "core/json.h"
#include "core/log.h"

namespace pith {

struct Kind {
  const char *key, *heading;
  i64 RankMemory::*bytes;
};
static constexpr Kind kKinds[] = {
    {"weights", "weights", &RankMemory::weights},
    {"compute_copy", "compute copy", &RankMemory::compute_copy},
    {"gradients", "gradients", &RankMemory::gradients},
    {"optimizer", "optimizer", &RankMemory::optimizer},
    {"activations", "activations*", &RankMemory::activations},
    {"workspace", "workspace*", &RankMemory::workspace},
};

string memory_table(const vector<RankMemory>& ranks) {
  string out = "rank";
  const auto cell = [&](const string& words) { out += text(" %12s", words.c_str()); };
  for (const Kind& kind : kKinds) cell(kind.heading);
  cell("total");
  for (size_t i = 0; i < ranks.size(); i++) {
    out += text("\n%4zu", i);
    for (const Kind& kind : kKinds) cell(bytes_text(double(ranks[i].*kind.bytes)));
    cell(bytes_text(double(ranks[i].total())));
  }
  return out + "\n* estimated\n";
}

string memory_json(const vector<RankMemory>& ranks) {
  JsonWriter w;
  w.array();
  for (size_t i = 0; i < ranks.size(); i++) {
    w.object().key("rank").value(i);
    for (const Kind& kind : kKinds) w.key(kind.key).value(ranks[i].*kind.bytes);
    w.key("total").value(ranks[i].total()).end();
  }
  return w.end().str();
}

struct Range {
  double low = HUGE_VAL, high = -HUGE_VAL;
  void add(const vector<double>& values) {
    for (const double v : values) {
      if (!std::isfinite(v)) continue;
      low = min(low, v);
      high = max(high, v);
    }
  }
  double share(double v) const { return high > low ? (v - low) / (high - low) : 0; }
};

// Means of stretches; NaN where nothing is finite.
static vector<double> stretches(const vector<double>& values, int columns) {
  const size_t n = min(values.size(), size_t(columns));
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

struct Curve {
  string name;
  vector<double> values;  // by step
};

// A line a curve, with its name as a tooltip.
static string chart(const char* caption, vector<Curve> curves, const vector<StepMetrics>& steps) {
  constexpr double kLeft = 70, kWidth = 560, kHeight = 180;
  Range range;
  for (Curve& curve : curves) {
    curve.values = stretches(curve.values, 120);
    range.add(curve.values);
  }
  if (range.low > range.high) return "";
  string svg;
  const auto label = [&](double x, double y, const string& words) {
    svg += text("<text x=\"%.0f\" y=\"%.0f\">", x, y) + words + "</text>";
  };
  label(0, 12, text("%.4g", range.high));
  label(0, kHeight, text("%.4g", range.low));
  label(kLeft, kHeight + 18, text("step %ld", steps[0].step));
  label(kWidth, kHeight + 18, text("step %ld", steps.back().step));
  for (size_t c = 0; c < curves.size(); c++) {
    const vector<double>& values = curves[c].values;
    string line;
    for (size_t i = 0; i < values.size(); i++)
      if (std::isfinite(values[i]))
        line += text("%c%.1f %.1f", line.empty() ? 'M' : 'L',
                     kLeft + kWidth * double(i) / double(values.size()),
                     kHeight * (1 - range.share(values[i])));
    svg += text("<path stroke=\"hsl(%zu 60%% 50%%)\" d=\"", c * 360 / curves.size()) + line +
           "\"><title>" + curves[c].name + "</title></path>";
  }
  return string("<figure><figcaption>") + caption + "</figcaption><svg viewBox=\"0 0 720 204\">" +
         svg + "</svg></figure>\n";
}

string report_html(const vector<StepMetrics>& steps, const ReportInput& input) {
  Curve train{"training"}, held_out{"held-out"};
  vector<Curve> load;
  vector<ReportRow> rows = input.summary;
  StepMetrics sum;
  i64 skipped = 0;
  for (const StepMetrics& m : steps) {
    train.values.push_back(m.loss);
    held_out.values.push_back(m.eval_loss.value_or(NAN));
    for (size_t l = 0; l < m.load.max_over_mean.size(); l++) {
      if (l == load.size()) load.push_back({text("layer %zu", l)});
      load[l].values.push_back(m.load.max_over_mean[l]);
    }
    sum.tokens += m.tokens;
    sum.seconds += m.seconds;
    sum.peak_memory_bytes = max(sum.peak_memory_bytes, m.peak_memory_bytes);
    skipped += m.skipped;
  }
  rows.push_back({"tokens trained on", with_commas(sum.tokens)});
  rows.push_back({"tokens a second", with_commas(std::llround(sum.tokens_per_second()))});
  rows.push_back({"peak memory, fullest rank", bytes_text(sum.peak_memory_bytes)});
  rows.push_back({"updates skipped: not finite", with_commas(skipped)});
  const string title = escape(input.title);
  string out = "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/><title>" + title +
               "</title><style>svg{font:12px sans-serif}path{fill:none;stroke-width:2}</style>"
               "</head>\n<body><h1>" +
               title + "</h1>\n" + chart("Loss, nats a token", {train, held_out}, steps) +
               chart("Expert load: the fullest expert over the mean, a line a layer", load, steps) +
               "<table>";
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
    const bool finite = std::isfinite(v);
    // U+2581 to U+2588 are e2 96 81 to e2 96 88.
    const int level = finite ? min(7, int(range.share(v) * 8)) : 0;
    out += finite ? string("\xe2\x96") + char(0x81 + level) : "\u00b7";
  }
  return out;
}

}
