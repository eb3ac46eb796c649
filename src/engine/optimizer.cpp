#include "engine/optimizer.h"

#include <cmath>
#include <numbers>

#include "engine/checkpoint.h"

namespace pith {

double learning_rate(const LrSchedule& schedule, double peak, int64_t s, int64_t steps) {
  const double x = double(s), n = double(steps);
  const double warmup = std::nearbyint(schedule.warmup_ratio * n);
  if (x < warmup) return schedule.start_lr + (peak - schedule.start_lr) * x / warmup;
  if (schedule.kind == "constant") return peak;
  const bool wsd = schedule.kind == "wsd";
  const double decay = wsd ? std::nearbyint(schedule.decay_ratio * n) : n - warmup;
  if (decay == 0 || x < n - decay) return peak;
  const double t = std::min((x - (n - decay)) / decay, 1.0);
  if (wsd && schedule.decay_shape == "linear") return peak + (schedule.final_lr - peak) * t;
  return schedule.final_lr + (peak - schedule.final_lr) * (1 + std::cos(std::numbers::pi * t)) / 2;
}

void optimizer_pass(Rank& rank, Parameters& parameters, const AdamW& options,
                    CheckpointSaver* saver) {
  for (size_t i = 0; i < parameters.units.size(); i++) {
    FlatUnit& unit = parameters.units[i];
    if (saver) saver->wait_unit(int(i));
    adamw_step(rank, unit.master, unit.grad_shard, unit.m, unit.v, options);
  }
}

}  // namespace pith
