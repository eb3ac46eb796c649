#include "observe/report.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "core/log.h"

namespace pith {

// Values over the steps; what is not finite breaks the line.
struct Curve {
    const char* name;
    const char* css;  // class of the line
    std::vector<double> x, y;
};

struct Chart {
    std::string title;
    std::vector<Curve> curves;
    double reference = 0;  // horizontal line; 0: none
    std::string reference_name;
    std::vector<double> skipped;  // steps without an update
    int width = 330, height = 190;
};

static std::string escape(const std::string& raw) {
    std::string out;
    for (const char c : raw) out += c == '&' ? "&amp;" : c == '<' ? "&lt;" : std::string(1, c);
    return out;
}

static std::string label(double x, double y, const char* css, const std::string& words) {
    return text("<text x=\"%.1f\" y=\"%.1f\" class=\"%s\">", x, y, css) + escape(words) + "</text>";
}

static std::string path(const std::string& css, const std::string& d) {
    return "<path class=\"" + css + "\" d=\"" + d + "\"/>";
}

static std::string number_text(double v) {
    const double size = std::fabs(v);
    if (size >= 10000) return with_commas(std::llround(v));
    return text(size > 0 && size < 0.001 ? "%.2e" : "%.4g", v);
}

// Round numbers (1, 2 or 5 times a power of ten apart), about `count` of them, within [low, high].
static std::vector<double> ticks(double low, double high, int count) {
    const double rough = (high - low) / count, power = std::pow(10, std::floor(std::log10(rough)));
    const double lead = rough / power;
    const double step = power * (lead < 1.5 ? 1 : lead < 3.5 ? 2 : lead < 7.5 ? 5 : 10);
    std::vector<double> at;
    for (double i = std::ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
        at.push_back(i * step + 0.0);  // no "-0"
    return at;
}

struct Range {
    double low = HUGE_VAL, high = -HUGE_VAL;
    void add(double v) {
        if (!std::isfinite(v)) return;
        low = std::min(low, v);
        high = std::max(high, v);
    }
    // Never empty or flat, so that it can be divided by.
    Range padded() const {
        if (low > high) return {0, 1};
        const double pad =
            high > low ? 0.04 * (high - low) : std::max(0.1 * std::fabs(high), 1e-12);
        return {low >= 0 ? std::max(0.0, low - pad) : low - pad, high + pad};
    }
};

// From data to the page.
struct Frame {
    Range x, y;
    double left = 62, top = 12, width, height;
    double px(double v) const { return left + (v - x.low) / (x.high - x.low) * width; }
    double py(double v) const { return top + (y.high - v) / (y.high - y.low) * height; }
};

// A long curve is drawn through the extremes of 600 stretches, which keeps its spikes.
static std::string curve_svg(const Frame& frame, const Curve& curve) {
    const size_t n = curve.x.size(), bucket = n / 600 + 1;
    std::string line, dots;
    bool broken = true;
    for (size_t i = 0; i < n; i += bucket) {
        Range range;
        for (size_t j = i; j < std::min(n, i + bucket); j++) range.add(curve.y[j]);
        const bool any = range.low <= range.high;
        const double x = frame.px(curve.x[i]);
        if (any) line += text("%c%.1f %.1f", broken ? 'M' : 'L', x, frame.py(range.high));
        if (any && range.low < range.high) line += text("V%.1f", frame.py(range.low));
        if (any && n <= 50)
            dots += text(
                "<circle class=\"dot %s\" cx=\"%.1f\" cy=\"%.1f\" r=\"3\"><title>step "
                "%.0f: %s</title></circle>",
                curve.css, x, frame.py(range.high), curve.x[i], number_text(range.high).c_str());
        broken = !any;
    }
    return path(text("line %s", curve.css), line) + dots;
}

static std::string chart_html(const Chart& chart) {
    Frame f{.width = chart.width - 82.0, .height = chart.height - 38.0};
    for (const Curve& curve : chart.curves) {
        for (const double x : curve.x) f.x.add(x);
        for (const double y : curve.y) f.y.add(y);
    }
    if (chart.reference > 0) f.y.add(chart.reference);
    f.y = f.y.padded();
    if (!(f.x.low < f.x.high)) f.x = f.x.padded();
    const double right = f.left + f.width, bottom = f.top + f.height;
    const std::string across = text("H%.1f", right), down = text("V%.1f", bottom);
    std::string out = "<figcaption><b>" + escape(chart.title) + "</b>";
    for (const Curve& curve : chart.curves)
        if (*curve.name && !curve.x.empty())
            out += text(" <span class=\"key %s\"></span>%s", curve.css, curve.name);
    if (!chart.skipped.empty()) out += " <span class=\"key bad\"></span>update skipped";
    out += text("</figcaption><svg viewBox=\"0 0 %d %d\">", chart.width, chart.height);
    for (const double v : ticks(f.y.low, f.y.high, 4))
        out += path("grid", text("M%.1f %.1f", f.left, f.py(v)) + across) +
               label(f.left - 7, f.py(v) + 4, "end", number_text(v));
    for (const double v : ticks(f.x.low, f.x.high, chart.width / 100))
        if (v == std::floor(v))
            out += label(f.px(v), bottom + 17, "middle", with_commas(std::llround(v)));
    out += path("axis", text("M%.1f %.1f", f.left, bottom) + across);
    for (const double x : chart.skipped)
        out += path("line bad", text("M%.1f %.1f", f.px(x), f.top) + down);
    if (chart.reference > 0) {
        const double y = f.py(chart.reference);
        out += path("line reference", text("M%.1f %.1f", f.left, y) + across);
        out += label(right, y - 5, "end strong",
                     chart.reference_name + " " + number_text(chart.reference));
    }
    for (const Curve& curve : chart.curves) out += curve_svg(f, curve);
    const char* css = chart.width > 500 ? " class=\"wide\"" : "";
    return text("<figure%s>", css) + out + "</svg></figure>\n";
}

// Of 16 levels, from balance (cool) to overload (hot).
static std::string heat_color(int level) {
    static constexpr int kStops[][3] = {
        {38, 70, 120}, {42, 157, 143}, {233, 196, 106}, {238, 118, 60}, {176, 23, 54}};
    const double at = level / 15.0 * 4;
    const int i = std::min(3, static_cast<int>(at));
    int rgb[3];
    for (int c = 0; c < 3; c++)
        rgb[c] = static_cast<int>(
            std::lround(kStops[i][c] + (at - i) * (kStops[i + 1][c] - kStops[i][c])));
    return text("#%02x%02x%02x", rgb[0], rgb[1], rgb[2]);
}

// Means of at most `columns` stretches of the values; NaN where nothing is finite.
static std::vector<double> stretches(const std::vector<double>& values, int columns) {
    const size_t n = std::min(values.size(), static_cast<size_t>(std::max(columns, 0)));
    std::vector<double> means;
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

// A layer's max/mean of each step; NaN where it was not counted.
static std::vector<double> load_of(const std::vector<StepMetrics>& steps, size_t layer) {
    std::vector<double> out;
    for (const StepMetrics& m : steps)
        out.push_back(layer < m.load.size() ? m.load[layer].max_over_mean : NAN);
    return out;
}

// Cells of one level share one path, so that 100 layers stay a small page.
static std::string heat_html(const std::vector<StepMetrics>& steps) {
    const std::vector<ExpertLoad>& last = steps.back().load;
    const double left = 62, right = 640, row = last.size() > 32 ? 12 : 18, top = 24;
    std::vector<std::vector<double>> cells;
    Range range{1, 2};
    for (size_t l = 0; l < last.size(); l++) {
        cells.push_back(stretches(load_of(steps, l), 120));
        for (const double v : cells.back()) range.add(v);
    }
    std::string paths[16], rows, scale;
    double y = top;
    for (size_t l = 0; l < last.size(); l++, y += row) {
        const double width = (right - left) / static_cast<double>(cells[l].size()),
                     middle = y + row / 2 + 4;
        double x = left;
        for (const double v : cells[l]) {
            const int level = static_cast<int>((v - 1) / (range.high - 1) * 15.99);
            if (std::isfinite(v))
                paths[std::clamp(level, 0, 15)] +=
                    text("M%.1f %.0fh%.1fv%.0fh-%.1fz", x, y, width + 0.1, row - 1, width + 0.1);
            x += width;
        }
        rows += label(left - 7, middle, "end", text("layer %zu", l)) +
                label(right + 70, middle, "end", text("%.2f", last[l].max_over_mean)) +
                label(right + 138, middle, "end", text("%.2f", last[l].p95_over_mean)) +
                label(right + 206, middle, "end", text("%.1f%%", 100 * last[l].dead_share)) +
                label(right + 274, middle, "end", text("%.3f", last[l].entropy));
    }
    const char* heads[] = {"max", "p95", "dead", "entropy"};
    for (int i = 0; i < 4; i++) rows += label(right + 70 + 68 * i, 14, "end strong", heads[i]);
    rows += label(left, y + 15, "start", "step " + with_commas(steps.front().step));
    rows += label(right, y + 15, "end", "step " + with_commas(steps.back().step));
    for (int i = 0; i < 16; i++) {
        scale += "<i style=\"background:" + heat_color(i) + "\"></i>";
        if (!paths[i].empty())
            rows += "<path fill=\"" + heat_color(i) + "\" d=\"" + paths[i] + "\"/>";
    }
    return "<figure class=\"wide\"><figcaption><b>Expert load</b> fullest expert over the mean, a "
           "row a "
           "layer, steps from left to right; last step at right <span class=\"scale\">1 " +
           scale +
           text(" %.1f</span></figcaption><svg viewBox=\"0 0 920 %.0f\">", range.high, y + 22) +
           rows + "</svg></figure>\n";
}

static const char* const kStyle = R"(
:root{color-scheme:light dark;--page:#fafaf8;--card:#fff;--ink:#22262b;--soft:#6a737d;
--edge:#e3e4e0;--a:#2364aa;--b:#d1603d;--bad:#b3001b}
@media(prefers-color-scheme:dark){:root{--page:#15181c;--card:#1d2126;--ink:#e4e6e8;
--soft:#98a1ab;--edge:#31373e;--a:#6aa9e9;--b:#f0946f;--bad:#ff6b7d}}
body{margin:0 auto;max-width:1080px;padding:24px 16px;background:var(--page);color:var(--ink);
font:15px/1.45 system-ui,sans-serif}h1{font-size:22px;margin:0}
p{color:var(--soft);margin:2px 0 16px}.cards,.charts{display:flex;flex-wrap:wrap;gap:12px;
margin-bottom:12px}.cards div{flex:1 1 168px}
.charts figure{flex:1 1 230px}.charts .wide{flex-basis:100%}.cards b{display:block;font-size:21px}
.cards div,figure,.box{box-sizing:border-box;background:var(--card);border:1px solid var(--edge);
border-radius:8px;padding:10px 14px;margin:0}.cards span,figcaption{color:var(--soft);font-size:13px
}figcaption b{color:var(--ink);font-size:15px;margin-right:8px}
svg{display:block;width:100%;height:auto;margin-top:6px}svg text{font-size:11.5px;fill:var(--soft)}
.end{text-anchor:end}.middle{text-anchor:middle}svg .strong{fill:var(--ink);font-weight:600}
.grid{stroke:var(--edge)}.axis{stroke:var(--soft)}
.line{fill:none;stroke-width:1.6;stroke-linejoin:round}.line.a{stroke:var(--a)}
.line.b{stroke:var(--b);stroke-width:2}.line.bad{stroke:var(--bad)}
.line.reference{stroke:var(--ink);stroke-dasharray:6 4;stroke-width:1.2}
.dot.a{fill:var(--a)}.dot.b{fill:var(--b)}
.key{display:inline-block;width:14px;height:4px;border-radius:2px;margin:0 5px 3px 8px}
.key.a{background:var(--a)}.key.b{background:var(--b)}.key.bad{background:var(--bad)}
.scale{float:right}.scale i{display:inline-block;width:9px;height:10px}
table{border-collapse:collapse;width:100%}td{padding:3px 0;border-top:1px solid var(--edge)}
tr:first-child td{border:0}td:first-child{color:var(--soft);width:34%}
.box{margin-bottom:12px}summary{cursor:pointer;font-weight:600}pre{overflow:auto;font-size:13px}
)";

static std::string card(const std::string& value, const std::string& name) {
    return "<div><b>" + escape(value) + "</b><span>" + escape(name) + "</span></div>";
}

// What the steps say by themselves.
static std::string cards_html(const std::vector<StepMetrics>& steps, const ReportInput& input) {
    double seconds = 0, peak = 0, stall = 0, mfu = 0;
    int64_t tokens = 0, skipped = 0;
    const StepMetrics* evaluated = nullptr;
    for (const StepMetrics& m : steps) {
        seconds += m.seconds;
        tokens += m.tokens;
        stall += m.checkpoint_stall_s;
        skipped += m.skipped;
        peak = std::max(peak, m.peak_memory_bytes);
        mfu += m.mfu / static_cast<double>(steps.size());
        if (m.eval_loss) evaluated = &m;
    }
    std::string out = "<div class=\"cards\">";
    out += card(text("%.4f", steps.back().loss), "training loss, last step (nats)");
    if (evaluated)
        out += card(text("%.4f", *evaluated->eval_loss),
                    "held-out loss, step " + with_commas(evaluated->step));
    if (input.reference_loss > 0)
        out += card(text("%.4f", input.reference_loss), input.reference_name);
    out += card(with_commas(tokens), "tokens trained on");
    if (seconds > 0)
        out += card(with_commas(std::llround(static_cast<double>(tokens) / seconds)),
                    "tokens a second, mean");
    if (mfu > 0) out += card(text("%.1f%%", 100 * mfu), "MFU, mean");
    out += card(duration_text(seconds), "in steps");
    if (peak > 0) out += card(bytes_text(peak), "peak memory, fullest rank");
    if (stall > 0) out += card(text("%.2f s", stall), "waiting for checkpoints");
    if (skipped) out += card(with_commas(skipped), "updates skipped: not finite");
    return out + "</div>\n";
}

static std::string charts_html(const std::vector<StepMetrics>& steps, const ReportInput& input) {
    Curve train{"training", "a"}, held_out{"held-out", "b"}, lr{"", "a"}, norm{"", "a"},
        speed{"", "a"};
    std::vector<double> skipped;
    for (const StepMetrics& m : steps) {
        const double x = static_cast<double>(m.step);
        for (Curve* curve : {&train, &lr, &norm, &speed}) curve->x.push_back(x);
        train.y.push_back(m.loss);
        lr.y.push_back(m.learning_rate);
        norm.y.push_back(m.gradient_norm);
        speed.y.push_back(m.tokens_per_second());
        if (m.skipped) skipped.push_back(x);
        if (!m.eval_loss) continue;
        held_out.x.push_back(x);
        held_out.y.push_back(*m.eval_loss);
    }
    return "<div class=\"charts\">" +
           chart_html({"Loss, nats a token",
                       {train, held_out},
                       input.reference_loss,
                       input.reference_name,
                       skipped,
                       920,
                       300}) +
           chart_html({"Learning rate", {lr}}) + chart_html({"Gradient norm", {norm}}) +
           chart_html({"Tokens a second", {speed}}) +
           (steps.back().load.empty() ? "" : heat_html(steps)) + "</div>\n";
}

std::string report_html(const std::vector<StepMetrics>& steps, const ReportInput& input) {
    std::string out =
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/>\n"
        "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"/>\n"
        "<title>" +
        escape(input.title) + "</title><style>" + kStyle + "</style></head>\n<body><h1>" +
        escape(input.title) + "</h1>\n";
    if (steps.empty()) {
        out += "<p>no step yet</p>\n";
    } else {
        const StepMetrics& last = steps.back();
        out += "<p>step " + with_commas(last.step) + " of " + with_commas(last.steps) +
               (last.forced_balanced ? "; ROUTER FORCED: balanced" : "") + "</p>\n" +
               cards_html(steps, input) + charts_html(steps, input);
    }
    if (!input.summary.empty()) {
        out += "<div class=\"box\"><table>";
        for (const ReportRow& row : input.summary)
            out += "<tr><td>" + escape(row.name) + "</td><td>" + escape(row.value) + "</td></tr>\n";
        out += "</table></div>\n";
    }
    if (!input.config.empty())
        out += "<details class=\"box\"><summary>Configuration</summary><pre>" +
               escape(input.config) + "</pre></details>\n";
    return out + "</body></html>\n";
}

static std::string blocks(const std::vector<double>& values, Range range) {
    std::string out;
    for (const double v : values) {
        if (!std::isfinite(v)) {
            out += "\u00b7";
            continue;
        }
        // U+2581 to U+2588 are e2 96 81 to e2 96 88.
        const double share =
            range.high > range.low ? (v - range.low) / (range.high - range.low) : 0;
        out += "\xe2\x96";
        out += static_cast<char>(0x81 + std::min(7, static_cast<int>(share * 8)));
    }
    return out;
}

std::string sparkline(const std::vector<double>& values, int width) {
    const std::vector<double> means = stretches(values, width);
    Range range;
    for (const double v : means) range.add(v);
    return blocks(means, range);
}

std::string load_rows(const std::vector<StepMetrics>& steps, int width) {
    std::string out;
    if (steps.empty()) return out;
    const std::vector<ExpertLoad>& last = steps.back().load;
    std::vector<std::vector<double>> rows;
    Range range{1, 1};
    for (size_t l = 0; l < last.size(); l++) {
        rows.push_back(stretches(load_of(steps, l), width));
        for (const double v : rows.back()) range.add(v);
    }
    for (size_t l = 0; l < rows.size(); l++)
        out += text("layer %3zu  max/mean %5.2f  dead %5.1f%%  ", l, last[l].max_over_mean,
                    100 * last[l].dead_share) +
               blocks(rows[l], range) + "\n";
    return out;
}

}  // namespace pith
