// tape: reverse-mode differentiation over a visible list of plain nodes, one tape a (chunk,
// micro-batch). Gradients live in it with the activation's dtype: the first writer assigns, later
// ones add, and they are freed once the producer's bx has run.
#pragma once

#include "core/tensor.h"

namespace pith {

// Up to eight tensors by value.
struct TensorList {
  static constexpr int kMax = 8;
  TensorList() = default;
  TensorList(std::initializer_list<Tensor> ts) {
    for (const Tensor& t : ts) push(t);
  }
  void push(const Tensor& t);
  void clear() { *this = TensorList(); }
  Tensor& operator[](int i) { return item[i]; }
  const Tensor& operator[](int i) const { return item[i]; }
  Tensor* begin() { return item; }
  Tensor* end() { return item + count; }
  Tensor item[kMax];
  int count = 0;
};

struct Node {
  const char* op = "";
  At at;           // the caller's line
  int layer = -1;  // where the rank stood when it was recorded
  int stage = 0;
  TensorList in;       // inputs, as meta: where gradients go
  TensorList out;      // outputs, as meta
  TensorList grad;     // during bx and bw: the outputs' gradients; undefined where none arrived
  TensorList bx_keep;  // values that bx needs; released after bx
  TensorList bw_keep;  // values that bw needs; released after bw
  double f[4] = {};    // scalars: eps, scale, ...
  int64_t i[8] = {};   // integers: sizes, flags, ...
  void (*bx)(Rank&, Node&) = nullptr;  // gradients of inputs
  // Weight gradients of n nodes that share op and weights (one a deferred micro-batch), in order.
  void (*bw)(Rank&, Node* const* nodes, int n) = nullptr;
  bool bw_done = false;
};

struct Tape {
  vector<Node> nodes;
  vector<Tensor> grads;  // by variable
  int new_var() {
    grads.emplace_back();
    return int(grads.size()) - 1;
  }
  int size() const { return int(nodes.size()); }
  void clear() { *this = Tape(); }
};

// If the rank has a tape and an input needs a gradient: gives the outputs variables and returns the
// node, valid until the next record(), for the caller to complete; else null.
Node* record(Rank& rank, const char* op, At at, std::initializer_list<Tensor> in,
             std::initializer_list<Tensor*> out);

// Makes `t` a variable of the rank's current tape: a leaf whose gradient is read with grad_of.
void make_leaf(Rank& rank, Tensor& t);
// The gradient that has arrived for `t`, or an undefined tensor.
Tensor grad_of(const Tape& tape, const Tensor& t);

// Adds `g` (t's shape and dtype) to the gradient of `t`, which takes over g's storage if it is the
// first; to the accumulator if `t` is a weight; nowhere if no gradient flows to `t`.
void add_grad(Rank& rank, const Tensor& t, Tensor g);
// to += from; equal element counts and dtypes (F32 or F64).
void add_into(Rank& rank, const Tensor& to, const Tensor& from, At at = At::here());
// For ops that write a gradient in place: the buffer (undefined if none flows to `t`), and whether
// to add to it; to a weight's accumulator always.
struct GradSlot {
  Tensor grad;
  bool add = false;
};
GradSlot grad_slot(Rank& rank, const Tensor& t, At at = At::here());

// Walks nodes [begin, end) of the rank's tape in reverse: bx, then bw unless `defer_weights`. Nodes
// none of whose outputs has a gradient are skipped. Deferred nodes keep bw_keep and grad.
void backward(Rank& rank, int begin, int end, bool defer_weights = false);
// Runs the deferred weight gradients of nodes [begin, end), in reverse order.
void weight_grads(Rank& rank, Tape& tape, int begin, int end);

}  // namespace pith
