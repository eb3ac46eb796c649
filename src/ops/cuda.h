// cuda: the GPU's forms of the loops of cpu.h and of ops, in builds with CUDA.
#pragma once
#include "core/cuda.h"
#include "ops/formula.h"

namespace pith {

struct Extent;
struct View;
template <class T>
struct Matrix;
template <class T>
struct Slot;

// T: float, double.
template <class T>
struct OnCuda {
  // Of cpu.h; c has n columns.
  static void elementwise(Rank& rank, const Dims& space, const View* v, bool add, Formula f);
  static void gemm(Rank& rank, i64 m, i64 n, i64 k, Matrix<T> a, Matrix<T> b, T beta, T* c);
  // y [outer, inner] = the sum of x [outer, n, inner], in F64.
  static void sum(Rank& rank, const Extent& e, const T* x, T* y);
  // Of shape.cpp.
  static void gather_rows(Rank& rank, const Tensor& x, i64 n, const Tensor& index,
                          const Tensor& begin, Slot<T> y);
  static void scatter_rows(Rank& rank, const Tensor& x, i64 n, const Tensor& ids, const Tensor& y);
  // Over the last dimension.
  static void cumsum(Rank& rank, const Tensor& x, Slot<T> to, bool reverse);
  static void softmax(Rank& rank, const Tensor& x, const Tensor& y);
  static void softmax_grad(Rank& rank, const Tensor& dy, const Tensor& y, Slot<T> dx);
  static void top_k(Rank& rank, const Tensor& x, int k, const Tensor& values, const Tensor& ids);
  static void top_k_grad(Rank& rank, const Tensor& dy, const Tensor& ids, const Tensor& dx);
};

}
