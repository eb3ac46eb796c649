#include "observe/report.h"

namespace pith {

string memory_table(const vector<RankMemory>& ranks) {
  string out =
      "rank      weights compute copy    gradients    optimizer activations*   workspace*"
      "        total\n";
  for (size_t i = 0; i < ranks.size(); i++) {
    const RankMemory& m = ranks[i];
    out += text("%4zu", i);
    for (const i64 bytes : {m.weights, m.compute_copy, m.gradients, m.optimizer, m.activations,
             m.workspace, m.total()})
      out += text(" %12s", bytes_text(double(bytes)).c_str());
    out += "\n";
  }
  return out + "* estimated\n";
}

struct Curve {
  string name;
  vector<double> values;
};

struct Range {
  double low = HUGE_VAL, high = -HUGE_VAL;
};

// At most `columns` means of stretches, as shares of the range of all; NaN where nothing is finite.
static Range fit(vector<Curve>& curves, size_t columns) {
  Range range;
  for (Curve& curve : curves) {
    size_t all = curve.values.size(), n = min(all, columns);
    vector<double> sum(n), count(n);
    for (size_t i = 0; n > 0 && i < all; i++) {
      if (!std::isfinite(curve.values[i])) continue;
      sum[i * n / all] += curve.values[i];
      count[i * n / all]++;
    }
    for (size_t i = 0; i < n; i++) {
      sum[i] /= count[i];
      range.low = std::fmin(range.low, sum[i]);
      range.high = std::fmax(range.high, sum[i]);
    }
    curve.values = sum;
  }
  double size = range.high > range.low ? range.high - range.low : 1;
  for (Curve& curve : curves)
    for (double& value : curve.values) value = (value - range.low) / size;
  return range;
}

static string escape(const string& raw) {
  string out;
  for (const char c : raw) out += c == '&' ? "&amp;" : c == '<' ? "&lt;" : string(1, c);
  return out;
}

static string chart(const char* caption, vector<Curve> curves, i64 last_step) {
  constexpr double kLeft = 70, kWidth = 560, kHeight = 180;
  const Range range = fit(curves, 120);
  if (range.low > range.high) return "";
  string svg;
  auto label = [&](double x, double y, const string& words) {
    svg += text("<text x=\"%.0f\" y=\"%.0f\">", x, y) + words + "</text>";
  };
  label(0, 12, text("%.4g", range.high));
  label(0, kHeight, text("%.4g", range.low));
  label(kWidth, kHeight + 18, text("step %ld", last_step));
  for (size_t c = 0; c < curves.size(); c++) {
    const vector<double>& values = curves[c].values;
    string line;
    for (size_t i = 0; i < values.size(); i++)
      if (std::isfinite(values[i]))
        line += text("%c%.1f %.1f", line.empty() ? 'M' : 'L',
            kLeft + kWidth * double(i) / double(values.size()), kHeight * (1 - values[i]));
    svg += text("<path stroke=\"hsl(%zu 60%% 50%%)\" d=\"", c * 360 / curves.size()) + line +
           "\"><title>" + curves[c].name + "</title></path>";
  }
  return string("<figure><figcaption>") + caption + "</figcaption><svg viewBox=\"0 0 720 204\">" +
         svg + "</svg></figure>\n";
}

string report_html(const vector<Json>& steps, const string& title, const string& notes) {
  vector<Curve> losses = {{"training"}, {"held-out"}}, load;
  for (const Json& line : steps) {
    losses[0].values.push_back(line.double_or("cross_entropy_loss", NAN));
    losses[1].values.push_back(line.double_or("eval_loss", NAN));
    i64 layers = line.has("expert_load_max") ? line["expert_load_max"].size() : 0;
    for (i64 l = 0; l < layers; l++) {
      Json most = line["expert_load_max"][l];
      if (l == i64(load.size())) load.push_back({text("layer %ld", l)});
      load[l].values.push_back(most.is_null() ? NAN : most.as_double());
    }
  }
  i64 last_step = steps.empty() ? 0 : steps.back()["step"].as_int();
  return "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/><title>Pith</title>"
         "<style>svg{font:12px "
         "sans-serif}path{fill:none;stroke-width:2}</style></head>\n<body><h1>" +
         escape(title) + "</h1>\n" + chart("Loss, nats a token", losses, last_step) +
         chart("Expert load: the fullest expert over the mean, a line a layer", load, last_step) +
         "<pre>" + escape(notes) + "</pre></body></html>\n";
}

string sparkline(const vector<double>& values, int width) {
  vector<Curve> curve = {{"", values}};
  fit(curve, size_t(width));
  string out;
  for (const double share : curve[0].values) {
    // U+2581 to U+2588 are e2 96 81 to e2 96 88.
    int level = std::isfinite(share) ? min(7, int(share * 8)) : 0;
    out += std::isfinite(share) ? string("\xe2\x96") + char(0x81 + level) : "\u00b7";
  }
  return out;
}

}
