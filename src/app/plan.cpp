#include <sstream>

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

static string draw(const ScheduleOptions& o, const vector<ActionList>& lists,
    const ScheduleCheck& c, size_t most) {
  size_t scale = 1;  // characters of a unit of time
  for (const ActionList& list : lists)
    for (const Action& a : list)
      while (scale * duration(a) < label(a).size()) scale++;
  size_t width = scale * c.makespan, band = most / scale * scale;
  vector<string> rows(o.pp, string(width, '.'));
  for (int r = 0; r < o.pp; r++)
    for (size_t i = 0; i < lists[r].size(); i++) {
      string cell = label(lists[r][i]);
      cell.resize(scale * duration(lists[r][i]), '-');
      rows[r].replace(scale * c.begin[r][i], cell.size(), cell);
    }
  string out = text(
      "%s, pp = %d, %d micro-batches: bubble %.1f%%\n"
      "  %d units of time, %d of them busy on each rank; at most %d micro-batches' activations on "
      "a rank\n"
      "  F forward, B backward, W weight gradients, f b w of chunk 1, F5b3 both at once "
      "(overlapped), . idle; number: micro-batch\n",
      name_of(o.kind), o.pp, o.micro_batches, 100 * c.bubble(), c.makespan, c.busy / o.pp,
      c.peak_live);
  for (size_t begin = 0; begin < width; begin += band) {
    out += text("\n%8s time %d\n", "", int(begin / scale));
    for (int r = 0; r < o.pp; r++)
      out += text("rank %-3d|%s|\n", r, rows[r].substr(begin, band).c_str());
  }
  return out;
}

static string to_svg(const string& drawing) {
  string rows;
  int y = 2;
  size_t columns = 0;
  std::istringstream in(drawing);
  for (string line; std::getline(in, line); columns = max(columns, line.size()))
    rows += text("<text x=\"8\" y=\"%d\">", y += 18) + line + "</text>\n";
  return text(
             "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%zu\" height=\"%d\">\n"
             "<style>svg{background:#fff}text{font:12px monospace;white-space:pre}</style>\n",
             20 + 8 * columns, y + 18) +
         rows + "</svg>\n";
}

static string to_json(
    const ScheduleOptions& o, const vector<ActionList>& lists, const ScheduleCheck& c) {
  JsonWriter w;
  w.object().members("kind", name_of(o.kind), "pp", o.pp, "micro_batches", o.micro_batches, "time",
      c.makespan, "bubble", c.bubble(), "peak_live", c.peak_live);
  w.key("ranks").array();
  for (int r = 0; r < o.pp; r++) {
    w.array();
    for (size_t i = 0; i < lists[r].size(); i++) {
      w.object().members("action", to_text(lists[r][i]));
      if (int time = duration(lists[r][i])) w.members("begin", c.begin[r][i], "duration", time);
      w.end();
    }
    w.end();
  }
  return w.end().end().str() + "\n";
}

int run_plan(int argc, char** argv) {
  Arguments args("pith plan");
  string kind = "auto", svg;
  bool schedule = false, json = false;
  i64 pp = 4, micro_batches = 0;
  ScheduleOptions o;
  args.flag("--schedule", schedule, "what to plan");
  args.choice("--kind", kind, {"auto", "dualpipev", "1f1b"}, "which schedule");
  args.option("--pp", pp, "pipeline ranks", 1, 256);
  args.option("--micro-batches", micro_batches, "in a step; 0: 2 * pp + 2", 0, 4096);
  args.option("--svg", svg, "draw into this file");
  args.flag("--json", json, "print the lists of actions with times");
  if (!args.parse(argc, argv)) return kExitDone;
  if (!schedule)
    bad_input("pith plan", "does not say what to plan (need --schedule)", "--schedule");
  o.pp = int(pp);
  o.kind = schedule_kind(kind, o.pp, 1);
  o.micro_batches = int(micro_batches ? micro_batches : 2 * pp + 2);
  const vector<ActionList> lists = make_schedules(o);
  const ScheduleCheck check = check_schedule(o, lists);
  if (!check.ok()) failed("schedule", check.why);
  if (!svg.empty()) write_file_durably(svg, to_svg(draw(o, lists, check, 1 << 20)));
  printf("%s", (json ? to_json(o, lists, check) : draw(o, lists, check, 85)).c_str());
  return kExitDone;
}

}
