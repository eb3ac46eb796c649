#include "core/tape.h"

#include <cmath>
#include <cstring>

#include "core/rank.h"

namespace pith {

void TensorList::push(const Tensor& t) {
  if (count == kMax) failed("TensorList", "more than 8 tensors in one list of a tape node");
  item[count++] = t;
}

// PITH_DEBUG: names the op and the caller that first produced a NaN or Inf.
static void check_finite(const Rank& rank, const char* op, At at, const Tensor& t) {
  if (!t.data || (t.dtype != DType::F32 && t.dtype != DType::F64)) return;
  for (int64_t i = 0, n = t.numel(); i < n; i++) {
    const double v = t.dtype == DType::F32 ? t.as<float>()[i] : t.as<double>()[i];
    if (std::isfinite(v)) continue;
    const Status* s = rank.status;
    failed(text("%s:%d: %s", at.file, at.line, op),
           text("non-finite value (got %g at element %ld of %s; rank %d, layer %d, stage %d, "
                "micro-batch %d)",
                v, long(i), describe(t).c_str(), rank.id, s ? s->layer : -1, s ? s->stage : 0,
                s ? s->micro_batch : -1));
  }
}

Node* record(Rank& rank, const char* op, At at, std::initializer_list<Tensor> in,
             std::initializer_list<Tensor*> out) {
  if (rank.debug)
    for (const Tensor* t : out) check_finite(rank, op, at, *t);
  bool needed = false;
  for (const Tensor& t : in) needed |= t.needs_grad();
  if (!rank.tape || !needed) return nullptr;
  Tape& tape = *rank.tape;
  Node& node = tape.nodes.emplace_back();
  node.op = op;
  node.at = at;
  if (rank.status) {
    node.layer = rank.status->layer;
    node.stage = rank.status->stage;
  }
  for (const Tensor& t : in) node.in.push(t.meta());
  for (Tensor* t : out) {
    if (is_float(t->dtype)) t->var = tape.new_var();
    node.out.push(t->meta());
  }
  return &node;
}

void make_leaf(Rank& rank, Tensor& t) { t.var = rank.tape->new_var(); }

Tensor grad_of(const Tape& tape, const Tensor& t) {
  if (t.var < 0) return {};
  Tensor g = tape.grads[t.var];
  if (g.defined()) g.dim = t.dim;
  return g;
}

template <class T>
static void add_elements(T* to, const T* from, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] += from[i];
}

void add_into(Rank& rank, const Tensor& to, const Tensor& from, At at) {
  check(rank, "add_grad", at,
        {{"equal element counts", to.numel() == from.numel()},
         {"equal dtypes", to.dtype == from.dtype}},
        {&to, &from});
  if (to.dtype == DType::F64)
    add_elements(to.as<double>(), from.as<double>(), to.numel());
  else
    add_elements(to.as<float>(), from.as<float>(), to.numel());
}

// A weight's accumulator as a tensor.
static Tensor accumulator(const Tensor& weight) {
  if (!weight.grad)
    failed("tape", text("the gradient of %s has no accumulator to go to", weight.name));
  Tensor g = weight.meta();
  g.data = weight.grad;
  g.grad = nullptr;
  g.dtype = weight.dtype == DType::F64 ? DType::F64 : DType::F32;
  return g;
}

void add_grad(Rank& rank, const Tensor& t, Tensor g) {
  if (t.is_weight()) return add_into(rank, accumulator(t), g, g.made);
  if (t.var < 0) return;
  Tensor& slot = rank.tape->grads[t.var];
  if (!slot.defined())
    slot = std::move(g);
  else
    add_into(rank, slot, g, g.made);
}

GradSlot grad_slot(Rank& rank, const Tensor& t, At at) {
  if (t.is_weight()) return {accumulator(t), true};
  if (t.var < 0) return {};
  Tensor& slot = rank.tape->grads[t.var];
  if (slot.defined()) {
    Tensor same = slot;
    same.dim = t.dim;
    return {same, true};
  }
  slot = empty(rank, t.dim, t.dtype, at);
  return {slot, false};
}

// The backward of a node begins: says so on the status board, and follows weights that may have
// moved since the forward.
static void begin_backward(Rank& rank, Node& node, TensorList& kept) {
  if (rank.status) {
    rank.status->op = node.op;
    rank.status->file = node.at.file;
    rank.status->line = node.at.line;
    rank.status->layer = node.layer;
    rank.status->stage = node.stage;
  }
  for (TensorList* list : {&node.in, &kept})
    for (int i = 0; i < list->count; i++) (*list)[i].refresh();
}

static void run_weight_grads(Rank& rank, Node& node) {
  Node* one = &node;
  begin_backward(rank, node, node.bw_keep);
  node.bw(rank, &one, 1);
  node.bw_done = true;
  node.bw_keep.clear();
  node.grad.clear();
}

void backward(Rank& rank, int begin, int end, bool defer_weights) {
  Tape& tape = *rank.tape;
  for (int i = end - 1; i >= begin; i--) {
    Node& node = tape.nodes[i];
    bool any = false;
    for (int o = 0; o < node.out.count; o++) {
      node.grad.push(grad_of(tape, node.out[o]));
      any |= node.grad[o].defined();
    }
    if (any) {
      begin_backward(rank, node, node.bx_keep);
      if (node.bx) node.bx(rank, node);
      if (rank.debug)
        for (int k = 0; k < node.in.count; k++)
          check_finite(rank, node.op, node.at, grad_of(tape, node.in[k]));
    }
    for (int o = 0; o < node.out.count; o++)
      if (node.out[o].var >= 0) tape.grads[node.out[o].var] = {};
    node.bx_keep.clear();
    if (any && node.bw && defer_weights) continue;
    if (any && node.bw) run_weight_grads(rank, node);
    node.bw_done = true;
    node.bw_keep.clear();
    node.grad.clear();
  }
}

void weight_grads(Rank& rank, Tape& tape, int begin, int end) {
  for (int i = end - 1; i >= begin; i--) {
    Node& node = tape.nodes[i];
    if (node.bw && !node.bw_done) run_weight_grads(rank, node);
  }
}

}  // namespace pith
