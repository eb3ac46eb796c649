// optimizer: the update of all of a rank's weights. defines: optimizer_pass
#pragma once
#include "engine/checkpoint.h"

namespace pith {

// AdamW on every unit's shard, after the save under way (null: none) has copied it.
void optimizer_pass(Rank& rank, Parameters& parameters, const AdamW& options,
                    CheckpointSaver* saver);

}  // namespace pith
