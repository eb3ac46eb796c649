#include "engine/expert_parallel.h"

#include <algorithm>
#include <numeric>

#include "comm/communicator.h"
#include "ops/cuda.h"

namespace pith {

static Tensor upload(Rank& rank, const vector<int>& values) {
  return tensor_from(rank, {i64(values.size())}, DType::I32, values.data());
}

// Rows by destination in the ep group -> rows received, by source.
static Tensor exchange(
    Rank& rank, Tensor x, const vector<i64>& send, const vector<i64>& recv, const char* what) {
  if (send.size() == 1) return x;
  Dims dims = x.dim;
  dims[0] = std::reduce(recv.begin(), recv.end());
  Tensor y = empty(rank, dims, x.dtype);
  all_to_all(rank, Group::Ep, x, send.data(), y, recv.data(), what);
  if (Node* n = record(rank, what, At::here(), {x}, {&y})) {
    n->bx_keep = {
        upload(rank, {send.begin(), send.end()}), upload(rank, {recv.begin(), recv.end()})};
    n->bx = [](Rank& r, Node& node) {
      auto counts = [&](int i) {
        const Tensor& t = node.bx_keep[i];
        return vector<i64>(t.i32(), t.i32() + t.numel());
      };
      Tensor dx = empty(r, node.in[0].dim, node.in[0].dtype);
      all_to_all(r, Group::Ep, node.grad[0], counts(1).data(), dx, counts(0).data(), node.op);
      add_grad(r, node.in[0], dx);
    };
  }
  return y;
}

struct Pair {
  int row, expert;
};

// Where each of n keys begins among the sorted `keys`, and their end.
static Tensor begins_of(Rank& rank, const vector<int>& keys, i64 n) {
  Tensor begin = zeros(rank, {n + 1}, DType::I32);
  for (const int key : keys) begin.i32()[key + 1]++;
  std::partial_sum(begin.i32(), begin.i32() + n + 1, begin.i32());
  return begin;
}

// Pairs come by (sender, row, slot). Sets recv_rows; returns the pair at each place of the order by
// expert.
static Tensor index_pairs(
    Rank& rank, const Pair* pairs, const vector<i64>& pairs_from, int experts, Dispatch& out) {
  vector<int> row, expert;
  i64 R = 0;
  for (const i64 count : pairs_from) {
    i64 first = R;
    for (i64 i = 0; i < count; i++, pairs++) {
      row.push_back(int(first + pairs->row));
      expert.push_back(pairs->expert);
      R = row.back() + 1;
    }
    out.recv_rows.push_back(R - first);
  }
  vector<int> order(row.size()), row_of, place_of(row.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, {}, [&](int pair) { return expert[pair]; });
  for (const int pair : order) {
    place_of[pair] = int(row_of.size());
    row_of.push_back(row[pair]);
  }
  Dispatched& d = out.at_experts;
  d.row_of = upload(rank, row_of);
  d.pair_of = upload(rank, place_of);  // arrival order is the order of row_begin
  d.offsets = begins_of(rank, expert, experts);
  d.row_begin = begins_of(rank, row, R);
  return upload(rank, order);
}

// All experts are here: no row moves, and nothing waits for the device.
static Dispatch dispatch_here(
    Rank& rank, const Tensor& hidden, const Routing& routing, int experts) {
  Dispatch out{.tokens = hidden.dim[0]};
  out.send_rows = {out.tokens};
  Dispatched& d = out.at_experts;
  Tensor order = cuda_dispatch(rank, routing.ids, experts, d);
  Tensor flat = reshape(rank, routing.weights, {routing.weights.numel()});
  Tape* tape = std::exchange(rank.tape, nullptr);
  d.weights = index_select(rank, flat, order);
  rank.tape = tape;
  if (Node* n = record(rank, "dispatch weights", At::here(), {flat}, {&d.weights})) {
    n->bx_keep = {d.pair_of};
    n->bx = [](Rank& r, Node& node) {
      Tape* paused = std::exchange(r.tape, nullptr);
      Tensor g = index_select(r, node.grad[0], node.bx_keep[0]);
      r.tape = paused;
      add_grad(r, node.in[0], g);
    };
  }
  d.rows = hidden;
  return out;
}

Dispatch dispatch(Rank& rank, Tensor hidden, const Routing& routing, int num_experts) {
  int ep = group_size(rank, Group::Ep), local = num_experts / ep;
  check(rank, "dispatch", At::here(),
      {{"hidden [T,D] and ids [T,k]", hidden.dim.rank == 2 && routing.ids.dim.rank == 2 &&
                                          hidden.dim[0] == routing.ids.dim[0]},
          {"experts divisible by ep", num_experts % ep == 0},
          {"ep = 1 on a GPU", ep == 1 || rank.device == Device::CPU}},
      {&hidden, &routing.ids});
  if (kCuda && hidden.device == Device::CUDA)
    return dispatch_here(rank, hidden, routing, num_experts);
  i64 k = routing.ids.dim[1];
  Dispatch out{.tokens = hidden.dim[0]};
  vector<int> tokens, slots;  // of each row sent; of each pair, its place in the routing
  vector<Pair> pairs;
  vector<i64> pairs_to;
  for (int g = 0; g < ep; g++) {
    size_t rows_before = tokens.size(), pairs_before = pairs.size();
    for (i64 t = 0; t < out.tokens; t++) {
      auto row = int(tokens.size() - rows_before);
      size_t before = pairs.size();
      for (i64 slot = t * k; slot < (t + 1) * k; slot++) {
        int expert = routing.ids.i32()[slot];
        if (expert / local != g) continue;
        pairs.push_back({row, expert % local});
        slots.push_back(int(slot));
      }
      if (pairs.size() > before) tokens.push_back(int(t));
    }
    out.send_rows.push_back(i64(tokens.size() - rows_before));
    pairs_to.push_back(i64(pairs.size() - pairs_before));
  }
  Tensor mine = upload(rank, {pairs_to.begin(), pairs_to.end()});
  Tensor theirs = empty(rank, {ep}, DType::I32);
  all_to_all(rank, Group::Ep, mine, nullptr, theirs, nullptr, "all_to_all counts");
  vector<i64> pairs_from(theirs.i32(), theirs.i32() + ep);
  Tensor sent = tensor_from(rank, {i64(pairs.size()), 2}, DType::I32, pairs.data());
  Tensor received = exchange(rank, sent, pairs_to, pairs_from, "all_to_all pairs");
  Tensor sorted = index_pairs(rank, received.as<Pair>(), pairs_from, local, out);
  Tensor weights = reshape(rank, routing.weights, {routing.weights.numel()});
  weights = index_select(rank, weights, upload(rank, slots));
  weights = exchange(rank, weights, pairs_to, pairs_from, "dispatch weights");
  out.at_experts.weights = index_select(rank, weights, sorted);
  out.sent_tokens = upload(rank, tokens);
  if (ep > 1) hidden = index_select(rank, hidden, out.sent_tokens);
  out.at_experts.rows = exchange(rank, hidden, out.send_rows, out.recv_rows, "dispatch rows");
  return out;
}

Tensor combine(Rank& rank, Tensor rows, const Dispatch& d) {
  if (d.send_rows.size() == 1) return rows;
  Tensor home = exchange(rank, rows, d.recv_rows, d.send_rows, "combine rows");
  return scatter_add(rank, home, d.sent_tokens, d.tokens);
}

}
