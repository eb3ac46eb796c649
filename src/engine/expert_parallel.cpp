#include "engine/expert_parallel.h"

#include "comm/communicator.h"

namespace pith {

// ---- Rows between ranks, with the reverse as gradient -----------------------------------------

static Tensor counts_tensor(Rank& rank, const vector<int64_t>& send, const vector<int64_t>& recv) {
  vector<int32_t> both(send.begin(), send.end());
  both.insert(both.end(), recv.begin(), recv.end());
  return tensor_from(rank, {int64_t(both.size())}, DType::I32, both.data());
}

static int64_t total(const vector<int64_t>& counts) {
  int64_t n = 0;
  for (const int64_t c : counts) n += c;
  return n;
}

// Rows of x, grouped by destination, to the ranks of the ep group; -> rows received, by source.
static Tensor exchange(Rank& rank, Tensor x, const vector<int64_t>& send,
                       const vector<int64_t>& recv, const char* what, At at) {
  Dims dims = x.dim;
  dims[0] = total(recv);
  Tensor y = empty(rank, dims, x.dtype, at);
  all_to_all(rank, Group::Ep, x, send.data(), y, recv.data(), what, at);
  if (Node* n = record(rank, what, at, {x}, {&y})) {
    n->bx_keep = {counts_tensor(rank, send, recv)};
    n->bx = [](Rank& r, Node& node) {
      const int32_t* counts = node.bx_keep[0].i32();
      const int ep = int(node.bx_keep[0].numel() / 2);
      const vector<int64_t> sent(counts, counts + ep);
      const vector<int64_t> received(counts + ep, counts + 2 * ep);
      Tensor dx = empty(r, node.in[0].dim, node.in[0].dtype, node.at);
      all_to_all(r, Group::Ep, node.grad[0], received.data(), dx, sent.data(), node.op, node.at);
      add_grad(r, node.in[0], dx);
    };
  }
  return y;
}

// ---- Dispatch ---------------------------------------------------------------------------------

// One (row, expert) pair to compute: the row within its block and the expert on its rank, as sent.
struct Pair {
  int32_t row, expert;
};

// What one rank sends: rows (tokens) and pairs, grouped by destination.
struct SendList {
  vector<int32_t> tokens, slots;  // slots: index into the [T*k] routing of each pair
  vector<Pair> pairs;
  vector<int64_t> rows_to, pairs_to;
};

static SendList make_send_list(const Routing& routing, int num_experts, int ep) {
  const int64_t T = routing.ids.dim[0], k = routing.ids.dim[1];
  const int local = num_experts / ep;
  const int32_t* ids = routing.ids.i32();
  SendList s;
  for (int g = 0; g < ep; g++) {
    const size_t rows_before = s.tokens.size(), pairs_before = s.pairs.size();
    for (int64_t t = 0; t < T; t++) {
      const auto row = int32_t(s.tokens.size() - rows_before);
      bool sent = false;
      for (int64_t j = 0; j < k; j++) {
        const int32_t expert = ids[t * k + j];
        if (expert / local != g) continue;
        s.pairs.push_back({row, expert % local});
        s.slots.push_back(int32_t(t * k + j));
        sent = true;
      }
      if (sent) s.tokens.push_back(int32_t(t));
    }
    s.rows_to.push_back(int64_t(s.tokens.size() - rows_before));
    s.pairs_to.push_back(int64_t(s.pairs.size() - pairs_before));
  }
  return s;
}

// Indices of the expert side from the pairs received, in (source, token, slot) order.
// `sorted` [P]: which received pair stands at each place.
static void index_pairs(Rank& rank, const vector<Pair>& pairs, const vector<int64_t>& rows_from,
                        const vector<int64_t>& pairs_from, int experts, Dispatched& d,
                        Tensor& sorted) {
  const auto P = int64_t(pairs.size());
  const int64_t R = total(rows_from);
  d.row_of = empty(rank, {P}, DType::I32);
  d.pair_of = empty(rank, {P}, DType::I32);
  d.offsets = zeros(rank, {experts + 1}, DType::I32);
  d.row_begin = zeros(rank, {R + 1}, DType::I32);
  sorted = empty(rank, {P}, DType::I32);
  vector<int32_t> row(P);
  int64_t first_row = 0, p = 0;
  for (size_t source = 0; source < rows_from.size(); source++) {
    for (const int64_t end = p + pairs_from[source]; p < end; p++)
      row[p] = int32_t(first_row + pairs[p].row);
    first_row += rows_from[source];
  }
  for (p = 0; p < P; p++) {
    d.offsets.i32()[pairs[p].expert + 1]++;
    d.row_begin.i32()[row[p] + 1]++;
  }
  for (int e = 0; e < experts; e++) d.offsets.i32()[e + 1] += d.offsets.i32()[e];
  for (int64_t r = 0; r < R; r++) d.row_begin.i32()[r + 1] += d.row_begin.i32()[r];
  vector<int32_t> next(d.offsets.i32(), d.offsets.i32() + experts);
  for (p = 0; p < P; p++) {
    const int32_t place = next[pairs[p].expert]++;
    sorted.i32()[place] = int32_t(p);
    d.row_of.i32()[place] = row[p];
    // Pairs arrive row by row, so arrival order is the order of row_begin.
    d.pair_of.i32()[p] = place;
  }
}

Dispatch dispatch(Rank& rank, Tensor hidden, const Routing& routing, int num_experts, At at) {
  const int ep = group_size(rank, Group::Ep);
  check(rank, "dispatch", at,
        {{"hidden [T,D] and ids [T,k]",
          hidden.dim.rank == 2 && routing.ids.dim.rank == 2 && hidden.dim[0] == routing.ids.dim[0]},
         {"experts divisible by ep", num_experts % ep == 0}},
        {&hidden, &routing.ids});
  Dispatch out;
  out.tokens = hidden.dim[0];
  SendList send = make_send_list(routing, num_experts, ep);
  vector<Pair> pairs = std::move(send.pairs);
  vector<int64_t> pairs_from = send.pairs_to;
  out.send_rows = out.recv_rows = send.rows_to;
  const Tensor slots =
      tensor_from(rank, {int64_t(send.slots.size())}, DType::I32, send.slots.data());
  Tensor weights =
      index_select(rank, reshape(rank, routing.weights, {routing.weights.numel()}), slots, at);
  Tensor rows = hidden;
  if (ep > 1) {
    Tensor mine = empty(rank, {ep, 2}, DType::I32), theirs = empty(rank, {ep, 2}, DType::I32);
    for (int g = 0; g < ep; g++) {
      mine.i32()[2 * g] = int32_t(send.rows_to[g]);
      mine.i32()[2 * g + 1] = int32_t(send.pairs_to[g]);
    }
    all_to_all(rank, Group::Ep, mine, nullptr, theirs, nullptr, "all_to_all counts", at);
    for (int g = 0; g < ep; g++) {
      out.recv_rows[g] = theirs.i32()[2 * g];
      pairs_from[g] = theirs.i32()[2 * g + 1];
    }
    const Tensor pairs_out =
        tensor_from(rank, {total(send.pairs_to), 2}, DType::I32, pairs.data(), at);
    const Tensor pairs_in = empty(rank, {total(pairs_from), 2}, DType::I32, at);
    all_to_all(rank, Group::Ep, pairs_out, send.pairs_to.data(), pairs_in, pairs_from.data(),
               "all_to_all pairs", at);
    const Pair* received = pairs_in.as<Pair>();
    pairs.assign(received, received + pairs_in.dim[0]);
    weights = exchange(rank, weights, send.pairs_to, pairs_from, "dispatch weights", at);
    out.sent_tokens =
        tensor_from(rank, {int64_t(send.tokens.size())}, DType::I32, send.tokens.data(), at);
    rows = exchange(rank, index_select(rank, hidden, out.sent_tokens, at), out.send_rows,
                    out.recv_rows, "dispatch rows", at);
  }
  Tensor sorted;
  index_pairs(rank, pairs, out.recv_rows, pairs_from, num_experts / ep, out.at_experts, sorted);
  out.at_experts.rows = rows;
  out.at_experts.weights = index_select(rank, weights, sorted, at);
  return out;
}

Tensor combine(Rank& rank, Tensor rows, const Dispatch& d, At at) {
  if (group_size(rank, Group::Ep) == 1) return rows;
  Tensor home = exchange(rank, rows, d.recv_rows, d.send_rows, "combine rows", at);
  return scatter_add(rank, home, d.sent_tokens, d.tokens, at);
}

}  // namespace pith
