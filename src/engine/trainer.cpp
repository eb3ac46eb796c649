#include "engine/trainer.h"

#include <algorithm>
#include <cmath>
#include <ctime>

#include "comm/launch.h"
#include "core/allocator.h"
#include "core/log.h"
#include "core/process.h"
#include "engine/batches.h"
#include "engine/checkpoint.h"
#include "engine/evaluate.h"
#include "engine/routing_slot.h"
#include "observe/metrics.h"
#include "observe/tensorboard.h"

namespace pith {
namespace {

// What the ranks of a run share. Written by the main thread before they start, and by rank 0.
struct Run {
  const RunPlan& plan;
  const TrainOptions& options;
  Dataset data;
  RunState identity;  // what a resumed run must agree with
  std::optional<Checkpoint> resume_from;
  std::optional<WeightSource> init_from;
  std::optional<MetricsFile> metrics;
  std::optional<TensorBoardFile> tensorboard;
  RoutingStep routing;
  TrainResult result;

  bool tracing() const { return !options.routing_trace.empty() || options.probe; }
  bool replaying() const { return !options.routing_replay.empty(); }
  int64_t steps() const { return options.probe ? options.probe->steps : plan.config.train.steps; }
};

// What a rank keeps from step to step.
struct RankState {
  Instance instance;
  BalanceState balance;
  ActionList actions;
  int64_t step = 0, updates = 0;
  int64_t first_step = 0;
  double began_s = 0;  // when the first step of this process did
};

RankState start(Rank& rank, const Run& run) {
  const RunPlan& plan = run.plan;
  const auto& router = plan.config.router;
  RankState state{.instance = make_instance(rank, plan.model, plan.pipeline),
                  .actions = make_schedule(plan.schedule, rank.mesh.pp_rank)};
  const string kinds[] = {"none", "micro-batch", "sequence", "global-batch"};
  state.balance = {.kind = BalanceKind(std::ranges::find(kinds, router.balance_loss) - kinds),
                   .coefficient = router.balance_coefficient,
                   .num_experts = plan.shape.num_experts,
                   .num_layers = plan.shape.num_layers};
  Parameters& parameters = *state.instance.parameters;
  if (run.resume_from) {
    load_state(rank, parameters, *run.resume_from);
    state.step = state.first_step = run.resume_from->state.step;
    state.updates = run.resume_from->state.updates;
    state.balance.previous = run.resume_from->state.balance_counts;
  } else if (run.init_from) {
    load_weights(rank, parameters, *run.init_from);
  } else {
    initialize(rank, parameters, plan.config.data.seed);
  }
  state.began_s = now_s();
  return state;
}

// Copies this rank's part of `value(unit)` into full tensors by name.
template <class Value>
void collect(Rank& rank, const Parameters& p, Probe& probe, std::map<string, vector<float>>& out,
             Value value) {
  if (group_rank(rank, Group::Replicate) != 0) return;
  const std::lock_guard lock(probe.mutex);
  for (const Fragment& f : fragments(p)) {
    vector<float>& whole = out[f.piece->name];
    whole.resize(f.piece->dims.numel());
    const float* from = value(p.units[f.unit]).f32() + f.offset;
    std::copy(from, from + f.count, whole.begin() + f.begin);
  }
}

void probe_gradients(Rank& rank, const Parameters& p, Probe& probe, int64_t step) {
  for (const FlatUnit& unit : p.units)
    for (int64_t i = 0; unit.kind == UnitKind::Experts && i < unit.shard_count; i++)
      unit.grad_shard.f32()[i] *= float(probe.gradient_fault);
  if (step == 0)
    collect(rank, p, probe, probe.gradients, [](const FlatUnit& u) { return u.grad_shard; });
}

// Of a step, over all ranks.
struct StepTotals {
  double loss = 0;  // mean over the labels
  bool stop = false;
  vector<double> balance_loss, counts;
};

// Runs the step's list and leaves reduced gradients.
StepTotals compute_gradients(Rank& rank, Run& run, RankState& state) {
  const RunPlan& plan = run.plan;
  const ModelShape& shape = plan.shape;
  if (run.tracing() || run.replaying()) {
    if (rank.id == 0) {
      begin_trace(run.routing, shape.num_layers, plan.step_tokens(), shape.top_k);
      if (run.replaying())
        read_routing(run.options.routing_replay, state.step + 1, shape.num_experts, run.routing);
      run.routing.traced = run.tracing();
    }
    barrier(rank, Group::World, "routing of the step");
  }
  LoadedBatches loaded = make_batches(rank, run.data, plan.batch, state.step, Split::Train);
  const double labels = std::max(loaded.global_labels(rank), 1.0);
  const RoutingSlot slot{&run.routing, std::move(loaded.token_index)};
  StepIo io{.batches = std::move(loaded.batches),
            .loss_scale = 1.0 / labels,
            .force_balanced = plan.config.router.force == "balanced",
            .balance = &state.balance};
  if (run.tracing() || run.replaying()) io.routing = &slot;
  Parameters& parameters = *state.instance.parameters;
  begin_step(state.balance, plan.step_tokens());
  zero_grads(rank, parameters);
  run_actions(rank, state.instance, io, plan.schedule, state.actions);
  reduce_replicas(rank, parameters);
  const vector<double>&losses = state.balance.loss, &counts = state.balance.counts;
  vector<double> sums = {0.0, double(stop_requested())};
  for (const double loss : io.loss) sums[0] += loss;
  sums.insert(sums.end(), losses.begin(), losses.end());
  sums.insert(sums.end(), counts.begin(), counts.end());
  all_reduce(rank, Group::World, sums.data(), int(sums.size()), Reduce::Sum,
             "all_reduce step totals");
  const auto balance = sums.begin() + 2, rest = balance + shape.num_layers;
  return {sums[0] / labels, sums[1] > 0, {balance, rest}, {rest, sums.end()}};
}

// A step whose loss or gradient is not finite, under "stop": runs it again with every op's outputs
// checked, so that the error names the op that made the first one.
[[noreturn]] void explain_nonfinite(Rank& rank, Run& run, RankState& state, const StepMetrics& m) {
  const string where = text("step %ld", state.step + 1);
  string what = text("loss or gradient is not finite (got loss %g, gradient norm %g)", m.loss,
                     m.gradient_norm);
  if (rank.id == 0) log_warning("%s: %s: looking for the op", where.c_str(), what.c_str());
  try {
    rank.debug = true;
    compute_gradients(rank, run, state);
  } catch (const Error& e) {
    what += string(": ") + e.what();
  }
  failed(where, what, "a lower optimizer.lr, or train.on_nonfinite = \"skip\"");
}

// One optimiser step. Returns what to publish.
StepMetrics train_step(Rank& rank, Run& run, RankState& state, CheckpointSaver* saver, bool& stop) {
  const RunConfig& config = run.plan.config;
  const auto& optimizer = config.optimizer;
  Parameters& parameters = *state.instance.parameters;
  Probe* probe = run.options.probe;
  const double began = now_s();
  rank.status->step = int(state.step + 1);
  rank.allocator->reset_peak();
  const StepTotals totals = compute_gradients(rank, run, state);
  if (rank.id == 0 && probe) probe->routing.push_back(run.routing);
  if (rank.id == 0 && !run.options.routing_trace.empty())
    write_routing(run.options.routing_trace, state.step + 1, run.routing);
  if (probe) probe_gradients(rank, parameters, *probe, state.step);
  StepMetrics m{.steps = run.steps(),
                .loss = totals.loss,
                .gradient_norm = gradient_norm(rank, parameters),
                .forced_balanced = config.router.force == "balanced",
                .tokens = run.plan.step_tokens(),
                .load = expert_load(totals.counts, run.plan.shape.num_experts)};
  if (state.balance.kind != BalanceKind::None) m.balance_loss = totals.balance_loss;
  m.learning_rate = learning_rate(config.lr_schedule, optimizer.lr, state.step, config.train.steps);
  m.skipped = !std::isfinite(m.loss) || !std::isfinite(m.gradient_norm);
  if (m.skipped && config.train.on_nonfinite == "stop") {
    if (saver) saver->finish(rank);  // the last good state
    explain_nonfinite(rank, run, state, m);
  }
  if (saver) saver->poll(rank);
  if (!m.skipped) {
    m.clipped = optimizer.max_grad_norm > 0 && m.gradient_norm > optimizer.max_grad_norm;
    const AdamW adamw{.lr = m.learning_rate,
                      .beta1 = optimizer.beta1,
                      .beta2 = optimizer.beta2,
                      .eps = optimizer.eps,
                      .weight_decay = optimizer.weight_decay,
                      .grad_scale = m.clipped ? optimizer.max_grad_norm / m.gradient_norm : 1.0,
                      .step = ++state.updates};
    optimizer_pass(rank, parameters, adamw, saver);
  }
  state.balance.previous = totals.counts;
  m.step = ++state.step;
  double most[] = {now_s() - began, double(rank.allocator->peak_bytes),
                   saver ? saver->take_stall() : 0.0};
  all_reduce(rank, Group::World, most, 3, Reduce::Max, "all_reduce step time");
  m.seconds = most[0];
  m.peak_memory_bytes = most[1];
  m.checkpoint_stall_s = most[2];
  const double pace = (now_s() - state.began_s) / double(state.step - state.first_step);
  m.left_s = pace * double(m.steps - m.step);
  stop = totals.stop;
  return m;
}

// By rank 0.
void publish(Run& run, const StepMetrics& m) {
  if (Probe* probe = run.options.probe) {
    probe->loss.push_back(m.loss);
    probe->norm.push_back(m.gradient_norm);
    probe->balance.push_back(m.mean_balance_loss());
    return;
  }
  if (m.step % run.plan.config.train.log_interval == 0 || m.step == m.steps || m.step == 1 ||
      m.eval_loss)
    log_info("%s", step_line(m).c_str());
  run.metrics->append(m);
  run.tensorboard->step(m, double(time(nullptr)));
}

void train_rank(Rank& rank, Run& run) {
  const RunConfig& config = run.plan.config;
  Probe* probe = run.options.probe;
  RankState state = start(rank, run);
  Parameters& parameters = *state.instance.parameters;
  std::optional<CheckpointSaver> saver;
  if (!probe)
    saver.emplace(rank, parameters, SaveOptions{config.run.folder, config.checkpoint.keep});
  bool stop = false, saved = false;
  while (state.step < run.steps() && !stop) {
    StepMetrics m = train_step(rank, run, state, saver ? &*saver : nullptr, stop);
    end_startup(rank);
    const bool last = state.step == run.steps();
    const auto due = [&](int64_t interval) { return interval > 0 && m.step % interval == 0; };
    const int64_t interval = config.train.eval_interval;
    if (!probe && (due(interval) || (interval > 0 && last && !stop)))
      m.eval_loss = evaluate(rank, state.instance, run.data, run.plan.batch, run.plan.schedule,
                             config.train.eval_batches)
                        .loss;
    if (rank.id == 0) {
      publish(run, m);
      run.result = {state.step, stop && !last};
    }
    saved = saver && (last || stop || due(config.checkpoint.interval));
    if (!saved) continue;
    if (rank.id == 0) run.metrics->sync();
    RunState now = run.identity;
    now.step = state.step;
    now.updates = state.updates;
    now.samples = state.step * run.plan.batch.global_batch;
    now.balance_counts = state.balance.previous;
    saver->begin(rank, now);
  }
  if (probe)
    collect(rank, parameters, *probe, probe->weights, [](const FlatUnit& u) { return u.master; });
  if (saved && !saver->finish(rank))
    failed(config.run.folder, "the last checkpoint could not be saved",
           "free space there, then run the same command again: it goes on from the last good "
           "one");
}

// Log, and where the run goes on from.
void open_run(Run& run) {
  const string& folder = run.plan.config.run.folder;
  log_to_file(folder + "/log.txt");
  run.resume_from = find_checkpoint(folder);
  if (run.resume_from) {
    check_resumable(*run.resume_from, run.identity);
    log_info("going on from %s", run.resume_from->folder.c_str());
  }
  const int64_t step = run.resume_from ? run.resume_from->state.step : 0;
  write_file_durably(folder + "/config.toml", run.identity.config);
  run.metrics.emplace(folder + "/metrics.jsonl", step);
  run.tensorboard.emplace(folder + "/tensorboard", step + 1, double(time(nullptr)));
}

}  // namespace

TrainResult train(const RunPlan& plan, const TrainOptions& options) {
  const RunConfig& config = plan.config;
  Run run{.plan = plan, .options = options, .data = open_data(plan)};
  run.data.require_samples(run.steps() * plan.batch.global_batch);
  if (config.train.eval_interval > 0 && !options.probe) run.data.require_heldout();
  run.identity = {.seed = config.data.seed,
                  .data_fingerprint = run.data.fingerprint(),
                  .config = to_toml(config),
                  .model = plan.model.dump(2)};
  // Before anything is written.
  if (!config.model.init_from.empty() && list_checkpoints(config.run.folder).empty()) {
    run.init_from = open_weights(config.model.init_from);
    check_weights(*run.init_from, whole_table(plan.model));
  }
  std::optional<RunLock> lock;
  if (!options.probe) {
    lock.emplace(config.run.folder);
    open_run(run);
  }
  const LaunchOptions launch{.startup_limit_s = config.parallel.startup_timeout_s,
                             .limit_s = config.parallel.timeout_s,
                             .exit_on_failure = options.exit_on_failure,
                             .compute = plan.compute,
                             .debug = options.debug};
  run_ranks(plan.mesh, plan.device, launch, [&](Rank& rank) { train_rank(rank, run); });
  if (!options.probe) log_to_file("");
  return run.result;
}

}  // namespace pith
