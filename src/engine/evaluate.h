// evaluate: loss on held-out documents; the next token of a text.
#pragma once
#include "data/dataset.h"
#include "engine/instance.h"

namespace pith {

struct EvalResult {
  double loss = 0;  // nats a label; 0 when there are none
  int64_t labels = 0;
};

// Mean loss over the held-out samples, the same on every rank.
EvalResult evaluate(Rank& rank, Instance& instance, const Dataset& data, const BatchShape& shape,
                    const ScheduleOptions& schedule);

struct SampleOptions {
  double temperature = 0;  // 0: the most likely token
  double top_p = 1;        // probability of the set that is drawn from
  uint64_t seed = 0;
};
// The `index`-th token to be drawn, after `tokens`, by a world of one rank.
int32_t next_token(Rank& rank, Instance& instance, const vector<int32_t>& tokens,
                   const SampleOptions& options, int64_t index);

}  // namespace pith
