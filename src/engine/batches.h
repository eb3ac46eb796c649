// batches: this rank's part of a step's global batch. (dp, ep) deal out rows, cp the two zigzag
// blocks of each row.
#pragma once
#include "data/dataset.h"
#include "models/model.h"

namespace pith {

enum class Split : u8 { Train, Heldout };

struct LoadedBatches {
  vector<Batch> batches;  // by micro-batch
  i64 labels = 0;         // of this rank, ignored ones aside
  // [micro-batch][local token]: its index among the step's tokens, sequence after sequence.
  vector<vector<i64>> token_index;
  double global_labels(Rank& rank) const;  // collective over dp * cp * ep
};

// Of the 0-based step, or held-out global batch, in which rows behind the last sample have ignored
// labels only. `shape` must be the mesh's.
LoadedBatches make_batches(Rank& rank, const Dataset& data, const BatchShape& shape, i64 step,
                           Split split);

}
