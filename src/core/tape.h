// tape: reverse-mode differentiation over a list of plain nodes, one a (chunk, micro-batch). A
// gradient's first writer assigns, later ones add; it goes when bx has used it.
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
  TensorList in, out;           // as meta
  TensorList grad;              // of the outputs; undefined where none arrived
  TensorList bx_keep, bw_keep;  // values that bx and bw need, released after it
  double f[4] = {};
  i64 i[8] = {};
  // Gradients of inputs; of the weights that n nodes, one a deferred micro-batch, share.
  void (*bx)(Rank&, Node&) = nullptr;
  void (*bw)(Rank&, Node* const* nodes, int n) = nullptr;
  bool bw_now = false, bw_done = false;  // right after bx; done
};

struct Tape {
  vector<Node> nodes;
  vector<Tensor> grads;  // by Tensor::var
  int size() const { return int(nodes.size()); }
  void clear() { *this = Tape(); }
};

// A node for the caller to complete at once; null if no gradient is needed.
Node* record(Rank& rank, const char* op, At at, std::initializer_list<Tensor> in,
    std::initializer_list<Tensor*> out);

void make_leaf(Rank& rank, Tensor& t);
Tensor grad_of(const Tape& tape, const Tensor& t);

// Adds `g`, whose storage is taken over if it is the first, to the gradient of `t`, if one flows.
void add_grad(Rank& rank, const Tensor& t, Tensor g);
void add_into(Rank& rank, const Tensor& to, const Tensor& from, At at = At::here());
// Where an op may write the gradient of `t` in place, undefined if none flows.
struct GradSlot {
  Tensor grad;
  bool add = false;
};
GradSlot grad_slot(Rank& rank, const Tensor& t, At at = At::here());

// bx, then bw unless it is deferred, of nodes [begin, end) in reverse.
void backward(Rank& rank, int begin, int end, bool defer_weights = false);
// What was deferred in the same nodes of several micro-batches.
struct NodeRange {
  Tape* tape = nullptr;
  int begin = 0, end = 0;
};
void weight_grads(Rank& rank, const vector<NodeRange>& ranges);

}
