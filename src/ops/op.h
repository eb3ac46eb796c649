// op: checks, the choice of element type and tape nodes of every op.
#pragma once
#include "core/cuda.h"
#include "ops/ops.h"

namespace pith {

// Where to write, and whether to add; data is null where nothing is wanted.
template <class T>
struct Slot {
  T* data = nullptr;
  bool add = false;
  constexpr void put(i64 i, T value) const { data[i] = add ? T(data[i] + value) : value; }
};

inline bool is_i32(const Tensor& t, const Dims& dims) {
  return t.dtype == DType::I32 && t.dim == dims;
}
inline Dims with_size(Dims dims, int d, i64 size) {
  dims[d] = size;
  return dims;
}
// Of those that are defined.
bool one_dtype(std::initializer_list<const Tensor*> ts);

// One call of an op.
struct Op {
  Rank& rank;
  const char* name;
  At at;

  void check(std::initializer_list<Need> needs, std::initializer_list<const Tensor*> ts) const {
    pith::check(rank, name, at, needs, ts);
  }
  // Defined, of one dtype, on one device.
  void check_alike(std::initializer_list<const Tensor*> ts) const;
  // Elements of `ids` (I32) are in [0, limit) or `also`; on a GPU with PITH_DEBUG=1 alone.
  void check_ids(const char* what, const Tensor& ids, i64 limit, int also = 0) const;
  // `offsets` (I32) ascend from 0 to P = last.
  void check_offsets(const char* what, const Tensor& offsets, i64 last) const;
  // `dim` of x, from the end when negative, as one from the beginning.
  int dim_of(const Tensor& x, int dim) const;
  Dims broadcast(std::initializer_list<const Tensor*> ts) const;

  Tensor empty(const Dims& dims, DType dtype) const { return pith::empty(rank, dims, dtype, at); }
  Tensor like(const Tensor& x) const { return empty(x.dim, x.dtype); }

  // f(T*), a null pointer, T being x's float, double or, on a GPU, BF16: the GPU's form of an op is
  // `if (x.on_gpu()) return OnCuda<T>::...` in f.
  template <class F>
  void typed(const Tensor& x, F&& f) const {
    if constexpr (kCuda)
      if (x.dtype == DType::BF16 && x.on_gpu()) return f((BF16*)nullptr);
    on_cpu(x, f);
  }
  template <class F>
  void on_cpu(const Tensor& x, F&& f) const {
    check({{"dtype f32 or f64, or bf16 on a GPU", x.dtype == DType::F32 || x.dtype == DType::F64}},
        {&x});
    if (x.dtype == DType::F64)
      f((double*)nullptr);
    else
      f((float*)nullptr);
  }
};

// What a node's bx or bw gets.
template <class T>
struct Backward {
  Rank& rank;
  Node& node;
  const TensorList& keep;  // for this function

  Op op() const { return {rank, node.op, node.at}; }
  const Tensor& dy(int output = 0) const { return node.grad[output]; }
  GradSlot slot(int input) const { return grad_slot(rank, node.in[input], node.at); }
  Slot<T> to(int input) const {
    GradSlot s = slot(input);
    return {s.grad.as<T>(), s.add};
  }
  // For what only adds; undefined if not wanted.
  Tensor zeroed(int input) const {
    GradSlot s = slot(input);
    if (!s.add) fill_zero(rank, s.grad);
    return s.grad;
  }
};

template <class F>
void run_backward(Rank& rank, Node& node, const TensorList& keep) {
  Op{rank, node.op, node.at}.typed(node.in[0], [&]<class T>(T*) {
    F{}(Backward<T>{rank, node, keep});
  });
}

// The node that record() made, or null. Functions are captureless, of a Backward<T>.
struct Recorded {
  Node* node;

  Recorded numbers(std::initializer_list<i64> i, std::initializer_list<double> f = {}) const {
    for (size_t k = 0; node && k < i.size(); k++) node->i[k] = i.begin()[k];
    for (size_t k = 0; node && k < f.size(); k++) node->f[k] = f.begin()[k];
    return *this;
  }
  template <class F>
  Recorded bx(const TensorList& keep, F) const {
    if (!node) return *this;
    node->bx_keep = keep;
    node->bx = [](Rank& r, Node& n) { run_backward<F>(r, n, n.bx_keep); };
    return *this;
  }
  // Gradients of the inputs from `first` on, weights: they can wait unless an op made one.
  template <class F>
  void bw(int first, const TensorList& keep, F) const {
    if (!node) return;
    node->bw_keep = keep;
    for (int k = first; k < node->in.count; k++)
      node->bw_now |= node->in[k].var >= 0 && !node->in[k].grad;
    node->bw = [](Rank& r, Node* const* nodes, int count) {
      for (int i = 0; i < count; i++) run_backward<F>(r, *nodes[i], nodes[i]->bw_keep);
    };
  }
};

// To be completed at once with what the node keeps and its backward.
inline Recorded record(
    const Op& op, std::initializer_list<Tensor> in, std::initializer_list<Tensor*> out) {
  return {record(op.rank, op.name, op.at, in, out)};
}

}
