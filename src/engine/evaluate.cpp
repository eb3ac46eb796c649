#include "engine/evaluate.h"

#include <algorithm>
#include <cmath>

#include "comm/communicator.h"
#include "core/rng.h"
#include "engine/batches.h"

namespace pith {

EvalResult evaluate(Rank& rank, Instance& instance, const Dataset& data, const BatchShape& shape,
                    const ScheduleOptions& schedule, int64_t batches) {
  ScheduleOptions forward = schedule;
  forward.forward_only = true;
  const ActionList actions = make_schedule(forward, rank.mesh.pp_rank);
  const int64_t all = (data.heldout_samples() + shape.global_batch - 1) / shape.global_batch;
  const int64_t count = batches > 0 ? std::min(batches, all) : all;
  double sums[2] = {0, 0};
  for (int64_t i = 0; i < count; i++) {
    LoadedBatches loaded = make_batches(rank, data, shape, i, Split::Heldout);
    StepIo io;
    io.batches = std::move(loaded.batches);
    io.forward_only = true;
    run_actions(rank, instance, io, forward, actions);
    for (const double loss : io.loss) sums[0] += loss;
    // Every stage reads the same labels: they count once.
    if (rank.mesh.pp_rank == 0) sums[1] += double(loaded.labels);
  }
  all_reduce(rank, Group::World, sums, 2, Reduce::Sum, "all_reduce evaluation");
  return {sums[1] > 0 ? sums[0] / sums[1] : 0, int64_t(sums[1])};
}

// ---- Generation -------------------------------------------------------------------------------

// Logits [V] of the token after `tokens`.
static vector<float> next_logits(Rank& rank, Instance& instance, const vector<int32_t>& tokens) {
  const auto n = int64_t(tokens.size());
  const vector<int32_t> ignored(n, kIgnoreLabel);
  vector<int32_t> positions(n);
  for (int64_t i = 0; i < n; i++) positions[i] = int32_t(i);
  StepIo io;
  Batch batch;
  batch.rows = 1;
  batch.length = n;
  batch.tokens = tensor_from(rank, {n}, DType::I32, tokens.data());
  batch.labels = tensor_from(rank, {n}, DType::I32, ignored.data());
  batch.positions = tensor_from(rank, {n}, DType::I32, positions.data());
  io.batches = {batch};
  io.forward_only = true;
  io.want_logits = true;
  const ScheduleOptions schedule{.kind = instance.options.schedule,
                                 .forward_only = true,
                                 .gather_step = !instance.options.gather_layer};
  run_actions(rank, instance, io, schedule, make_schedule(schedule, 0));
  const float* last = io.logits[0].f32() + (n - 1) * instance.shape.vocab;
  return {last, last + instance.shape.vocab};
}

// A token drawn with probability proportional to e^(logit / temperature) from the smallest set of
// the most likely ones that holds top_p.
static int32_t draw(const vector<float>& logits, const SampleOptions& o, int64_t index) {
  vector<int32_t> order(logits.size());
  for (size_t i = 0; i < order.size(); i++) order[i] = int32_t(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  if (o.temperature <= 0) return order[0];
  vector<double> weight;
  double total = 0;
  for (const int32_t id : order) {
    weight.push_back(std::exp((logits[id] - logits[order[0]]) / o.temperature));
    total += weight.back();
  }
  size_t kept = 0;
  double mass = 0;
  while (kept < weight.size() && (kept == 0 || mass < o.top_p * total)) mass += weight[kept++];
  double point = uniform_at(stream_key(o.seed, "generate"), uint64_t(index)) * mass;
  for (size_t i = 0; i + 1 < kept; i++) {
    point -= weight[i];
    if (point < 0) return order[i];
  }
  return order[kept - 1];
}

vector<int32_t> generate(Rank& rank, Instance& instance, vector<int32_t> prompt, int64_t window,
                         const SampleOptions& options, bool (*emit)(void*, int32_t),
                         void* context) {
  const size_t given = prompt.size();
  for (int64_t i = 0; i < options.max_new_tokens; i++) {
    const size_t first = prompt.size() > size_t(window) ? prompt.size() - size_t(window) : 0;
    const vector<float> logits =
        next_logits(rank, instance, vector<int32_t>(prompt.begin() + first, prompt.end()));
    const int32_t token = draw(logits, options, i);
    if (token == options.stop_token) break;
    prompt.push_back(token);
    if (!emit(context, token)) break;
  }
  return {prompt.begin() + given, prompt.end()};
}

}  // namespace pith
