// batches: this rank's part of a step's global batch, as the model reads it. The global batch is
// the same sequences for every layout; (dp, ep) deal out rows, cp the two zigzag blocks of each
// row.
#pragma once
#include "data/dataset.h"
#include "models/model.h"

namespace pith {

enum class Split : uint8_t { Train, Heldout };

struct LoadedBatches {
  vector<Batch> batches;  // by micro-batch
  int64_t labels = 0;     // that count (not kIgnoreLabel), of this rank
  // [micro-batch][local token]: its index among the step's tokens, sequence after sequence.
  vector<vector<int64_t>> token_index;
  // Labels of the global batch. Collective over dp * cp * ep.
  double global_labels(Rank& rank) const;
};

// The micro-batches of 0-based step `step` (see Dataset::train_sample), or held-out global batch
// `step`, in which rows behind the last sample have ignored labels only. mask.order is defined if
// cp > 1, mask.doc_ends if the dataset keeps documents apart. `shape` must be the mesh's.
LoadedBatches make_batches(Rank& rank, const Dataset& data, const BatchShape& shape, int64_t step,
                           Split split);

}  // namespace pith
