// pith plan: the timeline of a pipeline schedule.
#include "app/commands.h"
#include "core/json.h"
#include "data/durable.h"
#include "engine/schedule.h"

namespace pith {

// "F3", or "f3" of chunk 1; "F5b3" where two overlap; empty: not drawn.
static string label(const Action& a) {
  const auto half = [](char letter, int chunk, int mb) {
    return text("%c%d", chunk ? tolower(letter) : letter, mb);
  };
  string all;
  if (a.has_forward()) all += half('F', a.chunk, a.mb);
  if (a.has_backward()) all += half('B', a.backward_chunk(), a.backward_mb());
  if (a.what == Do::W) all += half('W', a.chunk, a.mb);
  return a.count == 1 ? all : all + text("-%d", a.mb + a.count - 1);
}

// A proven schedule.
struct Plan {
  ScheduleOptions o;
  vector<ActionList> lists;
  ScheduleCheck check;

  // Calls fn(rank, action, label, begin) for what is drawn.
  void each(const auto& fn) const {
    for (int r = 0; r < o.pp; r++)
      for (size_t i = 0; i < lists[r].size(); i++)
        if (const string words = label(lists[r][i]); !words.empty())
          fn(r, lists[r][i], words, check.begin[r][i]);
  }
};

static vector<string> heading(const Plan& plan) {
  const auto& [o, lists, c] = plan;
  return {text("%s, pp = %d, %d micro-batches: bubble %.1f%%", name_of(o.kind), o.pp,
               o.micro_batches, 100 * c.bubble()),
          text("%d units of time, %d of them busy on each rank; at most %d micro-batches' "
               "activations on a rank",
               c.makespan, c.busy / o.pp, c.peak_live),
          "F forward, B backward, W weight gradients, f b w of chunk 1, F5b3 both at once "
          "(overlapped), . idle; number: micro-batch"};
}

static string draw_text(const Plan& plan) {
  size_t scale = 1;  // characters of a unit of time, so that every label fits
  plan.each([&](int, const Action& a, const string& words, int) {
    while (scale * duration(a) < words.size()) scale++;
  });
  const size_t width = scale * plan.check.makespan, band = 85 / scale * scale;
  vector<string> rows(plan.o.pp, string(width, '.'));
  plan.each([&](int rank, const Action& a, string words, int begin) {
    words.resize(scale * duration(a), '-');
    rows[rank].replace(scale * begin, words.size(), words);
  });
  string out;
  for (const string& line : heading(plan)) out += (out.empty() ? "" : "  ") + line + "\n";
  for (size_t begin = 0; begin < width; begin += band) {
    out += text("\n%8s time %d\n", "", int(begin / scale));
    for (int r = 0; r < plan.o.pp; r++)
      out += text("rank %-3d|%s|\n", r, rows[r].substr(begin, band).c_str());
  }
  return out;
}

static string draw_svg(const Plan& plan) {
  constexpr int kUnit = 20, kLeft = 60, kTop = 80, kRow = 32;
  string out = text(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\">\n"
      "<style>svg{background:#fff}rect{stroke:#fff}text{font:12px sans-serif}"
      "g text{font-size:10px;text-anchor:middle}.F{fill:#7fb2e5}.B{fill:#f0a35e}"
      ".W{fill:#7fc29b}.both{fill:#cdb9e8}.idle{fill:#ededea}</style>\n",
      max(kLeft + plan.check.makespan * kUnit, 900) + 20, kTop + plan.o.pp * kRow);
  const auto words = [&](int x, int y, const string& s) {
    out += text("<text x=\"%d\" y=\"%d\">%s</text>\n", x, y, s.c_str());
  };
  const auto box = [&](int x, int y, int units, const string& css) {
    out += text("<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"24\" class=\"%s\"/>\n", x, y,
                units * kUnit, css.c_str());
  };
  for (int i = 0; i < 3; i++) words(kLeft, 20 + 18 * i, heading(plan)[i]);
  for (int r = 0; r < plan.o.pp; r++) {
    words(8, kTop + r * kRow + 16, text("rank %d", r));
    box(kLeft, kTop + r * kRow, plan.check.makespan, "idle");
  }
  out += "<g>\n";
  plan.each([&](int rank, const Action& a, const string& s, int begin) {
    const int x = kLeft + begin * kUnit, y = kTop + rank * kRow, units = duration(a);
    box(x, y, units, a.what == Do::FB ? "both" : string(1, char(toupper(s[0]))));
    words(x + units * kUnit / 2, y + 16, s);
  });
  return out + "</g></svg>\n";
}

static string to_json(const Plan& plan) {
  const auto& [o, lists, c] = plan;
  JsonWriter w;
  w.object().members("kind", name_of(o.kind), "pp", o.pp, "micro_batches", o.micro_batches, "time",
                     c.makespan, "bubble", c.bubble(), "peak_live", c.peak_live);
  w.key("ranks").array();
  for (int r = 0; r < o.pp; r++) {
    w.array();
    for (size_t i = 0; i < lists[r].size(); i++) {
      w.object().members("action", to_text(lists[r][i]));
      if (const int time = duration(lists[r][i]))
        w.members("begin", c.begin[r][i], "duration", time);
      w.end();
    }
    w.end();
  }
  return w.end().end().str() + "\n";
}

// Of what --json prints, the actions.
static vector<ActionList> read_lists(const string& path, i64 pp) {
  const Json ranks = Json::parse_file(path)["ranks"];
  if (ranks.size() != pp)
    bad_input(ranks.place(), text("has lists of %ld ranks (need %ld)", ranks.size(), pp), "--pp");
  vector<ActionList> lists(pp);
  for (i64 r = 0; r < pp; r++)
    for (i64 i = 0; i < ranks[r].size(); i++) {
      const Json action = ranks[r][i]["action"];
      lists[r].push_back(parse_action(action.as_string(), action.place()));
    }
  return lists;
}

int run_plan(int argc, char** argv) {
  Arguments args("pith plan");
  string kind = "auto", svg, file;
  bool schedule = false, json = false;
  i64 pp = 4, micro_batches = 0;
  ScheduleOptions o;
  args.flag("--schedule", schedule, "what to plan");
  args.choice("--kind", kind, {"auto", "dualpipev", "1f1b"}, "which schedule");
  args.option("--pp", pp, "pipeline ranks", 1, 256);
  args.option("--micro-batches", micro_batches, "in a step; 0: 2 * pp + 2", 0, 4096);
  args.option("--svg", svg, "draw into this file");
  args.flag("--json", json, "print the lists of actions with their times as JSON");
  args.option("--check", file, "prove and draw the lists of this file, as --json prints them");
  if (!args.parse(argc, argv)) return kExitDone;
  if (!schedule)
    bad_input("pith plan", "does not say what to plan (need --schedule)", "--schedule");
  o.pp = int(pp);
  o.kind = schedule_kind(kind, o.pp, 1);
  o.micro_batches = int(micro_batches ? micro_batches : 2 * pp + 2);
  const auto lists = file.empty() ? make_schedules(o) : read_lists(file, pp);
  const Plan plan{o, lists, check_schedule(o, lists)};
  const string& why = plan.check.why;
  if (!plan.check.ok() && file.empty()) failed("schedule", why);
  if (!plan.check.ok()) bad_input(file, why, "the lists that pith plan --schedule --json prints");
  if (!svg.empty()) write_file_durably(svg, draw_svg(plan));
  printf("%s", (json ? to_json(plan) : draw_text(plan)).c_str());
  return kExitDone;
}

}
