#include "app/plan_schedule.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/json.h"
#include "data/durable.h"

namespace pith {

namespace {

// What a cell shows. An overlapped action is two: its forward above its backward.
enum class Paint : uint8_t { Forward, Backward, Weights };
constexpr struct {
  const char* name;
  char letter;
  const char *fill[2], *ansi[2];  // by chunk
} kPaints[] = {
    {"forward", 'F', {"#7fb2e5", "#c4dcf4"}, {"\x1b[30;104m", "\x1b[30;46m"}},
    {"backward", 'B', {"#f0a35e", "#fad7b3"}, {"\x1b[30;103m", "\x1b[30;43m"}},
    {"weight gradients", 'W', {"#7fc29b", "#c3e5d0"}, {"\x1b[30;102m", "\x1b[30;42m"}},
};

bool is_compute(const Action& a) {
  return a.what == Do::F || a.what == Do::B || a.what == Do::W || a.what == Do::FB;
}

Paint paint_of(const Action& a) {
  if (a.what == Do::B) return Paint::Backward;
  return a.what == Do::W ? Paint::Weights : Paint::Forward;
}

string title(const ScheduleOptions& o, const ScheduleCheck& c) {
  return text("%s, pp = %d, %d micro-batches%s: bubble %.1f%%", name_of(o.kind), o.pp,
              o.micro_batches, o.forward_only ? ", forward only" : "", 100 * c.bubble());
}

string facts(const ScheduleOptions& o, const ScheduleCheck& c) {
  string facts =
      text("%g units of time, %g of them busy on each rank", c.makespan, c.busy / c.ranks);
  if (o.forward_only) return facts;
  return facts + text(
                     "; at most %d micro-batches' activations on a rank, %d with deferred weight "
                     "gradients",
                     c.peak_live, c.peak_deferred);
}

double idle_share(const ScheduleCheck& c, const vector<ActionList>& lists, int rank) {
  double busy = 0;
  for (size_t i = 0; i < lists[rank].size(); i++)
    if (is_compute(lists[rank][i])) busy += c.times[rank][i].end - c.times[rank][i].begin;
  return c.makespan > 0 ? 1 - busy / c.makespan : 0;
}

// ---- Terminal ----

// "F3", or "f3" of chunk 1; "F5b3" where two overlap.
string cell_text(const Action& a) {
  const auto half = [](Paint paint, int chunk, int mb) {
    const char letter = kPaints[int(paint)].letter;
    return text("%c%d", chunk ? char(letter + 32) : letter, mb);
  };
  string first = half(paint_of(a), a.chunk, a.mb);
  if (a.count > 1) first += text("-%d", a.mb + a.count - 1);
  return a.what == Do::FB ? first + half(Paint::Backward, a.chunk2, a.mb2) : first;
}

// One rank's characters, and for each which paint and chunk it has (-1: idle).
struct TextRow {
  string characters;
  vector<int> color;
};

TextRow text_row(const ActionList& list, const vector<ActionTime>& times, double makespan,
                 int scale, bool colors) {
  const auto width = size_t(std::lround(makespan * scale));
  TextRow row{string(width, colors ? ' ' : '.'), vector<int>(width, -1)};
  for (size_t i = 0; i < list.size(); i++) {
    const Action& a = list[i];
    if (!is_compute(a)) continue;
    const auto begin = size_t(std::lround(times[i].begin * scale));
    const auto end = size_t(std::lround(times[i].end * scale));
    string label = cell_text(a);
    label.resize(end - begin, colors ? ' ' : '-');
    for (size_t x = begin; x < end; x++) {
      const bool second = a.what == Do::FB && 2 * (x - begin) >= end - begin;
      const Paint paint = second ? Paint::Backward : paint_of(a);
      row.characters[x] = label[x - begin];
      row.color[x] = 2 * int(paint) + (second ? a.chunk2 : a.chunk);
    }
  }
  return row;
}

string colored(const TextRow& row, size_t begin, size_t end, bool colors) {
  string out;
  for (size_t x = begin; x < end; x++) {
    const int color = row.color[x];
    if (colors && (x == begin || color != row.color[x - 1]))
      out += color < 0 ? "\x1b[0m" : kPaints[color / 2].ansi[color % 2];
    out += row.characters[x];
  }
  return colors ? out + "\x1b[0m" : out;
}

string text_legend(const ScheduleOptions& o, bool colors) {
  string out = "  ";
  for (const auto& paint : kPaints) {
    const string sample = text(" %c ", paint.letter);
    out += colors ? paint.ansi[0] + sample + "\x1b[0m " : text("%c ", paint.letter);
    out += string(paint.name) + ", ";
    if (o.forward_only) break;
  }
  if (chunks_of(o.kind) == 2)
    out += o.forward_only ? "f of chunk 1, " : "f b w of chunk 1, F5b3 both at once (overlapped), ";
  return out + (colors ? "blank" : ".") + " idle; number: micro-batch\n";
}

}  // namespace

string draw_text(const ScheduleOptions& o, const vector<ActionList>& lists, const ScheduleCheck& c,
                 int columns, bool colors) {
  constexpr int kMargin = 9 + 6;  // "rank 12 |" and "| 100%"
  const int room = std::max(columns - kMargin, 20);
  const double units = std::max(c.makespan, 1.0);
  int scale = 1;  // characters of a unit, so that every label fits
  for (size_t r = 0; r < lists.size(); r++)
    for (size_t i = 0; i < lists[r].size(); i++) {
      const double length = c.times[r][i].end - c.times[r][i].begin;
      while (is_compute(lists[r][i]) && scale * length < cell_text(lists[r][i]).size()) scale++;
    }
  scale = std::max(scale, std::min(int(room / units), 4));
  const size_t width = std::lround(units * scale);
  vector<TextRow> rows;
  for (size_t r = 0; r < lists.size(); r++)
    rows.push_back(text_row(lists[r], c.times[r], units, scale, colors));
  string out = title(o, c) + "\n  " + facts(o, c) + "\n" + text_legend(o, colors);
  // As many bands as the length takes, of equal length, cut between units.
  const double bands = std::ceil(units / std::max(room / scale, 1));
  const size_t band = size_t(std::ceil(units / bands)) * scale;
  for (size_t begin = 0; begin < width; begin += band) {
    const size_t end = std::min(begin + band, width);
    out += text("\n%8s time %g\n", "", double(begin) / scale);
    for (size_t r = 0; r < rows.size(); r++) {
      out += text("rank %-3d|", int(r)) + colored(rows[r], begin, end, colors);
      out += end == width ? text("|%3.0f%% idle\n", 100 * idle_share(c, lists, r)) : "|\n";
    }
  }
  return out;
}

// ---- SVG ----

namespace {

struct SvgWriter {
  double unit;  // pixels of a unit of time
  string out = {};

  void add(const string& element) { out += element + "\n"; }
  void words(double x, double y, const char* style, const string& s) {
    add(text("<text x=\"%.1f\" y=\"%.1f\" class=\"%s\">%s</text>", x, y, style, s.c_str()));
  }
  // A filled box with the micro-batches' numbers where they fit.
  void box(double x, double y, double w, double h, Paint paint, int chunk, int mb, int count = 1) {
    add(text("<rect x=\"%.2f\" y=\"%.1f\" width=\"%.2f\" height=\"%.1f\" fill=\"%s\"/>", x, y, w, h,
             kPaints[int(paint)].fill[chunk]));
    const string number = count > 1 ? text("%d-%d", mb, mb + count - 1) : text("%d", mb);
    if (mb >= 0 && w >= 5.6 * double(number.size()) + 2)
      words(x + w / 2, y + h / 2 + 3.5, "n", number);
  }
};

constexpr double kLeft = 64, kTop = 92, kRow = 34, kGap = 8;

void svg_row(SvgWriter& svg, const ActionList& list, const vector<ActionTime>& times, int rank) {
  const double y = kTop + rank * (kRow + kGap);
  for (size_t i = 0; i < list.size(); i++) {
    const Action& a = list[i];
    if (!is_compute(a)) continue;
    const double x = kLeft + times[i].begin * svg.unit;
    const double w = (times[i].end - times[i].begin) * svg.unit;
    svg.add(text("<g><title>rank %d, action %d: %s, from %g to %g</title>", rank, int(i),
                 to_text(a).c_str(), times[i].begin, times[i].end));
    const double h = a.what == Do::FB ? kRow / 2 : kRow;
    svg.box(x, y, w, h, paint_of(a), a.chunk, a.mb, a.count);
    if (a.what == Do::FB) svg.box(x, y + h, w, h, Paint::Backward, a.chunk2, a.mb2);
    svg.add("</g>");
  }
}

void svg_legend(SvgWriter& svg, const ScheduleOptions& o) {
  double x = kLeft;
  const auto entry = [&](const string& name, auto draw) {
    draw(x);
    svg.words(x + 24, 74, "s", name);
    x += 42 + 5.9 * double(name.size());
  };
  for (int p = 0; p < (o.forward_only ? 1 : 3); p++)
    for (int chunk = 0; chunk < chunks_of(o.kind); chunk++)
      entry(chunks_of(o.kind) == 2 ? text("%s, chunk %d", kPaints[p].name, chunk) : kPaints[p].name,
            [&](double at) { svg.box(at, 62, 18, 14, static_cast<Paint>(p), chunk, -1); });
  if (chunks_of(o.kind) == 2 && !o.forward_only)
    entry("both at once", [&](double at) {
      svg.box(at, 62, 18, 7, Paint::Forward, 0, -1);
      svg.box(at, 69, 18, 7, Paint::Backward, 1, -1);
    });
  entry("idle", [&](double at) {
    svg.add(text("<rect x=\"%.1f\" y=\"62\" width=\"18\" height=\"14\" fill=\"#ededea\"/>", at));
  });
  svg.words(x, 74, "s", "numbers: micro-batches");
}

}  // namespace

string draw_svg(const ScheduleOptions& o, const vector<ActionList>& lists, const ScheduleCheck& c) {
  SvgWriter svg{std::clamp(1240 / std::max(c.makespan, 1.0), 7.0, 30.0)};
  const double length = c.makespan * svg.unit;
  const double bottom = kTop + double(lists.size()) * (kRow + kGap);
  const double width = std::max(kLeft + length + 84, o.forward_only           ? 600.0
                                                     : chunks_of(o.kind) == 2 ? 1220.0
                                                                              : 640.0);
  svg.add(
      text("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%.0f\" height=\"%.0f\" "
           "viewBox=\"0 0 %.0f %.0f\" font-family=\"Helvetica, Arial, sans-serif\">",
           width, bottom + 34, width, bottom + 34));
  svg.add(
      "<style>.t{font-size:16px;font-weight:bold;fill:#222}.s{font-size:12px;fill:#444}"
      ".n{font-size:10px;fill:#222;text-anchor:middle}.a{font-size:11px;fill:#777;"
      "text-anchor:middle}.r{font-size:12px;fill:#222;text-anchor:end}"
      "rect{stroke:#fff;stroke-width:0.8}</style>");
  svg.add("<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>");
  svg.words(kLeft, 26, "t", title(o, c));
  svg.words(kLeft, 46, "s", facts(o, c));
  svg_legend(svg, o);
  for (size_t r = 0; r < lists.size(); r++) {
    const double y = kTop + double(r) * (kRow + kGap);
    svg.words(kLeft - 8, y + kRow / 2 + 4, "r", text("rank %d", int(r)));
    svg.add(text("<rect x=\"%.1f\" y=\"%.1f\" width=\"%.2f\" height=\"%.1f\" fill=\"#ededea\"/>",
                 kLeft, y, length, kRow));
    svg_row(svg, lists[r], c.times[r], int(r));
    svg.words(kLeft + length + 8, y + kRow / 2 + 4, "s",
              text("%.0f%% idle", 100 * idle_share(c, lists, int(r))));
  }
  svg.words(kLeft - 8, bottom + 14, "r", "time");
  const int tick = svg.unit >= 14 ? 5 : svg.unit >= 9 ? 10 : 20;
  for (int at = 0; at <= c.makespan; at += tick) {
    const double x = kLeft + at * svg.unit;
    svg.add(text("<path d=\"M%.1f %.1fV%.1f\" stroke=\"#999\" stroke-width=\"0.8\"/>", x,
                 bottom - kGap + 2, bottom));
    svg.words(x, bottom + 14, "a", text("%d", at));
  }
  svg.add("</svg>");
  return svg.out;
}

// ---- The command ----

namespace {

// Lists read from a file: "rank N" begins a rank's, then one action a line; # begins a comment.
struct ListFile {
  vector<ActionList> lists;
  vector<vector<int>> line_of;  // of each action
};

ListFile read_lists(const string& path) {
  const string all = read_text_file(path);
  ListFile file;
  int number = 0;
  for (size_t begin = 0; begin < all.size();) {
    const size_t end = std::min(all.find('\n', begin), all.size());
    string line = all.substr(begin, end - begin);
    begin = end + 1;
    number++;
    line.erase(std::min(line.find('#'), line.size()));
    line.erase(line.find_last_not_of(" \t\r") + 1);
    line.erase(0, std::min(line.find_first_not_of(" \t"), line.size()));
    const string place = text("%s:%d", path.c_str(), number);
    if (line.empty()) continue;
    if (line.starts_with("rank ")) {
      const string next = text("rank %d", int(file.lists.size()));
      if (line != next)
        bad_input(place,
                  text("begins another rank (got \"%s\", need \"%s\")", line.c_str(), next.c_str()),
                  "the ranks in order, from 0");
      file.lists.emplace_back();
      file.line_of.emplace_back();
      continue;
    }
    if (file.lists.empty())
      bad_input(place, text("stands before the first rank (got \"%s\")", line.c_str()),
                "\"rank 0\" as the first line");
    file.lists.back().push_back(parse_action(line, place));
    file.line_of.back().push_back(number);
  }
  if (file.lists.empty()) bad_input(path, "holds no list", "pith plan --schedule --lists");
  return file;
}

// What the lists show of their options.
ScheduleOptions options_of(const vector<ActionList>& lists) {
  ScheduleOptions o{.kind = ScheduleKind::OneF1B, .pp = int(lists.size()), .forward_only = true};
  for (const ActionList& list : lists)
    for (const Action& a : list) {
      if (a.chunk == 1 || a.chunk2 == 1) o.kind = ScheduleKind::DualPipeV;
      if (a.what == Do::B || a.what == Do::FB || a.what == Do::W) o.forward_only = false;
      if (a.what == Do::Gather || a.what == Do::Reduce) o.gather_step = true;
      o.micro_batches = std::max({o.micro_batches, a.mb + a.count, a.mb2 + 1});
    }
  return o;
}

void print_json(const ScheduleOptions& o, const vector<ActionList>& lists, const ScheduleCheck& c,
                int line) {
  JsonWriter w;
  w.object().key("kind").value(name_of(o.kind)).key("pp").value(o.pp);
  w.key("micro_batches").value(o.micro_batches).key("forward_only").value(o.forward_only);
  w.key("ok").value(c.ok());
  if (!c.ok()) {
    w.key("rank").value(c.rank).key("action").value(c.action).key("line").value(line);
    w.key("why").value(c.why).end();
    printf("%s\n", w.str().c_str());
    return;
  }
  w.key("bubble").value(c.bubble()).key("time").value(c.makespan).key("busy").value(c.busy);
  w.key("peak_live").value(c.peak_live).key("peak_deferred").value(c.peak_deferred);
  w.key("ranks").array();
  for (size_t r = 0; r < lists.size(); r++) {
    w.array();
    for (size_t i = 0; i < lists[r].size(); i++)
      w.object()
          .key("action")
          .value(to_text(lists[r][i]))
          .key("begin")
          .value(c.times[r][i].begin)
          .key("end")
          .value(c.times[r][i].end)
          .end();
    w.end();
  }
  printf("%s\n", w.end().end().str().c_str());
}

void print_lists(const ScheduleOptions& o, const vector<ActionList>& lists) {
  printf("# %s, pp = %d, %d micro-batches\n", name_of(o.kind), o.pp, o.micro_batches);
  for (size_t r = 0; r < lists.size(); r++) {
    printf("rank %d\n", int(r));
    for (const Action& a : lists[r]) printf("%s\n", to_text(a).c_str());
  }
}

int terminal_columns() {
  winsize size{};
  if (isatty(STDOUT_FILENO) && ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0)
    return size.ws_col;
  return 100;
}

// Where in the file the check stopped: at the action, or at the rank's last line.
int faulty_line(const ListFile& file, const ScheduleCheck& c) {
  const vector<int>& lines = file.line_of[c.rank];
  if (lines.empty()) return 1;
  return lines[std::min<size_t>(c.action, lines.size() - 1)];
}

}  // namespace

int plan_schedule(const SchedulePlan& plan) {
  ScheduleOptions o = plan.options;
  ListFile file;
  if (plan.check.empty()) {
    file.lists = make_schedules(o);
  } else {
    file = read_lists(plan.check);
    o = options_of(file.lists);
  }
  const ScheduleCheck c = check_schedule(o, file.lists);
  const int line = c.ok() || plan.check.empty() ? 0 : faulty_line(file, c);
  if (plan.json) print_json(o, file.lists, c, line);
  if (!c.ok() && plan.check.empty()) failed("schedule", c.why);
  if (!c.ok())
    bad_input(text("%s:%d", plan.check.c_str(), line), c.why,
              text("pith plan --schedule --kind %s --pp %d --lists for lists that are right",
                   name_of(o.kind), o.pp));
  if (!plan.svg.empty()) write_file_durably(plan.svg, draw_svg(o, file.lists, c));
  if (plan.json) return kExitDone;
  if (plan.lists) {
    print_lists(o, file.lists);
    return kExitDone;
  }
  const bool colors = isatty(STDOUT_FILENO) && !getenv("NO_COLOR");
  const int columns = plan.columns ? int(plan.columns) : terminal_columns();
  printf("%s", draw_text(o, file.lists, c, columns, colors).c_str());
  if (!plan.check.empty()) printf("\n%s: right\n", plan.check.c_str());
  return kExitDone;
}

}  // namespace pith
