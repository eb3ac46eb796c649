// optimizer: the learning rate of a step, and the update of all of a rank's weights.
#pragma once
#include "ops/ops.h"

namespace pith {

class CheckpointSaver;
struct Parameters;

struct LrSchedule {
  string kind = "constant";  // "wsd" (warm-up, stable, decay), "cosine"
  double warmup_ratio = 0, decay_ratio = 0.1;
  string decay_shape = "cosine";  // of "wsd"; or "linear"
  double start_lr = 0, final_lr = 0;
};

// Of 0-based step s of `steps`. Warm-up takes round(warmup_ratio * steps) steps, the decay the last
// round(decay_ratio * steps) of "wsd", all the rest of "cosine". Half to even.
double learning_rate(const LrSchedule& schedule, double peak, int64_t s, int64_t steps);

// Updates each unit after the save under way (null: none) has copied it.
void optimizer_pass(Rank& rank, Parameters& parameters, const AdamW& options,
                    CheckpointSaver* saver);

}  // namespace pith
