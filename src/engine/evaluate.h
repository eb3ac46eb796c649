// evaluate: loss on held-out documents, and text from a model.
// defines: EvalResult, evaluate, SampleOptions, generate
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
  int64_t max_new_tokens = 128;
  double temperature = 0;  // 0: the most likely token
  double top_p = 1;        // sampled from the smallest set of at least this probability
  uint64_t seed = 0;
  int64_t stop_token = -1;  // generation ends with it; -1: never
};
// Continues `prompt` (at least one token) on a world of one rank. A model sees at most `window`
// tokens back. `emit` is called with each token as it is chosen; false ends the text.
vector<int32_t> generate(Rank& rank, Instance& instance, vector<int32_t> prompt, int64_t window,
                         const SampleOptions& options, bool (*emit)(void*, int32_t), void* context);

}  // namespace pith
