// plan: pith plan.
#include "app/arguments.h"
#include "app/commands.h"
#include "app/plan_schedule.h"

namespace pith {

int run_plan(int argc, char** argv) {
  Arguments args("pith plan", "Shows what a run would do, without running it.");
  SchedulePlan a;
  string kind = "auto";
  bool schedule = false;
  int64_t pp = 4, micro_batches = 0, ep = 1, batch = 1;
  args.flag("--schedule", schedule, "the timeline of a pipeline schedule");
  args.choice("--kind", kind, {"auto", "dualpipev", "1f1b"}, "which schedule");
  args.option("--pp", pp, "pipeline ranks", 1, 256);
  args.option("--micro-batches", micro_batches, "in a step; 0: 2 * pp + 2", 0, 4096);
  args.option("--ep", ep, "expert parallelism: what auto chooses by", 1, 1024);
  args.option("--weight-grad-batch", batch, "micro-batches whose weight gradients run together", 1,
              64);
  args.flag("--forward-only", a.options.forward_only, "as in evaluation");
  args.option("--svg", a.svg, "draw into this file");
  args.option("--check", a.check, "prove the lists in this file, in the form of --lists");
  args.flag("--lists", a.lists, "print the lists of actions in place of the timeline");
  args.option("--columns", a.columns, "width of the timeline; 0: the terminal's", 0, 100000);
  args.flag("--json", a.json, "print times and actions as JSON");
  if (!args.parse(argc, argv)) return kExitDone;
  if (!schedule)
    bad_input("pith plan", "does not say what to plan (need --schedule)", "--schedule");
  a.options.pp = int(pp);
  a.options.kind = schedule_kind(kind, a.options.pp, int(ep));
  a.options.micro_batches = int(micro_batches ? micro_batches : 2 * pp + 2);
  a.options.weight_grad_batch = int(batch);
  return plan_schedule(a);
}

}  // namespace pith
