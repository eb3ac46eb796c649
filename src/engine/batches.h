// batches: this rank's part of a step's global batch, as the model reads it.
//
// The global batch of a step is the same sequences for every layout; (dp, ep) deal out rows, cp the
// two zigzag blocks of each row, and every pipeline rank loads the same.
// defines: Split, LoadedBatches, make_batches
#pragma once

#include "data/dataset.h"
#include "models/model.h"

namespace pith {

enum class Split : uint8_t { Train, Heldout };

struct LoadedBatches {
  vector<Batch> batches;  // by micro-batch
  int64_t labels = 0;     // that count (not kIgnoreLabel), of this rank
  // [micro-batch][local token]: its index among the step's tokens, sequence after sequence in
  // batch order.
  vector<vector<int64_t>> token_index;
  // Labels of the global batch. Collective over dp * cp * ep.
  double global_labels(Rank& rank) const;
};

// The micro-batches of 0-based step `step`: training samples [step * G, (step + 1) * G) of the run
// (see Dataset::train_sample), or, of held-out samples, global batch `step`, in which rows behind
// the last sample have ignored labels only. mask.doc_ends is defined if the
// dataset keeps documents apart; positions then restart in each document. `shape` must be the
// mesh's.
LoadedBatches make_batches(Rank& rank, const Dataset& data, const BatchShape& shape, int64_t step,
                           Split split);

}  // namespace pith
