#include "engine/trainer.h"

#include <algorithm>
#include <cmath>
#include <ctime>

#include "comm/launch.h"
#include "core/log.h"
#include "core/process.h"
#include "engine/batches.h"
#include "engine/checkpoint.h"
#include "engine/evaluate.h"
#include "engine/optimizer.h"
#include "engine/routing_slot.h"
#include "observe/metrics.h"
#include "observe/metrics.h"

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
  double flops_per_token = 0;
  RoutingStep routing;
  TrainResult result;

  bool tracing() const { return !options.routing_trace.empty() || options.probe; }
  bool replaying() const { return !options.routing_replay.empty(); }
  int64_t steps() const { return options.probe ? options.probe->steps : plan.config.train.steps; }
  int64_t global_tokens() const {
    return plan.batch.global_batch * plan.config.data.sequence_length;
  }
};

// What a rank keeps from step to step.
struct RankState {
  Instance instance;
  BalanceState balance;
  ActionList actions;
  int64_t step = 0, updates = 0;
  double began_s = 0;  // when the first step of this process began
  int64_t first_step = 0;
};

// Sums over the ranks of a step, in one all-reduce.
struct StepTotals {
  double loss = 0, stop = 0;
  vector<double> balance_loss, counts;
};

StepTotals reduce_totals(Rank& rank, const StepIo& io, const BalanceState& balance) {
  vector<double> all = {0.0, stop_requested() ? 1.0 : 0.0};
  for (const double loss : io.loss) all[0] += loss;
  all.insert(all.end(), balance.loss.begin(), balance.loss.end());
  all.insert(all.end(), balance.counts.begin(), balance.counts.end());
  all_reduce(rank, Group::World, all.data(), int(all.size()), Reduce::Sum,
             "all_reduce step totals");
  const auto counts = all.begin() + 2 + static_cast<ptrdiff_t>(balance.loss.size());
  return {all[0], all[1], {all.begin() + 2, counts}, {counts, all.end()}};
}

RunState state_of(const Run& run, const RankState& state) {
  RunState s = run.identity;
  s.step = state.step;
  s.updates = state.updates;
  s.samples = state.step * run.plan.batch.global_batch;
  s.balance_counts = state.balance.previous;
  return s;
}

void start(Rank& rank, Run& run, RankState& state) {
  const RunPlan& plan = run.plan;
  state.instance = make_instance(rank, plan.model, plan.pipeline);
  Parameters& parameters = *state.instance.parameters;
  if (run.resume_from) {
    load_state(rank, parameters, *run.resume_from);
    state.step = run.resume_from->state.step;
    state.updates = run.resume_from->state.updates;
    state.balance.previous = run.resume_from->state.balance_counts;
  } else if (run.init_from) {
    load_weights(rank, parameters, *run.init_from);
  } else {
    initialize(rank, parameters, plan.config.data.seed);
  }
  state.balance.kind = balance_kind(plan.config.router.balance_loss);
  state.balance.coefficient = plan.config.router.balance_coefficient;
  state.balance.num_experts = plan.shape.num_experts;
  state.balance.num_layers = plan.shape.num_layers;
  state.actions = make_schedule(plan.schedule, rank.mesh.pp_rank);
  state.first_step = state.step;
  state.began_s = now_s();
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

void plant_fault(const Run& run, Parameters& p) {
  const Probe& probe = *run.options.probe;
  for (FlatUnit& unit : p.units)
    for (int64_t i = 0; unit.kind == UnitKind::Experts && i < unit.shard_count; i++)
      unit.grad_shard.f32()[i] *= float(probe.gradient_fault);
}

// Runs the step's list and leaves reduced gradients; the totals and the gradient norm are returned.
StepTotals compute_gradients(Rank& rank, Run& run, RankState& state, LoadedBatches& loaded) {
  const double labels = loaded.global_labels(rank);
  Parameters& parameters = *state.instance.parameters;
  StepIo io;
  io.batches = std::move(loaded.batches);
  io.loss_scale = 1.0 / std::max(labels, 1.0);
  io.force_balanced = run.plan.config.router.force == "balanced";
  io.balance = &state.balance;
  RoutingSlot slot{&run.routing, std::move(loaded.token_index)};
  if (run.tracing() || run.replaying()) io.routing = &slot;
  begin_step(state.balance, run.global_tokens());
  zero_grads(rank, parameters);
  run_actions(rank, state.instance, io, run.plan.schedule, state.actions);
  reduce_replicas(rank, parameters);
  StepTotals totals = reduce_totals(rank, io, state.balance);
  totals.loss /= std::max(labels, 1.0);
  return totals;
}

void prepare_routing(Rank& rank, Run& run, const RankState& state) {
  if (!run.tracing() && !run.replaying()) return;
  if (rank.id == 0) {
    const ModelShape& shape = run.plan.shape;
    begin_trace(run.routing, shape.num_layers, run.global_tokens(), shape.top_k);
    if (run.replaying())
      read_routing(run.options.routing_replay, state.step + 1, shape.num_experts, run.routing);
    run.routing.traced = run.tracing();
  }
  barrier(rank, Group::World, "routing of the step");
}

void finish_routing(Rank& rank, Run& run, const RankState& state) {
  if (!run.tracing() || rank.id != 0) return;
  if (run.options.probe) run.options.probe->routing.push_back(run.routing);
  if (!run.options.routing_trace.empty())
    write_routing(run.options.routing_trace, state.step + 1, run.routing);
}

// A step whose loss or gradient is not finite, under "stop": runs it again with every op's outputs
// checked, so that the error names the op that made the first one.
[[noreturn]] void explain_nonfinite(Rank& rank, Run& run, RankState& state, double loss,
                                    double norm) {
  const string where = text("step %ld", state.step + 1);
  const string what =
      text("loss or gradient is not finite (got loss %g, gradient norm %g)", loss, norm);
  const char* remedy = "a lower optimizer.lr, or train.on_nonfinite = \"skip\"";
  if (rank.id == 0) log_warning("%s: %s: looking for the op", where.c_str(), what.c_str());
  try {
    rank.debug = true;
    LoadedBatches loaded = make_batches(rank, run.data, run.plan.batch, state.step, Split::Train);
    prepare_routing(rank, run, state);
    compute_gradients(rank, run, state, loaded);
  } catch (const Error& e) {
    failed(where, what + ": " + e.what(), remedy);
  }
  failed(where, what, remedy);
}

void publish(Run& run, const StepMetrics& m) {
  const int64_t interval = run.plan.config.train.log_interval;
  if (run.options.probe) return;
  if (m.step % interval == 0 || m.step == m.steps || m.step == 1 || m.eval_loss)
    log_info("%s", step_line(m).c_str());
  if (run.metrics) run.metrics->append(m);
  if (run.tensorboard) run.tensorboard->step(m, double(time(nullptr)));
}

// One optimiser step. Returns what to publish.
StepMetrics train_step(Rank& rank, Run& run, RankState& state, CheckpointSaver* saver, bool& stop) {
  const RunConfig& config = run.plan.config;
  Parameters& parameters = *state.instance.parameters;
  const double began = now_s();
  rank.status->step = int(state.step + 1);
  rank.allocator->reset_peak();
  LoadedBatches loaded = make_batches(rank, run.data, run.plan.batch, state.step, Split::Train);
  prepare_routing(rank, run, state);
  const StepTotals totals = compute_gradients(rank, run, state, loaded);
  finish_routing(rank, run, state);
  Probe* probe = run.options.probe;
  if (probe) plant_fault(run, parameters);
  if (probe && state.step == 0)
    collect(rank, parameters, *probe, probe->gradients,
            [](const FlatUnit& u) { return u.grad_shard; });
  StepMetrics m;
  m.gradient_norm = gradient_norm(rank, parameters);
  m.loss = totals.loss;
  m.learning_rate =
      learning_rate(config.lr_schedule, config.optimizer.lr, state.step, config.train.steps);
  const bool finite = std::isfinite(m.loss) && std::isfinite(m.gradient_norm);
  if (!finite && config.train.on_nonfinite == "stop") {
    if (saver) saver->finish(rank);  // the last good state
    explain_nonfinite(rank, run, state, m.loss, m.gradient_norm);
  }
  m.skipped = !finite;
  if (saver) saver->poll(rank);
  if (finite) {
    const double limit = config.optimizer.max_grad_norm;
    m.clipped = limit > 0 && m.gradient_norm > limit;
    const AdamW adamw{.lr = m.learning_rate,
                      .beta1 = config.optimizer.beta1,
                      .beta2 = config.optimizer.beta2,
                      .eps = config.optimizer.eps,
                      .weight_decay = config.optimizer.weight_decay,
                      .grad_scale = m.clipped ? limit / m.gradient_norm : 1.0,
                      .step = ++state.updates};
    optimizer_pass(rank, parameters, adamw, saver);
  }
  state.balance.previous = totals.counts;
  state.step++;
  m.step = state.step;
  m.steps = run.steps();
  m.tokens = run.global_tokens();
  if (config.router.force == "balanced") m.router_forced = config.router.force;
  if (state.balance.kind != BalanceKind::None) m.balance_loss = totals.balance_loss;
  m.load = expert_load(totals.counts, run.plan.shape.num_experts);
  double most[] = {now_s() - began, double(rank.allocator->peak_bytes),
                   saver ? saver->take_stall() : 0.0};
  all_reduce(rank, Group::World, most, 3, Reduce::Max, "all_reduce step time");
  m.seconds = most[0];
  m.peak_memory_bytes = most[1];
  m.checkpoint_stall_s = most[2];
  const double pace =
      (now_s() - state.began_s) / double(std::max<int64_t>(1, state.step - state.first_step));
  m.left_s = pace * double(m.steps - m.step);
  stop = totals.stop > 0;
  return m;
}

bool due(int64_t interval, int64_t step) { return interval > 0 && step % interval == 0; }

void train_rank(Rank& rank, Run& run) {
  const RunConfig& config = run.plan.config;
  Probe* probe = run.options.probe;
  RankState state;
  start(rank, run, state);
  std::optional<CheckpointSaver> saver;
  if (!probe)
    saver.emplace(rank, *state.instance.parameters,
                  SaveOptions{config.run.folder, config.checkpoint.keep});
  bool stop = false;
  int64_t saved = run.resume_from ? state.step : -1;
  while (state.step < run.steps() && !stop) {
    StepMetrics m = train_step(rank, run, state, saver ? &*saver : nullptr, stop);
    end_startup(rank);
    const bool last = state.step == run.steps() || stop;
    if (!probe && run.data.heldout_samples() > 0 && config.train.eval_interval > 0 &&
        (due(config.train.eval_interval, state.step) || (last && !stop))) {
      m.eval_loss = evaluate(rank, state.instance, run.data, run.plan.batch, run.plan.schedule,
                             config.train.eval_batches)
                        .loss;
    }
    if (rank.id == 0) {
      publish(run, m);
      run.result.step = state.step;
      run.result.loss = m.loss;
      run.result.stopped = stop && state.step < run.steps();
      if (m.eval_loss) run.result.eval_loss = *m.eval_loss;
      if (probe) {
        probe->loss.push_back(m.loss);
        probe->norm.push_back(m.gradient_norm);
        probe->balance.push_back(m.mean_balance_loss());
      }
    }
    if (saver && (last || due(config.checkpoint.interval, state.step))) {
      if (rank.id == 0 && run.metrics) run.metrics->sync();
      saver->begin(rank, state_of(run, state));
      saved = state.step;
    }
  }
  if (probe)
    collect(rank, *state.instance.parameters, *probe, probe->weights,
            [](const FlatUnit& u) { return u.master; });
  if (!saver) return;
  if (saved == state.step && !saver->finish(rank))
    failed(config.run.folder, "the last checkpoint could not be saved",
           "free space there, then run the same command again: it goes on from the last good "
           "one");
}

// Folder, lock, log, and where the run goes on from.
void open_run(Run& run) {
  const RunConfig& config = run.plan.config;
  const string& folder = config.run.folder;
  run.resume_from = find_checkpoint(folder);
  if (run.resume_from) {
    check_resumable(*run.resume_from, run.identity);
    log_info("going on from %s", run.resume_from->folder.c_str());
  }
  const int64_t step = run.resume_from ? run.resume_from->state.step : 0;
  write_file_durably(folder + "/config.toml", to_toml(config));
  run.metrics.emplace(folder + "/metrics.jsonl", step);
  run.tensorboard.emplace(folder + "/tensorboard", step + 1, double(time(nullptr)));
}

}  // namespace

TrainResult train(const RunPlan& plan, const TrainOptions& options) {
  const RunConfig& config = plan.config;
  Run run{.plan = plan,
          .options = options,
          .data = Dataset(find_token_files(config.data.path), data_options(plan))};
  const int64_t needed = run.steps() * plan.batch.global_batch;
  run.data.require_samples(needed);
  run.identity = {.seed = config.data.seed,
                  .data_fingerprint = run.data.fingerprint(),
                  .config = to_toml(config),
                  .model = plan.model.dump(2)};
  run.flops_per_token = flops_per_token(plan);
  if (config.train.eval_interval > 0 && !options.probe) run.data.require_heldout();
  // Before anything is written.
  if (!config.model.init_from.empty() && list_checkpoints(config.run.folder).empty()) {
    run.init_from = open_weights(config.model.init_from);
    check_weights(*run.init_from, whole_table(plan.model));
  }
  std::optional<RunLock> lock;
  if (!options.probe) {
    lock.emplace(config.run.folder);
    log_to_file(config.run.folder + "/log.txt");
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
