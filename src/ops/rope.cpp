// rope_tables: cos and sin of p * theta^(-2i/size), each [positions, size/2]; angles in f64.
// qk_norm_rope: of each head of q and k, n = rms_norm(x, norm weight, eps) if there are weights,
// then y1 = n1 cos - n2 sin, y2 = n2 cos + n1 sin of its two halves; v is copied.
//                                                                  Su et al. 2021, arXiv:2104.09864
//   in     qkv [T, (H+2K)*N]   q_norm, k_norm [N] or both undefined   cos, sin [positions, N/2]
//          f32|f64, one dtype    positions I32 [T]                                out  like qkv
//   keeps  bx: tables, positions; if there are norms, qkv, their weights and rstd [T, H+K] = 1/rms
//          bw: all but the weights
//   grad   bx: dqkv +=, rotation by the opposite angle, then rms_norm's   bw: the norm weights' +=
//   errors shapes; one norm weight without the other; a position outside the tables; dtypes differ
//   bitwise run-to-run: yes, for any number of threads
#include <algorithm>

#include "ops/layer_parts.h"
#include "ops/ops.h"

namespace pith {

namespace {

// What the heads of a packed projection are normed and turned by.
template <class T>
struct HeadTurns {
  Heads heads;
  const TensorList& keep;  // cos, sin, positions, qkv, rstd, q_norm, k_norm; norms undefined: none

  int turned() const { return heads.query + heads.kv; }
  int64_t width() const { return int64_t{turned() + heads.kv} * heads.size; }
  const T* x() const { return keep[3].as<T>(); }
  T& rstd(int64_t t, int h) const { return keep[4].as<T>()[t * turned() + h]; }
  const T* weight(int h) const { return keep[h < heads.query ? 5 : 6].as<T>(); }
  // to = from, one head of token t, turned by the token's angle times `sign`. May be in place.
  void turn(int64_t t, T sign, const T* from, T* to) const {
    const int64_t half = heads.size / 2, row = keep[2].i32()[t] * half;
    const T *cos = keep[0].as<T>() + row, *sin = keep[1].as<T>() + row;
#pragma GCC ivdep
    for (int64_t i = 0; i < half; i++) {
      const T a = from[i], b = from[i + half], s = sign * sin[i];
      to[i] = a * cos[i] - b * s;
      to[i + half] = b * cos[i] + a * s;
    }
  }
  // f(t, h, first element) of each head to turn; v's elements are copied.
  template <class F>
  void each_head(int64_t tokens, const T* from, T* to, F&& f) const {
    parallel_rows(tokens, width() * 8, [&](int64_t t) {
      const int64_t first = t * width(), v = first + turned() * heads.size;
      for (int h = 0; h < turned(); h++) f(t, h, first + h * heads.size);
      std::copy_n(from + v, heads.kv * heads.size, to + v);
    });
  }
};
Heads heads_of(const Node& node) { return {int(node.i[0]), int(node.i[1]), int(node.i[2])}; }

}  // namespace

template <class T>
static void qk_norm_rope_cpu(const HeadTurns<T>& in, int64_t tokens, T eps, T* out) {
  const int N = in.heads.size;
  in.each_head(tokens, in.x(), out, [&](int64_t t, int h, int64_t first) {
    const T *x = in.x() + first, *w = in.weight(h);
    T* y = out + first;
    if (w) {
      const T scale = in.rstd(t, h) = rms_scale(x, N, eps);
      for (int i = 0; i < N; i++) y[i] = x[i] * scale * w[i];
    }
    in.turn(t, 1, w ? y : x, y);
  });
}

template <class T>
static void qk_norm_rope_bx_cpu(const HeadTurns<T>& in, int64_t tokens, const T* dy, T* dx) {
  in.each_head(tokens, dy, dx, [&](int64_t t, int h, int64_t first) {
    T* u = dx + first;
    in.turn(t, -1, dy + first, u);
    if (const T* w = in.weight(h))
      rms_norm_grad(in.heads.size, u, w, in.x() + first, in.rstd(t, h), u);
  });
}

// u: the gradients of the normed heads. dw += those of heads [first, end) times these without w.
template <class T>
static void qk_norm_rope_bw_cpu(const HeadTurns<T>& in, int64_t tokens, const T* u, int first,
                                int end, Slot<T> dw) {
  const int64_t N = in.heads.size, count = end - first;
  add_columns(tokens * count, N, dw, [&](int64_t row, int64_t i) {
    const int64_t t = row / count, h = first + row % count, at = t * in.width() + h * N + i;
    return u[at] * (in.x()[at] * in.rstd(t, h));
  });
}

static void qk_norm_rope_bx(Rank& rank, Node& node) {
  const Tensor& dy = node.grad[0];
  const Tensor dx = empty(rank, dy.dim, dy.dtype, node.at);
  float_kernel(rank, node, [&]<class T>(T*) {
    qk_norm_rope_bx_cpu<T>({heads_of(node), node.bx_keep}, dy.rows(), dy.as<T>(), dx.as<T>());
  });
  add_grad(rank, node.in[0], dx);
}

static void qk_norm_rope_bw(Rank& rank, Node& node) {
  const Tensor& dy = node.grad[0];
  const Heads heads = heads_of(node);
  const int64_t tokens = dy.rows();
  const Tensor turned = empty(rank, dy.dim, dy.dtype, node.at);
  float_kernel(rank, node, [&]<class T>(T*) {
    const HeadTurns<T> in{heads, node.bw_keep};  // without weights: turns only
    const T* u = turned.as<T>();
    qk_norm_rope_bx_cpu<T>(in, tokens, dy.as<T>(), turned.as<T>());
    // One after the other: one weight may serve both, and the first writer assigns.
    qk_norm_rope_bw_cpu<T>(in, tokens, u, 0, heads.query, writable<T>(rank, node, 1));
    qk_norm_rope_bw_cpu<T>(in, tokens, u, heads.query, in.turned(), writable<T>(rank, node, 2));
  });
}

Rope rope_tables(Rank& rank, int64_t positions, int size, double theta, At at) {
  check(rank, "rope_tables", at,
        {{"an even head size", size > 0 && size % 2 == 0},
         {"positions >= 0", positions >= 0},
         {"theta > 0", theta > 0}},
        {});
  const DType dtype = rank.compute == DType::F64 ? DType::F64 : DType::F32;
  const int64_t half = size / 2;
  Rope rope{empty(rank, {positions, half}, dtype, at), empty(rank, {positions, half}, dtype, at)};
  float_kernel(rank, "rope_tables", at, rope.cos, [&]<class T>(T*) {
    parallel_rows(positions, half * 100, [&](int64_t p) {
      for (int64_t i = 0; i < half; i++) {
        const double turn = double(p) * std::pow(theta, -2.0 * i / size);
        rope.cos.as<T>()[p * half + i] = static_cast<T>(std::cos(turn));
        rope.sin.as<T>()[p * half + i] = static_cast<T>(std::sin(turn));
      }
    });
  });
  return rope;
}

Tensor qk_norm_rope(Rank& rank, Tensor qkv, Heads heads, Tensor q_norm, Tensor k_norm, double eps,
                    Rope rope, Tensor positions, At at) {
  const char* op = "qk_norm_rope";
  const int64_t N = heads.size, width = (heads.query + 2 * int64_t{heads.kv}) * N;
  const bool normed = q_norm.defined();
  const auto alike = [&](const Tensor& t) { return !t.defined() || t.dtype == qkv.dtype; };
  check(rank, op, at,
        {{"qkv [T, (H+2K)*N] with an even N",
          qkv.dim.rank == 2 && qkv.dim[1] == width && N > 0 && N % 2 == 0},
         {"positions I32 [T]", positions.dtype == DType::I32 && positions.dim == Dims{qkv.dim[0]}},
         {"q_norm and k_norm [N], or both undefined",
          normed ? q_norm.dim == Dims{N} && k_norm.dim == Dims{N} : !k_norm.defined()},
         {"tables [positions, N/2]",
          rope.cos.dim.rank == 2 && rope.cos.dim[1] == N / 2 && rope.sin.dim == rope.cos.dim},
         {"one dtype", alike(rope.cos) && alike(rope.sin) && alike(q_norm) && alike(k_norm)}},
        {&qkv, &q_norm, &k_norm, &rope.cos, &positions});
  Tensor y = empty(rank, qkv.dim, qkv.dtype, at);
  const Tensor rstd =
      normed ? empty(rank, {qkv.dim[0], heads.query + heads.kv}, qkv.dtype, at) : Tensor{};
  const TensorList all = {rope.cos, rope.sin, positions, qkv, rstd, q_norm, k_norm};
  float_kernel(rank, op, at, qkv, [&]<class T>(T*) {
    check_ids(rank, op, at, "positions", positions, rope.cos.dim[0]);
    qk_norm_rope_cpu<T>({heads, all}, qkv.dim[0], static_cast<T>(eps), y.as<T>());
  });
  if (Node* n = record(rank, op, at, {qkv, q_norm, k_norm}, {&y})) {
    n->i[0] = heads.query;
    n->i[1] = heads.kv;
    n->i[2] = N;
    n->bx_keep = {rope.cos, rope.sin, positions};
    n->bx = qk_norm_rope_bx;
    if (normed) {
      n->bx_keep = all;
      n->bw_keep = {rope.cos, rope.sin, positions, qkv, rstd};
      set_backward<qk_norm_rope_bx, qk_norm_rope_bw>(*n, {1, 2});
    }
  }
  return y;
}

}  // namespace pith
