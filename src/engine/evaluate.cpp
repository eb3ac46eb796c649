#include "engine/evaluate.h"

#include <algorithm>
#include <numeric>

#include "comm/communicator.h"
#include "core/rng.h"
#include "engine/batches.h"

namespace pith {

EvalResult evaluate(Rank& rank, Instance& instance, const Dataset& data, const BatchShape& shape,
    const ScheduleOptions& schedule) {
  ScheduleOptions forward = schedule;
  forward.forward_only = true;
  const ActionList actions = make_schedule(forward, rank.mesh.pp_rank);
  double sums[2] = {0, 0};
  for (i64 i = 0; i * shape.global_batch < data.heldout_samples(); i++) {
    LoadedBatches loaded = make_batches(rank, data, shape, i, Split::Heldout);
    StepIo io{.batches = std::move(loaded.batches)};
    run_actions(rank, instance, io, forward, actions);
    for (const double loss : io.loss) sums[0] += loss;
    // Every stage reads the same labels: they count once.
    if (rank.mesh.pp_rank == 0) sums[1] += double(loaded.labels);
  }
  all_reduce(rank, Group::World, sums, 2, Reduce::Sum, "all_reduce evaluation");
  return {sums[1] > 0 ? sums[0] / sums[1] : 0, i64(sums[1])};
}

// From the smallest set of the most likely tokens that holds top_p.
static int draw(const float* logits, i64 vocab, const SampleOptions& o, i64 index) {
  vector<int> order(vocab);
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, std::greater(), [&](int id) { return logits[id]; });
  if (o.temperature <= 0) return order[0];
  vector<double> mass;
  for (const int id : order)
    mass.push_back((mass.empty() ? 0 : mass.back()) +
                   std::exp((logits[id] - logits[order[0]]) / o.temperature));
  auto last = std::ranges::lower_bound(mass, o.top_p * mass.back());
  double point = uniform_at(stream_key(o.seed, "generate"), u64(index)) * *last;
  return order[std::upper_bound(mass.begin(), last, point) - mass.begin()];
}

int next_token(Rank& rank, Instance& instance, const vector<int>& tokens,
    const SampleOptions& options, i64 index) {
  auto n = i64(tokens.size());
  auto upload = [&](const vector<int>& values) {
    return tensor_from(rank, {n}, DType::I32, values.data());
  };
  vector<int> positions(n);
  std::iota(positions.begin(), positions.end(), 0);
  Batch batch{.rows = 1, .length = n, .tokens = upload(tokens)};
  batch.labels = upload(vector<int>(n, kIgnoreLabel));
  batch.positions = upload(positions);
  StepIo io{.batches = {batch}};
  io.logits.resize(1);
  const ScheduleOptions schedule{
      .kind = ScheduleKind::OneF1B, .forward_only = true, .gather_step = true};
  run_actions(rank, instance, io, schedule, make_schedule(schedule, 0));
  i64 vocab = instance.shape.vocab;
  return draw(io.logits[0].f32() + (n - 1) * vocab, vocab, options, index);
}

}
