#include "engine/optimizer.h"

namespace pith {

void optimizer_pass(Rank& rank, Parameters& parameters, const AdamW& options,
                    CheckpointSaver* saver) {
  for (size_t i = 0; i < parameters.units.size(); i++) {
    FlatUnit& unit = parameters.units[i];
    if (saver) saver->wait_unit(int(i));
    adamw_step(rank, unit.master, unit.grad_shard, unit.m, unit.v, options);
  }
}

}  // namespace pith
