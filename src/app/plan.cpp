// plan: pith plan.
#include <algorithm>
#include <sstream>

#include "app/arguments.h"
#include "app/commands.h"
#include "core/json.h"
#include "data/durable.h"
#include "engine/schedule.h"

namespace pith {

namespace {

// "F3", or "f3" of chunk 1; "F5b3" where two overlap; empty: not drawn.
string label(const Action& a) {
  const auto half = [](char letter, int chunk, int mb) {
    return text("%c%d", chunk ? tolower(letter) : letter, mb);
  };
  string all;
  if (a.has_forward()) all += half('F', a.chunk, a.mb);
  if (a.has_backward()) all += half('B', a.backward_chunk(), a.backward_mb());
  if (a.what == Do::W) all += half('W', a.chunk, a.mb);
  return a.count == 1 ? all : all + text("-%d", a.mb + a.count - 1);
}

vector<string> heading(const ScheduleOptions& o, const ScheduleCheck& c) {
  return {
      text("%s, pp = %d, %d micro-batches%s: bubble %.1f%%", name_of(o.kind), o.pp, o.micro_batches,
           o.forward_only ? ", forward only" : "", 100 * c.bubble()),
      text("%d units of time, %d of them busy on each rank", c.makespan, c.busy / o.pp) +
          (o.forward_only ? ""
                          : text("; at most %d micro-batches' activations on a rank", c.peak_live)),
      "F forward, B backward, W weight gradients, f b w of chunk 1, F5b3 both at once "
      "(overlapped), . idle; number: micro-batch"};
}

string draw_text(const ScheduleOptions& o, const vector<ActionList>& lists,
                 const ScheduleCheck& c) {
  size_t scale = 1;  // characters of a unit of time, so that every label fits
  for (const ActionList& list : lists)
    for (const Action& a : list)
      while (scale * duration(a) < label(a).size()) scale++;
  const size_t width = scale * c.makespan, band = 85 / scale * scale;
  vector<string> rows(o.pp, string(width, '.'));
  for (int r = 0; r < o.pp; r++)
    for (size_t i = 0; i < lists[r].size(); i++) {
      string cell = label(lists[r][i]);
      cell.resize(scale * duration(lists[r][i]), '-');
      rows[r].replace(scale * c.begin[r][i], cell.size(), cell);
    }
  string out;
  for (const string& line : heading(o, c)) out += (out.empty() ? "" : "  ") + line + "\n";
  for (size_t begin = 0; begin < width; begin += band) {
    out += text("\n%8s time %d\n", "", int(begin / scale));
    for (int r = 0; r < o.pp; r++)
      out += text("rank %-3d|%s|\n", r, rows[r].substr(begin, band).c_str());
  }
  return out;
}

string draw_svg(const ScheduleOptions& o, const vector<ActionList>& lists, const ScheduleCheck& c) {
  constexpr int kUnit = 20, kLeft = 60, kTop = 80, kRow = 32, kHeight = 24;
  string out = text(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\">\n"
      "<style>svg{background:#fff}rect{stroke:#fff}text{font:12px sans-serif}"
      "g text{font-size:10px;text-anchor:middle}.F{fill:#7fb2e5}.f{fill:#c4dcf4}.B{fill:#f0a35e}"
      ".b{fill:#fad7b3}.W{fill:#7fc29b}.w{fill:#c3e5d0}.both{fill:#cdb9e8}.idle{fill:#ededea}"
      "</style>\n",
      max(kLeft + c.makespan * kUnit, 900) + 20, kTop + o.pp * kRow);
  const auto words = [&](int x, int y, const string& s) {
    out += text("<text x=\"%d\" y=\"%d\">%s</text>\n", x, y, s.c_str());
  };
  const auto box = [&](int x, int y, int w, int h, const string& css) {
    out += text("<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" class=\"%s\"/>\n", x, y, w, h,
                css.c_str());
  };
  for (int i = 0; i < 3; i++) words(kLeft, 20 + 18 * i, heading(o, c)[i]);
  for (int r = 0; r < o.pp; r++) {
    const int y = kTop + r * kRow;
    words(8, y + 16, text("rank %d", r));
    box(kLeft, y, c.makespan * kUnit, kHeight, "idle");
    for (size_t i = 0; i < lists[r].size(); i++) {
      const Action& a = lists[r][i];
      const string s = label(a);
      const int begin = c.begin[r][i], x = kLeft + begin * kUnit, width = duration(a) * kUnit;
      if (s.empty()) continue;
      out += text("<g><title>rank %d, action %d: %s, from %d to %d</title>\n", r, int(i),
                  to_text(a).c_str(), begin, begin + duration(a));
      box(x, y, width, kHeight, a.what == Do::FB ? "both" : s.substr(0, 1));
      words(x + width / 2, y + 16, s);
      out += "</g>\n";
    }
  }
  return out + "</svg>\n";
}

// Lists as --lists prints them: a rank and one of its actions a line.
vector<ActionList> read_lists(const string& path, int pp) {
  vector<ActionList> lists(pp);
  std::istringstream in(read_text_file(path));
  int number = 0;
  for (string line; std::getline(in, line);) {
    const string place = text("%s:%d", path.c_str(), ++number);
    int rank = -1, at = 0;
    sscanf(line.c_str(), "%d %n", &rank, &at);
    if (rank < 0 || rank >= pp)
      bad_input(place, text("names no rank (got \"%s\", need 0 to %d)", line.c_str(), pp - 1),
                "a line such as 0 F0.3");
    lists[rank].push_back(parse_action(line.substr(at), place));
  }
  return lists;
}

string to_json(const ScheduleOptions& o, const vector<ActionList>& lists, const ScheduleCheck& c) {
  JsonWriter w;
  w.object().key("kind").value(name_of(o.kind)).key("pp").value(o.pp);
  w.key("micro_batches").value(o.micro_batches).key("forward_only").value(o.forward_only);
  w.key("time").value(c.makespan).key("bubble").value(c.bubble());
  w.key("peak_live").value(c.peak_live).key("ranks").array();
  for (int r = 0; r < o.pp; r++) {
    w.array();
    for (size_t i = 0; i < lists[r].size(); i++) {
      w.object().key("action").value(to_text(lists[r][i]));
      if (const int time = duration(lists[r][i]))
        w.key("begin").value(c.begin[r][i]).key("duration").value(time);
      w.end();
    }
    w.end();
  }
  return w.end().end().str() + "\n";
}

}

int run_plan(int argc, char** argv) {
  Arguments args("pith plan", "Shows the timeline of a pipeline schedule.");
  string kind = "auto", svg, file;
  bool schedule = false, print = false, json = false;
  i64 pp = 4, micro_batches = 0;
  ScheduleOptions o;
  args.flag("--schedule", schedule, "what to plan");
  args.choice("--kind", kind, {"auto", "dualpipev", "1f1b"}, "which schedule");
  args.option("--pp", pp, "pipeline ranks", 1, 256);
  args.option("--micro-batches", micro_batches, "in a step; 0: 2 * pp + 2", 0, 4096);
  args.flag("--forward-only", o.forward_only, "as in evaluation");
  args.option("--svg", svg, "draw into this file");
  args.flag("--lists", print, "print the lists of actions in place of the timeline");
  args.flag("--json", json, "print the lists with their times as JSON");
  args.option("--check", file, "prove and draw lists in the form of --lists");
  if (!args.parse(argc, argv)) return kExitDone;
  if (print && json) bad_input("pith plan", "prints --lists or --json, not both", "one of them");
  if (!schedule)
    bad_input("pith plan", "does not say what to plan (need --schedule)", "--schedule");
  o.pp = int(pp);
  o.kind = schedule_kind(kind, o.pp, 1);
  o.micro_batches = int(micro_batches ? micro_batches : 2 * pp + 2);
  const auto lists = file.empty() ? make_schedules(o) : read_lists(file, o.pp);
  const ScheduleCheck c = check_schedule(o, lists);
  if (!c.ok() && file.empty()) failed("schedule", c.why);
  if (!c.ok()) bad_input(file, c.why, "the lists that pith plan --schedule --lists prints");
  if (!svg.empty()) write_file_durably(svg, draw_svg(o, lists, c));
  if (json) printf("%s", to_json(o, lists, c).c_str());
  for (int r = 0; print && r < o.pp; r++)
    for (const Action& a : lists[r]) printf("%d %s\n", r, to_text(a).c_str());
  if (!print && !json) printf("%s", draw_text(o, lists, c).c_str());
  return kExitDone;
}

}
