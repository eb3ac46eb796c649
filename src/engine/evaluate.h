// evaluate: loss on held-out documents, and the next token of a text.
#pragma once
#include "data/dataset.h"
#include "engine/instance.h"

namespace pith {

struct EvalResult {
  double loss = 0;     // nats a label; 0 when there are none
  int64_t labels = 0;  // over all ranks
};

// Mean loss over the first `batches` global batches of the held-out samples (0: all of them, the
// last one padded with ignored labels). Collective over the world; the same result on every rank.
EvalResult evaluate(Rank& rank, Instance& instance, const Dataset& data, const BatchShape& shape,
                    const ScheduleOptions& schedule, int64_t batches);

struct SampleOptions {
  double temperature = 0;  // 0: the most likely token
  double top_p = 1;        // sampled from the smallest set of at least this probability
  uint64_t seed = 0;
};
// The token after `tokens` (at least one), the `index`-th to be drawn, in a world of one rank.
int32_t next_token(Rank& rank, Instance& instance, const vector<int32_t>& tokens,
                   const SampleOptions& options, int64_t index);

}  // namespace pith
