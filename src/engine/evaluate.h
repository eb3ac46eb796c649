#pragma once
#include "data/dataset.h"
#include "engine/instance.h"

namespace pith {

struct EvalResult {
  double loss = 0;  // nats a label; 0 when there are none
  i64 labels = 0;
};

// The same on every rank.
EvalResult evaluate(Rank& rank, Instance& instance, const Dataset& data, const BatchShape& shape,
    const ScheduleOptions& schedule);

struct SampleOptions {
  double temperature = 0;  // 0: the most likely token
  double top_p = 1;        // of the set drawn from
  u64 seed = 0;
};
// Draw number `index`, by a world of one rank.
int next_token(Rank& rank, Instance& instance, const vector<int>& tokens,
    const SampleOptions& options, i64 index);

}
