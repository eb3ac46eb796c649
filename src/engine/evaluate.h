// evaluate: loss on held-out documents, and the next token of a text.
#pragma once
#include "data/dataset.h"
#include "engine/instance.h"

namespace pith {

struct EvalResult {
  double loss = 0;  // nats a label; 0 when there are none
  int64_t labels = 0;
};

// Mean loss over the held-out samples. Collective over the world; the same on every rank.
EvalResult evaluate(Rank& rank, Instance& instance, const Dataset& data, const BatchShape& shape,
                    const ScheduleOptions& schedule);

struct SampleOptions {
  double temperature = 0;  // 0: the most likely token
  double top_p = 1;        // drawn from the smallest set of at least this probability
  uint64_t seed = 0;
};
// The `index`-th token to be drawn, after `tokens`, by a world of one rank.
int32_t next_token(Rank& rank, Instance& instance, const vector<int32_t>& tokens,
                   const SampleOptions& options, int64_t index);

}  // namespace pith
