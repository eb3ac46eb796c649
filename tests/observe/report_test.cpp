#include "observe/report.h"

#include <gtest/gtest.h>

#include <cmath>

#include "core/check.h"
#include "core/json.h"

namespace pith {

// Reads a page as XML; "" if every tag is closed in turn, attributes are quoted, and < and & stand
// only where they mean something, else what is wrong.
static std::string xml_error(const std::string& page) {
  std::vector<std::string> open;
  for (size_t i = 0; i < page.size(); i++) {
    if (page[i] == '&') {
      const std::string entity = page.substr(i, page.find(';', i) - i + 1);
      if (entity != "&amp;" && entity != "&lt;") return "entity " + entity;
    }
    if (page[i] != '<') continue;
    size_t end = i;
    for (bool quoted = false; end < page.size() && (quoted || page[end] != '>'); end++) {
      if (page[end] == '"') quoted = !quoted;
      if (page[end] == '=' && !quoted && page[end + 1] != '"') return "unquoted attribute";
      if (page[end] == '<' && end > i) return "< inside a tag";
    }
    if (end == page.size()) return "tag without an end";
    const std::string tag = page.substr(i + 1, end - i - 1);
    const std::string name = tag.substr(0, tag.find_first_of(" /\n", 1));
    i = end;
    if (tag[0] == '!' || tag.back() == '/') continue;
    if (tag[0] != '/') {
      open.push_back(name);
      continue;
    }
    if (open.empty() || tag.substr(1) != open.back()) return "<" + tag + "> out of turn";
    open.pop_back();
  }
  return open.empty() ? "" : "<" + open.back() + "> left open";
}

static std::vector<StepMetrics> run(int64_t n, size_t layers) {
  std::vector<StepMetrics> steps;
  for (int64_t i = 1; i <= n; i++) {
    StepMetrics m;
    m.step = i;
    m.steps = n;
    m.loss = 2 + 4.0 / static_cast<double>(i);
    m.learning_rate = 1e-3;
    m.gradient_norm = 0.5;
    m.tokens = 1000;
    m.seconds = 0.5;
    m.peak_memory_bytes = 3 << 20;
    m.load.max_over_mean.assign(layers, 1.25);
    m.load.entropy = m.load.max_over_mean;
    steps.push_back(m);
  }
  return steps;
}

static std::vector<Json> lines_of(const std::vector<StepMetrics>& steps) {
  std::vector<Json> lines;
  for (const StepMetrics& m : steps) lines.push_back(Json::parse(step_json(m), "line"));
  return lines;
}

TEST(Report, IsWellFormedForEveryRun) {
  std::vector<StepMetrics> broken = run(60, 3);
  broken[10].loss = broken[11].gradient_norm = NAN;
  broken[11].skipped = true;
  broken[50].load.max_over_mean[1] = NAN;
  broken[20].load = {};
  std::vector<StepMetrics> blank = run(5, 0);
  for (StepMetrics& m : blank) m.loss = m.gradient_norm = INFINITY;
  struct {
    const char* what;
    std::vector<StepMetrics> steps;
  } cases[] = {{"no step", {}}, {"one step", run(1, 2)}, {"no layer", run(5, 0)},
      {"not finite", broken}, {"only infinite", blank}, {"long", run(5000, 2)},
      {"many layers", run(3, 94)}};
  for (const auto& c : cases) {
    for (const bool plain : {false, true}) {
      const std::string page =
          plain ? report_html(lines_of(c.steps), "", "")
                : report_html(lines_of(c.steps), "runs/<a & \"b\">", "path: a<b>&c");
      EXPECT_EQ(xml_error(page), "") << c.what;
      for (const char* bad : {"nan", "inf\"", "inf ", "http", "src=", "script", "@import"})
        EXPECT_EQ(page.find(bad), std::string::npos) << c.what << " has " << bad;
      EXPECT_LT(page.size(), 300000u) << c.what;
    }
  }
  EXPECT_EQ(xml_error("<a><b/></a>"), "");
  for (const char* bad : {"<a><b></a>", "<a", "<a>", "</a>", "<a b=c></a>", "a & b", "<a <b/>>"})
    EXPECT_NE(xml_error(bad), "") << bad;
}

TEST(Report, ContainsTheNumbers) {
  const std::string page = report_html(lines_of(run(40, 2)), "a run", "parameters: 1,234\n");
  for (const char* part :
      {"<h1>a run</h1>", "parameters: 1,234\n", ">step 40<", ">layer 1<", ">held-out<"})
    EXPECT_NE(page.find(part), std::string::npos) << part;
}

TEST(Report, Sparkline) {
  struct {
    std::vector<double> values;
    int width;
    std::string want;
  } cases[] = {
      {{}, 10, ""},
      {{1, 2, 3}, 0, ""},
      {{5}, 10, "\u2581"},
      {{3, 3}, 10, "\u2581\u2581"},
      {{0, 1, 2, 3, 4, 5, 6, 7}, 8, "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"},
      {{0, 0, 8, 8}, 2, "\u2581\u2588"},
      {{8, NAN, 0}, 3, "\u2588\u00b7\u2581"},
      {{NAN, INFINITY}, 2, "\u00b7\u00b7"},
  };
  for (const auto& c : cases) EXPECT_EQ(sparkline(c.values, c.width), c.want);
}

TEST(MemoryReport, Table) {
  const RankMemory a{1 << 20, 0, 2 << 20, 3 << 20, 512, 1 << 10};
  RankMemory b = a;
  b.activations = int64_t{5} << 30;
  EXPECT_EQ(memory_table({a, b}),
      "rank      weights compute copy    gradients    optimizer activations*   workspace*  "
      "      total\n"
      "   0     1.00 MiB          0 B     2.00 MiB     3.00 MiB        512 B     1.00 KiB  "
      "   6.00 MiB\n"
      "   1     1.00 MiB          0 B     2.00 MiB     3.00 MiB     5.00 GiB     1.00 KiB  "
      "   5.01 GiB\n"
      "* estimated\n");
}

}  // namespace pith
