// ops: the one index of every operation; a model includes this and core alone.
// Inputs are of one float dtype, F32, F64 or, on a GPU, BF16, on the rank's device; results are new
// tensors and repeat bit for bit; any size may be 0. A broken contract throws Error naming
// the caller's line. Letters: B batch, S sequence, T tokens (B*S), D hidden, H query heads, K
// key/value heads, N head size, V vocabulary, E experts, k experts a token, F expert width, R rows
// received by a rank, P (row, expert) pairs.
#pragma once
#include "core/rank.h"
#include "core/tape.h"
#include "core/tensor.h"

namespace pith {

// Elementwise; shapes broadcast as in NumPy.
Tensor add(Rank& rank, Tensor a, Tensor b, At at = At::here());
Tensor sub(Rank& rank, Tensor a, Tensor b, At at = At::here());
Tensor mul(Rank& rank, Tensor a, Tensor b, At at = At::here());
Tensor div(Rank& rank, Tensor a, Tensor b, At at = At::here());
Tensor add(Rank& rank, Tensor a, double b, At at = At::here());
Tensor mul(Rank& rank, Tensor a, double b, At at = At::here());
Tensor exp(Rank& rank, Tensor x, At at = At::here());
Tensor log(Rank& rank, Tensor x, At at = At::here());
Tensor sqrt(Rank& rank, Tensor x, At at = At::here());
Tensor tanh(Rank& rank, Tensor x, At at = At::here());
Tensor sigmoid(Rank& rank, Tensor x, At at = At::here());
Tensor silu(Rank& rank, Tensor x, At at = At::here());      // x * sigmoid(x)
Tensor softplus(Rank& rank, Tensor x, At at = At::here());  // log(1 + e^x), without overflow
Tensor relu(Rank& rank, Tensor x, At at = At::here());      // gradient 0 at x = 0
// Gradient 1 inside [low, high], 0 outside.
Tensor clamp(Rank& rank, Tensor x, double low, double high, At at = At::here());
// mask ? a : b, mask U8.
Tensor where(Rank& rank, Tensor mask, Tensor a, Tensor b, At at = At::here());

// Over one dimension (negative: from the end); sum, mean and max keep it, with size 1.
Tensor sum(Rank& rank, Tensor x, int dim, At at = At::here());
Tensor mean(Rank& rank, Tensor x, int dim, At at = At::here());
Tensor max(Rank& rank, Tensor x, int dim, At at = At::here());  // gradient to the first maximum
Tensor cumsum(Rank& rank, Tensor x, int dim, At at = At::here());
Tensor softmax(Rank& rank, Tensor x, int dim, At at = At::here());

// a [..., M, K] x b [..., K, N] -> [..., M, N]; leading dimensions broadcast.
Tensor matmul(Rank& rank, Tensor a, Tensor b, At at = At::here());
// Dimension i of the result is dimension order[i] of x.
Tensor permute(Rank& rank, Tensor x, Dims order, At at = At::here());
// x itself; one size may be -1.
Tensor reshape(Rank& rank, Tensor x, Dims dims, At at = At::here());
// Elements [begin, end) of a dimension.
Tensor slice(Rank& rank, Tensor x, int dim, i64 begin, i64 end, At at = At::here());
// Pieces whose sizes sum to the dimension's; at most 8, as in concat.
TensorList split(Rank& rank, Tensor x, int dim, Dims sizes, At at = At::here());
Tensor concat(Rank& rank, TensorList xs, int dim, At at = At::here());
// x laid out `times` times.
Tensor repeat(Rank& rank, Tensor x, int dim, i64 times, At at = At::here());
// Rows ids[i] of the first dimension, ids I32 [n].
Tensor index_select(Rank& rank, Tensor x, Tensor ids, At at = At::here());
// `rows` rows of zeros, plus row i of src at ids[i].
Tensor scatter_add(Rank& rank, Tensor src, Tensor ids, i64 rows, At at = At::here());
// The k largest of the last dimension, descending; ties go to the lower id, I32.
struct TopK {
  Tensor values, ids;
};
TopK top_k(Rank& rank, Tensor x, int k, At at = At::here());

// x [..., in] w^T + bias, w [out, in], bias [out] or undefined -> [..., out]
Tensor linear(Rank& rank, Tensor x, Tensor w, Tensor bias = {}, At at = At::here());
// Rows of w [V, D] at ids I32 [...] -> [..., D]
Tensor embedding(Rank& rank, Tensor ids, Tensor w, At at = At::here());
// x / sqrt(mean(x^2) + eps) * w over the last dimension.  Zhang & Sennrich 2019, arXiv:1910.07467
Tensor rms_norm(Rank& rank, Tensor x, Tensor w, double eps, At at = At::here());
// sum = x + residual, normed = rms_norm(sum, w, eps).
struct AddRmsNorm {
  Tensor sum, normed;
};
AddRmsNorm add_rms_norm(
    Rank& rank, Tensor x, Tensor residual, Tensor w, double eps, At at = At::here());

// Heads of a packed projection: rows of q (H*N), then k (K*N), then v (K*N).
struct Heads {
  int query = 0, kv = 0, size = 0;
  i64 width() const { return (query + 2 * i64(kv)) * size; }
};
// cos and sin of position * theta^(-2i/N), [positions, N/2].  Su et al. 2021, arXiv:2104.09864
struct Rope {
  Tensor cos, sin;
};
// Tables for positions [0, positions).
Rope rope_tables(Rank& rank, i64 positions, int size, double theta, At at = At::here());
// Per head of q and k: rms_norm with weights [N] (both undefined: none), then rotation of its
// halves, (x1 cos - x2 sin, x2 cos + x1 sin).  qkv [T, (H+2K)*N], positions I32 [T]
Tensor qk_norm_rope(Rank& rank, Tensor qkv, Heads heads, Tensor q_norm, Tensor k_norm, double eps,
    Rope rope, Tensor positions, At at = At::here());

// Which keys a query sees. Row coordinate: position within the whole row of the batch.
struct AttentionMask {
  bool causal = true;  // key coordinate <= query coordinate
  int window = 0;      // > 0: also query - key < window
  Tensor doc_ends;     // I32 [B, S]: exclusive end of the position's document, in row coordinates;
                       // a query sees its own only; undefined: one document
};
// qkv [B*S, (H+2K)*N] -> [B*S, H*N], scores scaled by 1/sqrt(N); with mesh.cp > 1 a ring over the
// cp group, whose member r holds chunks r and 2*cp-1-r of each row.  Vaswani et al. 2017,
// arXiv:1706.03762; Ainslie et al. 2023, arXiv:2305.13245
Tensor attention(
    Rank& rank, Tensor qkv, Heads heads, i64 batch, AttentionMask mask, At at = At::here());
// q [B,S,H,N], k [B,Z,K,N], v [B,Z,K,M] -> [B,S,H,M], with an additive bias or a boolean mask (U8,
// 1 = visible) [1|B, 1|H, S, Z]. The last query stands at the last key; one that sees nothing gives
// zeros.
struct AttentionBias {
  Tensor bias, visible;
};
Tensor attention(Rank& rank, Tensor q, Tensor k, Tensor v, double scale, AttentionMask mask,
    AttentionBias bias = {}, At at = At::here());

struct RouterOptions {
  int top_k = 1;
  bool normalize = false;       // weights of a token divided by their sum
  bool force_balanced = false;  // token t, slot j -> expert (t + j*(E/k)) mod E
  Tensor forced_ids;            // I32 [T, k]: these experts instead of the k largest
};
struct Routing {
  Tensor ids;             // I32 [T, k]; descending probability unless forced
  Tensor weights, probs;  // [T, k]; [T, E]: softmax over all experts
};
// probs = softmax(x w^T), x [T, D], w [E, D], and the top k of them.
Routing router(Rank& rank, Tensor x, Tensor w, RouterOptions options, At at = At::here());

// The expert side of a dispatch: token rows and their pairs, sorted by expert and then by row.
// Indices are I32.
struct Dispatched {
  Tensor rows;       // [R, D]
  Tensor weights;    // [P]: routing weight of each pair
  Tensor row_of;     // [P]: row of each pair
  Tensor offsets;    // [E+1]: first pair of each local expert
  Tensor pair_of;    // [P]: pairs of row 0, then of row 1, ...
  Tensor row_begin;  // [R+1]: where a row's pairs begin in pair_of
};
// Rows [offsets[e], offsets[e+1]) of x [P, in] times w[e]^T, w [E, out, in] -> [P, out].
Tensor grouped_linear(Rank& rank, Tensor x, Tensor w, Tensor offsets, At at = At::here());
// grouped_linear of expand_rows(d), and reduce_pairs of grouped_linear(x, w, d.offsets); the rows
// of pairs that are equal are not kept.
Tensor expand_linear(Rank& rank, const Dispatched& d, Tensor w, At at = At::here());
Tensor linear_reduce(Rank& rank, Tensor x, Tensor w, const Dispatched& d, At at = At::here());
// silu(gate) * up * weight, gate_up [P, 2F] = gate | up, weights [P] or undefined -> [P, F].
// Shazeer 2020, arXiv:2002.05202
Tensor swiglu(Rank& rank, Tensor gate_up, Tensor weights = {}, At at = At::here());

// The sum over tokens of -log softmax(x w^T)[label], x [T, D], w [V, D], labels I32 [T] or
// kIgnoreLabel -> [1], in chunks of rows. A terminal op: its gradient is taken to be `scale`
// whatever arrives, and w's is added in the forward.
Tensor lm_head_cross_entropy(
    Rank& rank, Tensor x, Tensor w, Tensor labels, double scale, At at = At::here());

// Outside the tape, on flat buffers in place.  Loshchilov & Hutter 2019, arXiv:1711.05101,
// Algorithm 2
struct AdamW {
  double lr = 0, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0.1;
  double grad_scale = 1;  // for clipping
  i64 step = 1;           // 1-based, for the bias corrections
};
void adamw_step(
    Rank& rank, Tensor w, Tensor g, Tensor m, Tensor v, const AdamW& options, At at = At::here());
double sum_squares(Rank& rank, Tensor x, At at = At::here());  // in F64
// Element i of x becomes std * normal_at(key, first + i).
void fill_normal(Rank& rank, Tensor x, u64 key, u64 first, double std, At at = At::here());
// to = from, of any float dtypes.
void cast(Rank& rank, Tensor from, Tensor to, At at = At::here());
void fill_constant(Rank& rank, Tensor x, double value, At at = At::here());

}
