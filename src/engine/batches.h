// (dp, ep) deal out rows, cp the two zigzag blocks of each row.
#pragma once
#include "data/dataset.h"
#include "models/model.h"

namespace pith {

enum class Split : u8 { Train, Heldout };

struct LoadedBatches {
  vector<Batch> batches;
  i64 labels = 0;  // not ignored, of this rank
  // [micro-batch][local token]: index among the step's tokens.
  vector<vector<i64>> token_index;
  double global_labels(Rank& rank) const;  // collective over dp * cp * ep
};

// Of the 0-based step or held-out batch, where rows behind the last sample have ignored labels
// only. The mesh gives dp and ep.
LoadedBatches make_batches(
    Rank& rank, const Dataset& data, BatchShape shape, i64 step, Split split);

}
