// A token goes once to each rank that holds any of its experts and comes back once from each,
// summed over that rank's experts.
#pragma once
#include "ops/ops.h"

namespace pith {

struct Dispatch {
  Dispatched at_experts;
  Tensor sent_tokens;                // I32: of each row sent, by destination
  vector<i64> send_rows, recv_rows;  // to and from each rank of the ep group
  i64 tokens = 0;
};

// Stage 2. hidden [T, D]; rank r of the ep group holds experts [r*E/ep, (r+1)*E/ep).
Dispatch dispatch(Rank& rank, Tensor hidden, const Routing& routing, int num_experts);
// Stage 4: rows [R, D] -> [T, D], each token the sum of the ranks' rows in rank order.
Tensor combine(Rank& rank, Tensor rows, const Dispatch& dispatch);

}
