// cuda: the GPU's forms of the loops of cpu.h and of ops, in builds with CUDA.
#pragma once
#include <type_traits>

#include "core/cuda.h"
#include "ops/formula.h"
#include "ops/ops.h"

namespace pith {

struct AttentionCore;
struct AttentionViews;
struct Extent;
struct HeadView;
struct View;

// c [m, n] = or += a b, of any float dtypes that cuBLAS joins; see product() of cpu.h.
void cuda_gemm(Rank& rank, i64 m, i64 n, i64 k, const Tensor& a, bool a_transposed, const Tensor& b,
    bool b_transposed, const GradSlot& c);
// y [outer, inner] = the sum of x [outer, n, inner], of any float dtypes, in F64.
void cuda_sum(Rank& rank, const Extent& e, const Tensor& x, const Tensor& y);
void cuda_cast(Rank& rank, const Tensor& from, const Tensor& to);  // F32 to BF16, or as F64
// counts[g, e] += the ids of row group g that are e; ids I32 [T, k], counts F64 [groups, E].
void cuda_count(Rank& rank, const Tensor& ids, const Tensor& counts);
// ids I32 [n] in [0, limit), ascending; order: where each stood, equal ones in their order.
void cuda_sort(Rank& rank, const Tensor& ids, i64 limit, const Tensor& sorted, const Tensor& order);

// Sets d's indices for ids I32 [T, k] of all experts, here; the token and slot of each of its
// pairs, as t * k + slot.
Tensor cuda_dispatch(Rank& rank, const Tensor& ids, int experts, Dispatched& d);
// The pairs of several micro-batches, each sorted by expert, as one list so sorted: rows, of a
// multiple of 16 bytes, index[i][p] of x[i] or, undefined, p; and the offsets of all.
Tensor cuda_join(
    Rank& rank, const TensorList& x, const TensorList& index, const TensorList& offsets);
Tensor cuda_join_offsets(Rank& rank, const TensorList& offsets);
// See attention.h. Heads of at most 256.
void cuda_attention(Rank& rank, const AttentionCore& core, HeadView out, const Tensor& lse);
void cuda_attention_grad(Rank& rank, const AttentionCore& core, HeadView out, const Tensor& lse,
    HeadView dout, const AttentionViews& grads);

// What sums, statistics, probabilities and weights are in beside T.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// T: float, double, BF16.
template <class T>
struct OnCuda {
  // Of cpu.h; c has n columns.
  static void elementwise(Rank& rank, const Dims& space, const View* v, bool add, Formula f);
  // Of shape.cpp.
  static void gather_rows(Rank& rank, const Tensor& x, i64 n, const Tensor& index,
      const Tensor& begin, const GradSlot& y);
  static void scatter_rows(Rank& rank, const Tensor& x, i64 n, const Tensor& ids, const Tensor& y);
  // Over the last dimension.
  static void cumsum(Rank& rank, const Tensor& x, const GradSlot& to, bool reverse);
  static void softmax(Rank& rank, const Tensor& x, const Tensor& y);
  static void softmax_grad(Rank& rank, const Tensor& dy, const Tensor& y, const GradSlot& dx);
  static void top_k(Rank& rank, const Tensor& x, int k, const Tensor& values, const Tensor& ids);
  static void top_k_grad(Rank& rank, const Tensor& dy, const Tensor& ids, const Tensor& dx);

  // The fused ops. `keep` is what their nodes keep.
  static void rms_norm(Rank& rank, const Tensor& x, const Tensor& residual, const Tensor& w,
      double eps, const AddRmsNorm& y, const Tensor& rstd);
  static void rms_norm_grad(Rank& rank, const Tensor& dy, const Tensor& dsum,
      const TensorList& keep, const Tensor& dx, const Tensor& copy);
  static void rms_norm_weight(
      Rank& rank, const Tensor& dy, const Tensor& x, const Tensor& rstd, const GradSlot& dw);
  static void rope_tables(Rank& rank, const Rope& rope, int size, double theta);
  static void qk_norm_rope(Rank& rank, const Heads& heads, const TensorList& keep,
      const Tensor& qkv, double eps, const Tensor& y);
  static void qk_norm_rope_grad(
      Rank& rank, const Heads& heads, const TensorList& keep, const Tensor& dy, const Tensor& dx);
  // Of the weight of heads [first, end).
  static void qk_norm_weight(Rank& rank, const Heads& heads, const TensorList& keep,
      const Tensor& dy, int first, int end, const GradSlot& dw);
  // out.probs holds logits; T is that of the router's input.
  static void route(Rank& rank, const RouterOptions& options, const Routing& out);
  static void route_grad(Rank& rank, bool normalize, const TensorList& keep, const Tensor& dweights,
      const Tensor& dprobs, const Tensor& dlogits);
  static void swiglu(Rank& rank, const Tensor& gate_up, const Tensor& weights, const Tensor& y);
  static void swiglu_grad(Rank& rank, const Tensor& dy, const TensorList& keep,
      const Tensor& dgate_up, const Tensor& dweights);
  // losses F64, a row; with `grad`, logits become their gradients.
  static void row_losses(Rank& rank, const Tensor& logits, const Tensor& labels, double scale,
      bool grad, const Tensor& losses);
  static void adamw(Rank& rank, const Tensor& w, const Tensor& g, const Tensor& m, const Tensor& v,
      const AdamW& options);
  static double sum_squares(Rank& rank, const Tensor& x);
  static void fill_normal(Rank& rank, const Tensor& x, u64 key, u64 first, double std);
};

}
