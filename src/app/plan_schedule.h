// plan_schedule: the timeline of a pipeline schedule, and the check of lists in a file.
// defines: SchedulePlan, plan_schedule
#pragma once
#include "engine/schedule.h"

namespace pith {

struct SchedulePlan {
  ScheduleOptions options;
  string check;        // file of lists to prove in place of our own; empty: none
  string svg;          // file to draw into; empty: none
  bool lists = false;  // print the lists, in the form that `check` reads, and no timeline
  bool json = false;
  int64_t columns = 0;  // of the terminal's timeline; 0: as wide as the terminal, or 100
};

// Prints the timeline of all ranks under equal costs of forward, input gradient and weight
// gradient. With `check`, pp, micro-batches and the rest are what the file shows; its first faulty
// action is an error (exit code 2) that names the line.
int plan_schedule(const SchedulePlan& plan);

// The timeline as text, `columns` wide, and as an SVG document.
string draw_text(const ScheduleOptions& options, const vector<ActionList>& lists,
                 const ScheduleCheck& check, int columns, bool colors);
string draw_svg(const ScheduleOptions& options, const vector<ActionList>& lists,
                const ScheduleCheck& check);

}  // namespace pith
