#include <algorithm>

#include "ops/cpu.h"

namespace pith {
namespace {

// The heads of a packed projection, and what they are normed and turned by.
template <class T>
struct Turns {
  Heads heads;
  const TensorList& keep;  // cos, sin, positions, qkv, rstd, q_norm, k_norm; norms undefined: none

  int turned() const { return heads.query + heads.kv; }
  const T* x() const { return keep[3].as<T>(); }
  T& rstd(i64 t, int h) const { return keep[4].as<T>()[t * turned() + h]; }
  const T* weight(int h) const { return keep[h < heads.query ? 5 : 6].as<T>(); }
  // to = from, one head of token t, turned by the token's angle times `sign`. May be in place.
  void turn(i64 t, T sign, const T* from, T* to) const {
    i64 half = heads.size / 2, position = keep[2].i32()[t];
    const T *cos = row_of<T>(keep[0], position), *sin = row_of<T>(keep[1], position);
#pragma GCC ivdep
    for (i64 i = 0; i < half; i++) {
      T a = from[i], b = from[i + half], s = sign * sin[i];
      to[i] = a * cos[i] - b * s;
      to[i + half] = b * cos[i] + a * s;
    }
  }
  // f(t, h, first element) of each head to turn; v's elements are copied.
  template <class F>
  void each_head(i64 tokens, const T* from, T* to, F&& f) const {
    parallel_rows(tokens, heads.width() * 8, [&](i64 t) {
      i64 first = t * heads.width(), v = first + turned() * heads.size;
      for (int h = 0; h < turned(); h++) f(t, h, first + h * heads.size);
      std::copy_n(from + v, heads.kv * heads.size, to + v);
    });
  }

  void forward(const Tensor& qkv, T eps, const Tensor& out) const {
    each_head(qkv.rows(), qkv.as<T>(), out.as<T>(), [&](i64 t, int h, i64 first) {
      const T *from = qkv.as<T>() + first, *w = weight(h);
      T* y = out.as<T>() + first;
      if (w) {
        T scale = rstd(t, h) = rms_scale(from, heads.size, eps);
        for (int i = 0; i < heads.size; i++) y[i] = from[i] * scale * w[i];
      }
      turn(t, 1, w ? y : from, y);
    });
  }
  void backward(const Tensor& dy, const Tensor& dx) const {
    each_head(dy.rows(), dy.as<T>(), dx.as<T>(), [&](i64 t, int h, i64 first) {
      T* u = dx.as<T>() + first;
      turn(t, -1, dy.as<T>() + first, u);
      if (const T* w = weight(h)) rms_norm_grad(heads.size, u, w, x() + first, rstd(t, h), u);
    });
  }
  // dw = or += the gradients u of the normed heads [first, end) times these without w.
  void weight_grad(const Tensor& u, int first, int end, Slot<T> dw) const {
    i64 count = end - first;
    add_columns<T>(u.rows() * count, heads.size, dw, [&](i64 row, i64 i) {
      i64 t = row / count, h = first + row % count;
      i64 at = t * heads.width() + h * heads.size + i;
      return u.as<T>()[at] * (x()[at] * rstd(t, h));
    });
  }
};

Heads heads_of(const Node& node) { return {int(node.i[0]), int(node.i[1]), int(node.i[2])}; }
// dx, and copy if wanted, = the norm's gradient of dy + dsum; either may be undefined.
template <class T>
void norm_grad(Rank& rank, const Tensor& dy, const Tensor& dsum, const TensorList& keep,
    const Tensor& dx, const Tensor& copy) {
  if (dx.on_gpu()) return OnCuda<T>::rms_norm_grad(rank, dy, dsum, keep, dx, copy);
  const Tensor &x = keep[0], &w = keep[1], &rstd = keep[2];
  i64 n = dx.cols();
  parallel_rows(dx.rows(), n * 8, [&](i64 r) {
    T* to = row_of<T>(dx, r);
    if (dy.defined())
      rms_norm_grad(n, row_of<T>(dy, r), w.as<T>(), row_of<T>(x, r), rstd.as<T>()[r], to);
    else
      std::fill_n(to, n, T(0));
    const T* more = dsum.as<T>() + r * n;
    for (i64 j = 0; dsum.defined() && j < n; j++) to[j] += more[j];
    if (copy.defined()) std::copy_n(to, n, row_of<T>(copy, r));
  });
}

// Without a residual sum is x, and no output of the node.
AddRmsNorm norm_of_sum(const Op& op, bool summed, const Tensor& x, const Tensor& residual,
    const Tensor& w, double eps) {
  i64 D = w.numel();
  op.check({{"x [..., D] and w [D]", x.defined() && w.dim == Dims{x.cols()}},
               {"residual of x's shape", !summed || residual.dim == x.dim},
               {"one dtype", one_dtype({&x, &residual, &w})}},
      {&x, &residual, &w});
  AddRmsNorm y{summed ? op.like(x) : x, op.like(x)};
  Tensor rstd = op.empty({x.rows()}, wide(x.dtype));
  op.typed(x, [&]<class T>(T*) {
    if (x.on_gpu())
      return OnCuda<T>::rms_norm(op.rank, x, summed ? residual : Tensor{}, w, eps, y, rstd);
    parallel_rows(x.rows(), D * 4, [&](i64 r) {
      T *row = row_of<T>(y.sum, r), *out = row_of<T>(y.normed, r);
      const T *a = row_of<T>(x, r), *b = residual.as<T>() + r * D;
      for (i64 j = 0; summed && j < D; j++) row[j] = a[j] + b[j];
      T scale = rstd.as<T>()[r] = rms_scale(row, D, T(eps));
      for (i64 j = 0; j < D; j++) out[j] = row[j] * scale * w.as<T>()[j];
    });
  });
  (summed ? record(op, {x, residual, w}, {&y.sum, &y.normed})
          : record(op, {x, residual, w}, {&y.normed}))
      .bx({y.sum, w, rstd},
          []<class T>(Backward<T> b) {
            bool two = b.node.out.count == 2, twice = two && b.node.in[1].needs_grad();
            Tensor dx = b.op().like(b.keep[0]), copy = twice ? b.op().like(dx) : Tensor{};
            const Tensor dsum = two ? b.dy() : Tensor{};
            norm_grad<T>(b.rank, b.dy(two), dsum, b.keep, dx, copy);
            if (twice) add_grad(b.rank, b.node.in[1], copy);
            add_grad(b.rank, b.node.in[0], dx);
          })
      .bw(2, {y.sum, rstd}, []<class T>(Backward<T> b) {
        const Tensor &dy = b.dy(b.node.out.count - 1), &rows = b.keep[0], &scales = b.keep[1];
        if (!dy.defined()) return;
        if (dy.on_gpu()) return OnCuda<T>::rms_norm_weight(b.rank, dy, rows, scales, b.slot(2));
        i64 n = rows.cols();
        const T *g = dy.as<T>(), *row = rows.as<T>(), *scale = scales.as<T>();
        add_columns<T>(rows.rows(), n, b.to(2),
            [=](i64 r, i64 j) { return g[r * n + j] * (row[r * n + j] * scale[r]); });
      });
  return y;
}

}

Tensor rms_norm(Rank& rank, Tensor x, Tensor w, double eps, At at) {
  return norm_of_sum({rank, "rms_norm", at}, false, x, {}, w, eps).normed;
}

AddRmsNorm add_rms_norm(Rank& rank, Tensor x, Tensor residual, Tensor w, double eps, At at) {
  return norm_of_sum({rank, "add_rms_norm", at}, true, x, residual, w, eps);
}

Rope rope_tables(Rank& rank, i64 positions, int size, double theta, At at) {
  Op op{rank, "rope_tables", at};
  op.check({{"an even head size", size > 0 && size % 2 == 0}, {"positions >= 0", positions >= 0},
               {"theta > 0", theta > 0}},
      {});
  DType dtype = rank.compute == DType::F64 ? DType::F64 : DType::F32;
  i64 half = size / 2;
  Rope rope{op.empty({positions, half}, dtype), op.empty({positions, half}, dtype)};
  op.typed(rope.cos, [&]<class T>(T*) {
    if (rope.cos.on_gpu()) return OnCuda<T>::rope_tables(rank, rope, size, theta);
    parallel_rows(positions, half * 100, [&](i64 p) {
      for (i64 i = 0; i < half; i++) {
        double turn = double(p) * std::pow(theta, -2.0 * i / size);
        row_of<T>(rope.cos, p)[i] = T(std::cos(turn));
        row_of<T>(rope.sin, p)[i] = T(std::sin(turn));
      }
    });
  });
  return rope;
}

Tensor qk_norm_rope(Rank& rank, Tensor qkv, Heads heads, Tensor q_norm, Tensor k_norm, double eps,
    Rope rope, Tensor positions, At at) {
  Op op{rank, "qk_norm_rope", at};
  i64 N = heads.size;
  bool normed = q_norm.defined();
  op.check({{"qkv [T, (H+2K)*N] with an even N",
                qkv.dim.rank == 2 && qkv.dim[1] == heads.width() && N > 0 && N % 2 == 0},
               {"positions I32 [T]", is_i32(positions, {qkv.dim[0]})},
               {"q_norm and k_norm [N], or both undefined",
                   normed ? q_norm.dim == Dims{N} && k_norm.dim == Dims{N} : !k_norm.defined()},
               {"tables [positions, N/2]", rope.cos.dim.rank == 2 && rope.cos.dim[1] == N / 2 &&
                                               rope.sin.dim == rope.cos.dim},
               {"one dtype, of the tables f32 with bf16", one_dtype({&qkv, &q_norm, &k_norm}) &&
                                                              one_dtype({&rope.cos, &rope.sin}) &&
                                                              rope.cos.dtype == wide(qkv.dtype)}},
      {&qkv, &q_norm, &k_norm, &rope.cos, &positions});
  Tensor y = op.like(qkv);
  Tensor rstd = normed ? op.empty({qkv.dim[0], heads.query + heads.kv}, wide(qkv.dtype)) : Tensor{};
  const TensorList all = {
      rope.cos, rope.sin, positions, normed ? qkv : Tensor{}, rstd, q_norm, k_norm};
  op.check_ids("positions", positions, rope.cos.dim[0]);
  op.typed(qkv, [&]<class T>(T*) {
    if (y.on_gpu()) return OnCuda<T>::qk_norm_rope(rank, heads, all, qkv, eps, y);
    Turns<T>{heads, all}.forward(qkv, T(eps), y);
  });
  auto node = record(op, {qkv, q_norm, k_norm}, {&y})
                  .numbers({heads.query, heads.kv, N})
                  .bx(all, []<class T>(Backward<T> b) {
                    const Heads h = heads_of(b.node);
                    Tensor dx = b.op().like(b.dy());
                    if (dx.on_gpu())
                      OnCuda<T>::qk_norm_rope_grad(b.rank, h, b.keep, b.dy(), dx);
                    else
                      Turns<T>{h, b.keep}.backward(b.dy(), dx);
                    add_grad(b.rank, b.node.in[0], dx);
                  });
  if (!normed) return y;
  node.bw(1, {rope.cos, rope.sin, positions, qkv, rstd}, []<class T>(Backward<T> b) {
    const Heads h = heads_of(b.node);
    const int turned = h.query + h.kv;
    // One after the other: one weight may serve both, and the first writer assigns.
    if (b.dy().on_gpu()) {
      OnCuda<T>::qk_norm_weight(b.rank, h, b.keep, b.dy(), 0, h.query, b.slot(1));
      OnCuda<T>::qk_norm_weight(b.rank, h, b.keep, b.dy(), h.query, turned, b.slot(2));
      return;
    }
    const Turns<T> turns{h, b.keep};  // without the norms' weights: they turn only
    Tensor u = b.op().like(b.dy());
    turns.backward(b.dy(), u);
    turns.weight_grad(u, 0, h.query, b.to(1));
    turns.weight_grad(u, h.query, turned, b.to(2));
  });
  return y;
}

}
