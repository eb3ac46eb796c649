#include "engine/trainer.h"

#include <algorithm>
#include <cstdlib>
#include <ctime>
#include <numbers>

#include "comm/launch.h"
#include "core/log.h"
#include "core/process.h"
#include "engine/batches.h"
#include "engine/evaluate.h"
#include "observe/profile.h"

namespace pith {

double learning_rate(const LrSchedule& schedule, double peak, i64 s, i64 steps) {
  double x = double(s), n = double(steps);
  double warmup = std::nearbyint(schedule.warmup_ratio * n);
  if (x < warmup) return schedule.start_lr + (peak - schedule.start_lr) * x / warmup;
  if (schedule.kind == "constant") return peak;
  bool wsd = schedule.kind == "wsd";
  double decay = wsd ? std::nearbyint(schedule.decay_ratio * n) : n - warmup;
  if (decay == 0 || x < n - decay) return peak;
  double t = min((x - (n - decay)) / decay, 1.0);
  if (wsd && schedule.decay_shape == "linear") return peak + (schedule.final_lr - peak) * t;
  return schedule.final_lr + (peak - schedule.final_lr) * (1 + std::cos(std::numbers::pi * t)) / 2;
}

void optimizer_pass(
    Rank& rank, Parameters& parameters, const AdamW& options, CheckpointSaver* saver) {
  for (size_t i = 0; i < parameters.units.size(); i++) {
    const FlatUnit& unit = parameters.units[i];
    if (saver) saver->wait_unit(int(i));
    adamw_step(rank, unit.master, unit.grad_shard, unit.m, unit.v, options);
  }
}

Trainer::Trainer(Rank& rank_in, Run& run_in) : rank(rank_in), run(run_in) {
  const string kinds[] = {"none", "micro-batch", "sequence", "global-batch"};
  balance.kind = BalanceKind(std::ranges::find(kinds, config.router.balance_loss) - kinds);
  balance.coefficient = config.router.balance_coefficient;
  balance.num_experts = plan.shape.num_experts;
  balance.num_layers = plan.shape.num_layers;
  balance.previous = state.balance_counts;
  if (run.resume_from)
    load_state(rank, parameters, *run.resume_from);
  else if (run.init_from)
    load_state(rank, parameters, *run.init_from, false);
  else
    initialize(rank, parameters, config.data.seed);
}

StepMetrics Trainer::compute_gradients() {
  const StageRange range(rank, {"step"});
  step_began_s = now_s();
  rank.status->step = int(state.step + 1);
  rank.allocator->reset_peak();
  LoadedBatches loaded = make_batches(rank, run.data, plan.batch, state.step, Split::Train);
  double labels = max(loaded.global_labels(rank), 1.0);
  const RoutingSlot slot{&run.routing, std::move(loaded.token_index)};
  StepIo io{.batches = std::move(loaded.batches),
      .loss_scale = 1.0 / labels,
      .force_balanced = config.router.force == "balanced",
      .balance = &balance};
  if (run.tracing || !run.routing_replay.empty()) {
    io.routing = &slot;
    if (rank.id == 0) {
      const ModelShape& s = plan.shape;
      begin_trace(run.routing, s.num_layers, plan.step_tokens(), s.top_k);
      if (!run.routing_replay.empty())
        read_routing(run.routing_replay, state.step + 1, s.num_experts, run.routing);
    }
    barrier(rank, Group::World, "routing of the step");
  }
  begin_step(rank, balance, plan.step_tokens());
  {
    const StageRange zeroing(rank, {"zero gradients"});
    zero_grads(rank, parameters);
  }
  run_actions(rank, instance, io, plan.schedule, actions);
  end_step(rank, balance);
  reduce_replicas(rank, parameters);
  vector<double> sums = {0.0, double(stop_requested())};
  for (const double loss : io.loss) sums[0] += loss;
  sums.insert(sums.end(), balance.loss.begin(), balance.loss.end());
  sums.insert(sums.end(), balance.counts.begin(), balance.counts.end());
  all_reduce(
      rank, Group::World, sums.data(), int(sums.size()), Reduce::Sum, "all_reduce step totals");
  auto losses = sums.begin() + 2, rest = losses + plan.shape.num_layers;
  stop = sums[1] > 0;
  counts.assign(rest, sums.end());
  StepMetrics m{.steps = config.train.steps,
      .loss = sums[0] / labels,
      .router_forced = io.force_balanced ? "balanced" : "",
      .tokens = plan.step_tokens(),
      .load = expert_load(counts, plan.shape.num_experts)};
  if (balance.kind != BalanceKind::None) m.balance_loss.assign(losses, rest);
  return m;
}

// Runs the step again with every op's outputs checked, so that the error names the op.
[[noreturn]] static void explain_nonfinite(Trainer& t, const StepMetrics& m) {
  if (t.saver) t.saver->finish(t.rank);  // the last good state
  string where = text("step %ld", t.state.step + 1);
  string what = text(
      "loss or gradient is not finite (got loss %g, gradient norm %g)", m.loss, m.gradient_norm);
  if (t.rank.id == 0) log_warning("%s: %s: looking for the op", where.c_str(), what.c_str());
  try {
    t.rank.debug = true;
    t.compute_gradients();
  } catch (const Error& e) {
    what += string(": ") + e.what();
  }
  failed(where, what, "a lower optimizer.lr, or train.on_nonfinite = \"skip\"");
}

void Trainer::update(StepMetrics& m) {
  const StageRange range(rank, {"optimizer"});
  m.gradient_norm = gradient_norm(rank, parameters);
  m.skipped = !std::isfinite(m.loss) || !std::isfinite(m.gradient_norm);
  if (m.skipped && config.train.on_nonfinite == "stop") explain_nonfinite(*this, m);
  AdamW adamw = config.optimizer;
  adamw.lr = learning_rate(config.lr_schedule, adamw.lr, state.step, m.steps);
  m.learning_rate = adamw.lr;
  if (saver) saver->poll(rank);
  if (!m.skipped) {
    double limit = config.optimizer.max_grad_norm;
    m.clipped = limit > 0 && m.gradient_norm > limit;
    if (m.clipped) adamw.grad_scale = limit / m.gradient_norm;
    adamw.step = ++state.updates;
    optimizer_pass(rank, parameters, adamw, saver ? &*saver : nullptr);
  }
  balance.previous = counts;
  m.step = ++state.step;
  double most[] = {now_s() - step_began_s, double(rank.allocator->peak_bytes),
      saver ? saver->take_stall() : 0.0};
  all_reduce(rank, Group::World, most, 3, Reduce::Max, "all_reduce step time");
  m.seconds = most[0];
  if (config.train.peak_tflops > 0)
    m.mfu = plan.flops_per_token * m.tokens_per_second() / (1e12 * config.train.peak_tflops);
  m.peak_memory_bytes = most[1];
  m.checkpoint_stall_s = most[2];
}

void Trainer::train(const TrainOptions& options) {
  saver.emplace(rank, parameters, SaveOptions{config.run.folder, config.checkpoint.keep});
  double began = now_s();
  bool saving = false;
  while (state.step < config.train.steps && !stop) {
    const bool profiled = state.step + 1 == options.profile_step;
    if (kCuda && profiled) begin_profile(rank);
    StepMetrics m = compute_gradients();
    if (rank.id == 0 && run.tracing)
      write_routing(options.routing_trace, state.step + 1, run.routing);
    update(m);
    if (kCuda && profiled) write_profile(config.run.folder, end_profile(rank));
    end_startup(rank);
    bool last = m.step == m.steps;
    auto due = [&](i64 interval) { return interval > 0 && (m.step % interval == 0 || last); };
    if (due(config.train.eval_interval))
      m.eval_loss = evaluate(rank, instance, run.data, plan.batch, plan.schedule).loss;
    saving = last || stop || due(config.checkpoint.interval);
    if (rank.id == 0) {
      run.stopped = stop && !last;
      m.left_s = (now_s() - began) / double(m.step - run.state.step) * double(m.steps - m.step);
      if (due(config.train.log_interval) || m.step == 1 || m.eval_loss)
        log_info("%s", step_line(m).c_str());
      if (m.step == run.state.step + 1)
        log_info("peak memory: %s", describe_memory(rank.allocator->peak_of).c_str());
      append_step(run.metrics, run.events, m, double(time(nullptr)));
    }
    if (!saving) continue;
    state.samples = state.step * plan.batch.global_batch;
    state.balance_counts = balance.previous;
    saver->begin(rank, state);
  }
  if (saving && !saver->finish(rank))
    failed(config.run.folder, "the last checkpoint could not be saved",
        "free space there, then the same command again");
  if (rank.id == 0 && run.stopped)
    log_info("stopped at step %ld; the same command goes on", state.step);
}

bool train(const RunPlan& plan, const TrainOptions& options) {
  const RunConfig& config = plan.config;
  const string& folder = config.run.folder;
  Run run{.plan = plan,
      .routing_replay = options.routing_replay,
      .tracing = !options.routing_trace.empty()};
  run.data.require_samples(config.train.steps * plan.batch.global_batch);
  if (config.train.eval_interval > 0) run.data.require_heldout();
  run.state = {.seed = config.data.seed,
      .data_fingerprint = run.data.fingerprint(),
      .config = to_toml(config),
      .model = plan.model.dump(2)};
  // Before anything is written.
  if (!config.model.init_from.empty() && list_checkpoints(folder).empty()) {
    run.init_from = open_weights(config.model.init_from);
    check_weights(*run.init_from, whole_table(plan.model));
  }
  const RunLock lock(folder);
  log_to_file(folder + "/log.txt");
  run.resume_from = find_checkpoint(folder);
  if (run.resume_from) {
    check_resumable(*run.resume_from, run.state);
    log_info("going on from %s", run.resume_from->folder.c_str());
    run.state = run.resume_from->state;
    run.state.config = to_toml(config);
  }
  write_file_durably(folder + "/config.toml", run.state.config);
  begin_metrics(run.metrics = folder + "/metrics.jsonl", run.state.step);
  run.events = begin_events(folder + "/tensorboard", run.state.step + 1, double(time(nullptr)));
  const char* debug = getenv("PITH_DEBUG");
  const LaunchOptions launch{.startup_limit_s = config.parallel.startup_timeout_s,
      .limit_s = config.parallel.timeout_s,
      .exit_on_failure = options.exit_on_failure,
      .compute = plan.compute,
      .debug = debug && *debug == '1'};
  run_ranks(plan.mesh, plan.device, launch, [&](Rank& rank) { Trainer(rank, run).train(options); });
  log_to_file("");
  return !run.stopped;
}

}
