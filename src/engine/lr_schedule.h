// lr_schedule: the learning rate of a step.
#pragma once
#include <cstdint>

#include "core/check.h"

namespace pith {

struct LrSchedule {
  string kind = "constant";           // "wsd" (warm-up, stable, decay), "cosine", "constant"
  double warmup_ratio = 0;            // of the steps, rising linearly from start_lr
  double decay_ratio = 0.1;           // wsd: of the steps, falling to final_lr at the end
  string decay_shape = "cosine";      // wsd: "cosine" or "linear"
  double start_lr = 0, final_lr = 0;  // absolute
};

// Learning rate of 0-based step s of `steps` with the given peak. With w = round(warmup_ratio *
// steps), d = round(decay_ratio * steps), half to even:
//   s < w              start + (peak - start) * s / w
//   wsd: s < steps - d peak, else with t = (s - (steps - d)) / d
//     cosine           final + (peak - final) * (1 + cos(pi t)) / 2
//     linear           peak + (final - peak) * t
//   cosine: as wsd's cosine decay over all the steps after the warm-up
double learning_rate(const LrSchedule& schedule, double peak, int64_t s, int64_t steps);

}  // namespace pith
