// cpu: what the CPU implementations of the ops share. Results never depend on the number of
// threads: only outputs are divided among them, in pieces of fixed size. defines: float_kernel,
// need_cpu, parallel_rows, parallel_products, Matrix, gemm
#pragma once
#include <cstdint>

#include "core/rank.h"
#include "core/tensor.h"

namespace pith {

// Throws unless `x` is in main memory. The one place to give way when an op gets a GPU form.
inline void need_cpu(const char* op, At at, const Tensor& x) {
  if (x.device == Device::CPU) return;
  failed(text("%s:%d: %s", at.file, at.line, op),
         text("no CUDA implementation in this build (got %s)", describe(x).c_str()),
         "device = cpu");
}

// Calls f(T*) with a null pointer of x's element type, float or double, so that one generic lambda,
// `[&]<class T>(T*) { ... }`, serves both.
template <class F>
void float_kernel(const Rank& rank, const char* op, At at, const Tensor& x, F&& f) {
  need_cpu(op, at, x);
  check(rank, op, at, {{"dtype f32 or f64", x.dtype == DType::F32 || x.dtype == DType::F64}}, {&x});
  if (x.dtype == DType::F64)
    f(static_cast<double*>(nullptr));
  else
    f(static_cast<float*>(nullptr));
}

// Below this many elementary operations, or multiply-adds of a product, a second thread costs more
// time than it saves.
constexpr int64_t kParallelWork = 1 << 16, kParallelProduct = 1 << 20;

// f(i) for i in [0, rows), on all threads when rows * work_per_row pays. f must write to places of
// its own row only, and must not throw.
template <class F>
void parallel_rows(int64_t rows, int64_t work_per_row, F&& f) {
#pragma omp parallel for schedule(static) if (rows > 1 && rows * work_per_row > kParallelWork)
  for (int64_t i = 0; i < rows; i++) f(i);
}

// The same where f computes products of that many multiply-adds a row, on average.
template <class F>
void parallel_products(int64_t rows, int64_t per_row, F&& f) {
#pragma omp parallel for schedule(dynamic) if (rows > 1 && rows * per_row > kParallelProduct)
  for (int64_t i = 0; i < rows; i++) f(i);
}

enum class Layout : uint8_t { Normal, Transposed };
// A row-major factor; `ld` elements from one stored row to the next.
template <class T>
struct Matrix {
  const T* data;
  int64_t ld;
  Layout layout = Layout::Normal;
};

// c [m, n] = alpha * a [m, k] b [k, n] + beta * c, where a Transposed factor is stored [k, m] or
// [n, k]. beta = 0 never reads c; any size may be 0. For float and double (matmul.cpp).
template <class T>
void gemm(int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, T beta, T* c, int64_t ldc,
          T alpha = 1);
}  // namespace pith
