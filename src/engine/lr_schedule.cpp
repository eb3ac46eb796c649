#include "engine/lr_schedule.h"

#include <cmath>
#include <numbers>

namespace pith {

double learning_rate(const LrSchedule& schedule, double peak, int64_t s, int64_t steps) {
  const auto n = double(steps);
  const double warmup = std::nearbyint(schedule.warmup_ratio * n);
  const double x = double(s);
  if (x < warmup) return schedule.start_lr + (peak - schedule.start_lr) * x / warmup;
  if (schedule.kind == "constant") return peak;
  const double decay =
      schedule.kind == "cosine" ? n - warmup : std::nearbyint(schedule.decay_ratio * n);
  if (decay == 0 || x < n - decay) return peak;
  const double t = std::min((x - (n - decay)) / decay, 1.0);
  if (schedule.kind == "wsd" && schedule.decay_shape == "linear")
    return peak + (schedule.final_lr - peak) * t;
  return schedule.final_lr + (peak - schedule.final_lr) * (1 + std::cos(std::numbers::pi * t)) / 2;
}

}  // namespace pith
