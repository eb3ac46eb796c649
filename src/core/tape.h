// tape: reverse-mode differentiation over a visible list of plain nodes, one tape a (chunk,
// micro-batch). A gradient's first writer assigns, later ones add; it goes when bx has used it.
#pragma once

#include "core/tensor.h"

namespace pith {

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
  At at;
  int layer = -1, stage = 0;
  TensorList in, out;  // as meta
  TensorList grad;     // of the outputs, while bx and bw run; undefined where none arrived
  TensorList bx_keep;  // values that bx needs; released after it
  TensorList bw_keep;
  double f[4] = {};                    // eps, scale, ...
  int64_t i[8] = {};                   // sizes, flags, ...
  void (*bx)(Rank&, Node&) = nullptr;  // gradients of inputs
  // Weight gradients of n nodes that share op and weights, one a deferred micro-batch.
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

// A node for the caller to complete at once, its outputs variables; null without a tape or without
// an input that needs a gradient.
Node* record(Rank& rank, const char* op, At at, std::initializer_list<Tensor> in,
             std::initializer_list<Tensor*> out);

// Makes `t` a variable of the rank's tape.
void make_leaf(Rank& rank, Tensor& t);
// What has arrived for `t`; may be undefined.
Tensor grad_of(const Tape& tape, const Tensor& t);

// Adds `g` to the gradient of `t`, which takes over g's storage if it is the first; to the
// accumulator of a weight; nowhere if no gradient flows to `t`.
void add_grad(Rank& rank, const Tensor& t, Tensor g);
// to += from, F32 or F64.
void add_into(Rank& rank, const Tensor& to, const Tensor& from, At at = At::here());
// Where an op may write the gradient of `t` in place, undefined if none flows.
struct GradSlot {
  Tensor grad;
  bool add = false;
};
GradSlot grad_slot(Rank& rank, const Tensor& t, At at = At::here());

// Walks nodes [begin, end) of the rank's tape in reverse: bx, then bw unless it is deferred, of
// those whose outputs have a gradient.
void backward(Rank& rank, int begin, int end, bool defer_weights = false);
// The deferred weight gradients of nodes [begin, end), in reverse.
void weight_grads(Rank& rank, Tape& tape, int begin, int end);

}  // namespace pith
