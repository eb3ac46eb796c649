#include "engine/trainer.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
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
  RunState state;  // where the run goes on from
  std::optional<Checkpoint> resume_from;
  std::optional<WeightSource> init_from;
  std::optional<MetricsFile> metrics;
  std::optional<TensorBoardFile> tensorboard;
  RoutingStep routing;
  bool stopped = false;

  bool tracing() const { return !options.routing_trace.empty() || options.probe; }
  bool replaying() const { return !options.routing_replay.empty(); }
  int64_t steps() const { return options.probe ? options.probe->steps : plan.config.train.steps; }
};

// Of a step, over all ranks.
struct StepTotals {
  double loss = 0;  // mean over the labels
  bool stop = false;
  vector<double> balance_loss, counts;
};

// A rank's part of the run.
struct Trainer {
  Rank& rank;
  Run& run;
  const RunPlan& plan = run.plan;
  const RunConfig& config = plan.config;
  Probe* const probe = run.options.probe;
  Instance instance = make_instance(rank, plan.model, plan.pipeline);
  Parameters& parameters = *instance.parameters;
  ActionList actions = make_schedule(plan.schedule, rank.mesh.pp_rank);
  RunState state = run.state;
  BalanceState balance = {};
  std::optional<CheckpointSaver> saver = {};
  double began_s = 0;  // when the first step of this process did

  void start() {
    if (run.resume_from)
      load_state(rank, parameters, *run.resume_from);
    else if (run.init_from)
      load_weights(rank, parameters, *run.init_from);
    else
      initialize(rank, parameters, config.data.seed);
    const string kinds[] = {"none", "micro-batch", "sequence", "global-batch"};
    balance.kind = BalanceKind(std::ranges::find(kinds, config.router.balance_loss) - kinds);
    balance.coefficient = config.router.balance_coefficient;
    balance.num_experts = plan.shape.num_experts;
    balance.num_layers = plan.shape.num_layers;
    balance.previous = state.balance_counts;
    if (!probe)
      saver.emplace(rank, parameters, SaveOptions{config.run.folder, config.checkpoint.keep});
    began_s = now_s();
  }

  void begin_routing() {
    if (rank.id == 0) {
      begin_trace(run.routing, plan.shape.num_layers, plan.step_tokens(), plan.shape.top_k);
      if (run.replaying())
        read_routing(run.options.routing_replay, state.step + 1, plan.shape.num_experts,
                     run.routing);
      run.routing.traced = run.tracing();
    }
    barrier(rank, Group::World, "routing of the step");
  }

  // Runs the step's list and leaves reduced gradients.
  StepTotals compute_gradients() {
    LoadedBatches loaded = make_batches(rank, run.data, plan.batch, state.step, Split::Train);
    const double labels = std::max(loaded.global_labels(rank), 1.0);
    const RoutingSlot slot{&run.routing, std::move(loaded.token_index)};
    StepIo io{.batches = std::move(loaded.batches),
              .loss_scale = 1.0 / labels,
              .force_balanced = config.router.force == "balanced",
              .balance = &balance};
    if (run.tracing() || run.replaying()) {
      begin_routing();
      io.routing = &slot;
    }
    begin_step(balance, plan.step_tokens());
    zero_grads(rank, parameters);
    run_actions(rank, instance, io, plan.schedule, actions);
    reduce_replicas(rank, parameters);
    vector<double> sums = {0.0, double(stop_requested())};
    for (const double loss : io.loss) sums[0] += loss;
    sums.insert(sums.end(), balance.loss.begin(), balance.loss.end());
    sums.insert(sums.end(), balance.counts.begin(), balance.counts.end());
    all_reduce(rank, Group::World, sums.data(), int(sums.size()), Reduce::Sum,
               "all_reduce step totals");
    const auto losses = sums.begin() + 2, counts = losses + plan.shape.num_layers;
    return {sums[0] / labels, sums[1] > 0, {losses, counts}, {counts, sums.end()}};
  }

  // Copies this rank's part of every unit's `value` into full tensors by name.
  void collect(std::map<string, vector<float>>& out, Tensor FlatUnit::*value) {
    if (group_rank(rank, Group::Replicate) != 0) return;
    const std::lock_guard lock(probe->mutex);
    for (const Fragment& f : fragments(parameters)) {
      vector<float>& whole = out[f.piece->name];
      whole.resize(f.piece->dims.numel());
      const float* from = (parameters.units[f.unit].*value).f32() + f.offset;
      std::copy(from, from + f.count, whole.begin() + f.begin);
    }
  }

  void keep_gradients() {
    if (rank.id == 0 && probe) probe->routing.push_back(run.routing);
    if (rank.id == 0 && !run.options.routing_trace.empty())
      write_routing(run.options.routing_trace, state.step + 1, run.routing);
    if (!probe) return;
    for (const FlatUnit& unit : parameters.units)
      for (int64_t i = 0; unit.kind == UnitKind::Experts && i < unit.shard_count; i++)
        unit.grad_shard.f32()[i] *= float(probe->gradient_fault);
    if (state.step == 0) collect(probe->gradients, &FlatUnit::grad_shard);
  }

  // Runs a step whose loss or gradient is not finite again with every op's outputs checked, so that
  // the error names the op that made the first one.
  [[noreturn]] void explain_nonfinite(const StepMetrics& m) {
    if (saver) saver->finish(rank);  // the last good state
    const string where = text("step %ld", state.step + 1);
    string what = text("loss or gradient is not finite (got loss %g, gradient norm %g)", m.loss,
                       m.gradient_norm);
    if (rank.id == 0) log_warning("%s: %s: looking for the op", where.c_str(), what.c_str());
    try {
      rank.debug = true;
      compute_gradients();
    } catch (const Error& e) {
      what += string(": ") + e.what();
    }
    failed(where, what, "a lower optimizer.lr, or train.on_nonfinite = \"skip\"");
  }

  // One optimiser step. Returns what to publish.
  StepMetrics train_step(bool& stop) {
    const double began = now_s();
    rank.status->step = int(state.step + 1);
    rank.allocator->reset_peak();
    const StepTotals totals = compute_gradients();
    keep_gradients();
    stop = totals.stop;
    StepMetrics m{.steps = run.steps(),
                  .loss = totals.loss,
                  .gradient_norm = gradient_norm(rank, parameters),
                  .forced_balanced = config.router.force == "balanced",
                  .tokens = plan.step_tokens(),
                  .load = expert_load(totals.counts, plan.shape.num_experts)};
    if (balance.kind != BalanceKind::None) m.balance_loss = totals.balance_loss;
    m.skipped = !std::isfinite(m.loss) || !std::isfinite(m.gradient_norm);
    if (m.skipped && config.train.on_nonfinite == "stop") explain_nonfinite(m);
    AdamW adamw = config.optimizer;
    adamw.lr = m.learning_rate =
        learning_rate(config.lr_schedule, adamw.lr, state.step, config.train.steps);
    if (saver) saver->poll(rank);
    if (!m.skipped) {
      const double limit = config.optimizer.max_grad_norm;
      m.clipped = limit > 0 && m.gradient_norm > limit;
      if (m.clipped) adamw.grad_scale = limit / m.gradient_norm;
      adamw.step = ++state.updates;
      optimizer_pass(rank, parameters, adamw, saver ? &*saver : nullptr);
    }
    balance.previous = totals.counts;
    m.step = ++state.step;
    double most[] = {now_s() - began, double(rank.allocator->peak_bytes),
                     saver ? saver->take_stall() : 0.0};
    all_reduce(rank, Group::World, most, 3, Reduce::Max, "all_reduce step time");
    m.seconds = most[0];
    m.peak_memory_bytes = most[1];
    m.checkpoint_stall_s = most[2];
    m.left_s = (now_s() - began_s) / double(m.step - run.state.step) * double(m.steps - m.step);
    return m;
  }

  // By rank 0.
  void publish(const StepMetrics& m) {
    if (probe) {
      probe->loss.push_back(m.loss);
      probe->norm.push_back(m.gradient_norm);
      probe->balance.push_back(m.mean_balance_loss());
      return;
    }
    if (m.step % config.train.log_interval == 0 || m.step == m.steps || m.step == 1 || m.eval_loss)
      log_info("%s", step_line(m).c_str());
    run.metrics->append(m);
    run.tensorboard->step(m, double(time(nullptr)));
  }

  void train() {
    start();
    bool stop = false, saving = false;
    while (state.step < run.steps() && !stop) {
      StepMetrics m = train_step(stop);
      end_startup(rank);
      const bool last = m.step == m.steps;
      const auto due = [&](int64_t interval) {
        return interval > 0 && (m.step % interval == 0 || last);
      };
      if (due(config.train.eval_interval) && !probe)
        m.eval_loss = evaluate(rank, instance, run.data, plan.batch, plan.schedule).loss;
      if (rank.id == 0) {
        publish(m);
        run.stopped = stop && !last;
      }
      saving = saver && (last || stop || due(config.checkpoint.interval));
      if (!saving) continue;
      if (rank.id == 0) run.metrics->sync();
      state.samples = state.step * plan.batch.global_batch;
      state.balance_counts = balance.previous;
      saver->begin(rank, state);
    }
    if (probe) collect(probe->weights, &FlatUnit::master);
    if (saving && !saver->finish(rank))
      failed(config.run.folder, "the last checkpoint could not be saved",
             "free space there, then run the same command again: it goes on from the last good "
             "one");
    if (rank.id == 0 && run.stopped)
      log_info("stopped at step %ld; the same command goes on", state.step);
  }
};

// Log, and where the run goes on from.
void open_run(Run& run) {
  const string& folder = run.plan.config.run.folder;
  log_to_file(folder + "/log.txt");
  run.resume_from = find_checkpoint(folder);
  if (run.resume_from) {
    check_resumable(*run.resume_from, run.state);
    log_info("going on from %s", run.resume_from->folder.c_str());
    run.state.step = run.resume_from->state.step;
    run.state.updates = run.resume_from->state.updates;
    run.state.balance_counts = run.resume_from->state.balance_counts;
  }
  write_file_durably(folder + "/config.toml", run.state.config);
  run.metrics.emplace(folder + "/metrics.jsonl", run.state.step);
  run.tensorboard.emplace(folder + "/tensorboard", run.state.step + 1, double(time(nullptr)));
}

}  // namespace

bool train(const RunPlan& plan, const TrainOptions& options) {
  const RunConfig& config = plan.config;
  Run run{.plan = plan, .options = options, .data = open_data(plan)};
  run.data.require_samples(run.steps() * plan.batch.global_batch);
  if (config.train.eval_interval > 0 && !options.probe) run.data.require_heldout();
  run.state = {.seed = config.data.seed,
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
  const char* debug = getenv("PITH_DEBUG");
  const LaunchOptions launch{.startup_limit_s = config.parallel.startup_timeout_s,
                             .limit_s = config.parallel.timeout_s,
                             .exit_on_failure = options.exit_on_failure,
                             .compute = plan.compute,
                             .debug = debug && *debug == '1'};
  run_ranks(plan.mesh, plan.device, launch, [&](Rank& rank) { Trainer{rank, run}.train(); });
  if (!options.probe) log_to_file("");
  return !run.stopped;
}

}  // namespace pith
