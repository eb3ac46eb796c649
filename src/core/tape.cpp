#include "core/tape.h"

#include "core/cuda.h"

namespace pith {

void TensorList::push(const Tensor& t) {
  if (count == kMax) failed("TensorList", "more than 8 tensors in one list of a tape node");
  item[count++] = t;
}

static void check_finite(Rank& rank, const char* op, At at, const Tensor& x) {
  if (!x.data || !is_float(x.dtype)) return;
  vector<char> bytes;
  Tensor t = on_host(rank, x, bytes);
  for (i64 i = 0, n = t.numel(); i < n; i++) {
    double v = t.dtype == DType::F64    ? t.as<double>()[i]
               : t.dtype == DType::BF16 ? double(t.as<BF16>()[i])
                                        : t.f32()[i];
    if (!std::isfinite(v))
      op_failed(
          rank, op, at, "non-finite value", text("%g at element %ld of ", v, i) + describe(x));
  }
}

Node* record(Rank& rank, const char* op, At at, std::initializer_list<Tensor> in,
    std::initializer_list<Tensor*> out) {
  if (rank.debug)
    for (const Tensor* t : out) check_finite(rank, op, at, *t);
  bool needed = false;
  for (const Tensor& t : in) needed |= t.needs_grad();
  if (!rank.tape || !needed) return nullptr;
  Node& node = rank.tape->nodes.emplace_back();
  node.op = op;
  node.at = at;
  if (rank.status) {
    node.layer = rank.status->layer;
    node.stage = rank.status->stage;
  }
  for (const Tensor& t : in) node.in.push(t.meta());
  for (Tensor* t : out) {
    if (is_float(t->dtype)) make_leaf(rank, *t);
    node.out.push(t->meta());
  }
  return &node;
}

void make_leaf(Rank& rank, Tensor& t) {
  t.var = int(rank.tape->grads.size());
  rank.tape->grads.emplace_back();
}

Tensor grad_of(const Tape& tape, const Tensor& t) {
  if (t.var < 0) return {};
  Tensor g = tape.grads[t.var];
  if (g.defined()) g.dim = t.dim;
  return g;
}

template <class T>
static void add_elements(const Tensor& to, const Tensor& from) {
  for (i64 i = 0, n = to.numel(); i < n; i++) to.as<T>()[i] += from.as<T>()[i];
}

void add_into(Rank& rank, const Tensor& to, const Tensor& from, At at) {
  check(rank, "add_grad", at,
      {{"equal element counts", to.numel() == from.numel()},
          {"equal dtypes, or bf16 to f32", to.dtype == from.dtype || to.dtype == wide(from.dtype)},
          {"tensors on one device", to.device == from.device}},
      {&to, &from});
  if (to.on_gpu()) return cuda_add(rank, to, from);
  if (to.dtype == DType::F64) return add_elements<double>(to, from);
  add_elements<float>(to, from);
}

static Tensor accumulator(const Tensor& weight) {
  if (!weight.grad)
    failed("tape", text("the gradient of %s has no accumulator to go to", weight.name));
  Tensor g = weight.meta();
  g.data = weight.grad;
  g.grad = nullptr;
  g.dtype = wide(weight.dtype);
  return g;
}

void add_grad(Rank& rank, const Tensor& t, Tensor g) {
  if (t.is_weight()) return add_into(rank, accumulator(t), g, g.made);
  if (t.var < 0) return;
  Tensor& slot = rank.tape->grads[t.var];
  if (slot.defined()) return add_into(rank, slot, g, g.made);
  slot = std::move(g);
}

GradSlot grad_slot(Rank& rank, const Tensor& t, At at) {
  if (t.is_weight()) return {accumulator(t), true};
  if (t.var < 0) return {};
  if (Tensor written = grad_of(*rank.tape, t); written.defined()) return {written, true};
  Tensor& slot = rank.tape->grads[t.var] = empty(rank, t.dim, t.dtype, at);
  return {slot, false};
}

static void begin_backward(Rank& rank, Node& node, TensorList& kept) {
  if (rank.status) {
    rank.status->begin(node.op, node.at);
    rank.status->layer = node.layer;
    rank.status->stage = node.stage;
  }
  for (Tensor& t : node.in) t.refresh();
  for (Tensor& t : kept) t.refresh();
}

static void run_weight_grads(Rank& rank, const vector<Node*>& nodes, bool needed) {
  if (needed) {
    for (Node* node : nodes) begin_backward(rank, *node, node->bw_keep);
    nodes[0]->bw(rank, nodes.data(), int(nodes.size()));
  }
  for (Node* node : nodes) {
    node->bw_done = true;
    node->bw_keep.clear();
    node->grad.clear();
  }
}

void backward(Rank& rank, int begin, int end, bool defer_weights) {
  Tape& tape = *rank.tape;
  for (int i = end - 1; i >= begin; i--) {
    Node& node = tape.nodes[i];
    bool any = false;
    for (const Tensor& t : node.out) {
      node.grad.push(grad_of(tape, t));
      any |= node.grad.end()[-1].defined();
    }
    if (any) {
      begin_backward(rank, node, node.bx_keep);
      if (node.bx) node.bx(rank, node);
      if (rank.debug)
        for (const Tensor& t : node.in) check_finite(rank, node.op, node.at, grad_of(tape, t));
    }
    for (const Tensor& t : node.out)
      if (t.var >= 0) tape.grads[t.var] = {};
    node.bx_keep.clear();
    bool weights = any && node.bw;
    if (!weights || !defer_weights || node.bw_now) run_weight_grads(rank, {&node}, weights);
  }
}

void weight_grads(Rank& rank, const vector<NodeRange>& ranges) {
  for (int i = ranges[0].end - ranges[0].begin - 1; i >= 0; i--) {
    vector<Node*> nodes;
    for (const NodeRange& r : ranges) {
      Node& node = r.tape->nodes.at(r.begin + i);
      if (node.bw_done) continue;
      if (!nodes.empty() && node.bw != nodes[0]->bw)
        failed("tape",
            text("nodes %d of two micro-batches differ (got %s and %s)", i, nodes[0]->op, node.op));
      nodes.push_back(&node);
    }
    if (!nodes.empty()) run_weight_grads(rank, nodes, nodes[0]->bw);
  }
}

}
