// rope_tables: cos and sin of p * theta^(-2i/size), each [positions, size/2]; angles in f64.
// qk_norm_rope: of each head of q and k, n = rms_norm(x, norm weight, eps) if there are weights,
// then y1 = n1 cos - n2 sin, y2 = n2 cos + n1 sin of its two halves; v is copied.
//                                                                  Su et al. 2021, arXiv:2104.09864
//   in     qkv [T, (H+2K)*N]   q_norm, k_norm [N] or both undefined   cos, sin [positions, N/2]
//          f32|f64, one dtype    positions I32 [T]                                out  like qkv
//   keeps  bx: qkv and the norm weights if there are any, tables, positions   bw: qkv, tables,
//          positions; 1/rms is computed again
//   grad   bx: dqkv +=, rotation by the opposite angle, then rms_norm's   bw: the norm weights' +=
//   errors shapes; one norm weight without the other; a position outside the tables; dtypes differ
//   bitwise run-to-run: yes, for any number of threads
#include <algorithm>
#include <cmath>

#include "ops/layer_parts.h"
#include "ops/ops.h"

namespace pith {

namespace {

// A packed projection and what its heads are normed and turned by. Norm weights may be null.
template <class T>
struct RopeRows {
    Heads heads;
    T eps;
    const T *x, *q_norm, *k_norm, *cos, *sin;
    const int32_t* positions;

    int turned() const { return heads.query + heads.kv; }
    int64_t width() const { return int64_t{turned() + heads.kv} * heads.size; }
    const T* weight(int h) const { return h < heads.query ? q_norm : k_norm; }
    const T* cos_of(int64_t t) const { return cos + positions[t] * int64_t{heads.size / 2}; }
    const T* sin_of(int64_t t) const { return sin + positions[t] * int64_t{heads.size / 2}; }
    T rstd(const T* head) const {
        return 1 / std::sqrt(dot(head, head, heads.size) / heads.size + eps);
    }
};

}  // namespace

template <class T>
static void turn_back(const T* dy, const T* cos, const T* sin, int half, T* u) {
    for (int i = 0; i < half; i++) {
        u[i] = dy[i] * cos[i] + dy[i + half] * sin[i];
        u[i + half] = dy[i + half] * cos[i] - dy[i] * sin[i];
    }
}

template <class T>
static void qk_norm_rope_cpu(const RopeRows<T>& in, int64_t tokens, T* out) {
    const int N = in.heads.size, half = N / 2;
    parallel_rows(tokens, in.width() * 8, [&](int64_t t) {
        const T *cos = in.cos_of(t), *sin = in.sin_of(t);
        for (int h = 0; h < in.turned(); h++) {
            const T* x = in.x + t * in.width() + h * N;
            T* y = out + t * in.width() + h * N;
            const T* w = in.weight(h);
            const T rstd = w ? in.rstd(x) : 1;
            for (int i = 0; i < half; i++) {
                const T a = w ? x[i] * rstd * w[i] : x[i];
                const T b = w ? x[i + half] * rstd * w[i + half] : x[i + half];
                y[i] = a * cos[i] - b * sin[i];
                y[i + half] = b * cos[i] + a * sin[i];
            }
        }
        const int64_t v = t * in.width() + in.turned() * N;
        std::copy_n(in.x + v, in.heads.kv * N, out + v);
    });
}

template <class T>
static void qk_norm_rope_bx_cpu(const RopeRows<T>& in, int64_t tokens, const T* dy, T* dx) {
    const int N = in.heads.size;
    parallel_rows(tokens, in.width() * 12, [&](int64_t t) {
        for (int h = 0; h < in.turned(); h++) {
            const int64_t first = t * in.width() + h * N;
            const T *x = in.x + first, *w = in.weight(h);
            T* u = dx + first;
            turn_back(dy + first, in.cos_of(t), in.sin_of(t), N / 2, u);
            if (!w) continue;
            const T rstd = in.rstd(x);
            const T along = lane_sum<T>(N, [&](int64_t i) { return u[i] * w[i] * x[i]; });
            const T c = along * rstd * rstd * rstd / N;
            for (int i = 0; i < N; i++) u[i] = u[i] * w[i] * rstd - x[i] * c;
        }
        const int64_t v = t * in.width() + in.turned() * N;
        std::copy_n(dy + v, in.heads.kv * N, dx + v);
    });
}

// Sums of u x rstd over the heads of blocks of tokens, then over the blocks, in order.
template <class T>
static void qk_norm_rope_bw_cpu(Rank& rank, const RopeRows<T>& in, int64_t tokens, const Tensor& dy,
                                Slot<T> dq_norm, Slot<T> dk_norm) {
    constexpr int64_t kTokens = 64;
    const int N = in.heads.size;
    const int64_t blocks = (tokens + kTokens - 1) / kTokens;
    const Tensor scratch = zeros(rank, {blocks, 3, N}, dy.dtype);
    T* const sums = scratch.as<T>();
    parallel_rows(blocks, kTokens * in.width() * 8, [&](int64_t block) {
        T* sum = sums + block * 3 * N;
        T* u = sum + 2 * N;
        for (int64_t t = block * kTokens; t < std::min(tokens, (block + 1) * kTokens); t++)
            for (int h = 0; h < in.turned(); h++) {
                const int64_t first = t * in.width() + h * N;
                const T* x = in.x + first;
                T* to = h < in.heads.query ? sum : sum + N;
                turn_back(dy.as<T>() + first, in.cos_of(t), in.sin_of(t), N / 2, u);
                const T rstd = in.rstd(x);
                for (int i = 0; i < N; i++) to[i] += u[i] * (x[i] * rstd);
            }
    });
    if (dq_norm.data)
        add_columns(blocks, N, dq_norm, [=](int64_t b, int64_t i) { return sums[b * 3 * N + i]; });
    if (dk_norm.data)
        add_columns(blocks, N, dk_norm,
                    [=](int64_t b, int64_t i) { return sums[(b * 3 + 1) * N + i]; });
}

// `x` and the norm weights may be undefined.
template <class T>
static RopeRows<T> rope_rows(Heads heads, double eps, const Tensor& x, const Tensor& q_norm,
                             const Tensor& k_norm, const Rope& rope, const Tensor& positions) {
    return {heads,          static_cast<T>(eps), x.as<T>(),        q_norm.as<T>(),
            k_norm.as<T>(), rope.cos.as<T>(),    rope.sin.as<T>(), positions.i32()};
}

static Heads heads_of(const Node& node) {
    return {static_cast<int>(node.i[0]), static_cast<int>(node.i[1]), static_cast<int>(node.i[2])};
}

// bx_keep: cos, sin, positions; with norms also qkv and their weights.
static void qk_norm_rope_bx(Rank& rank, Node& node) {
    const TensorList& keep = node.bx_keep;
    const Tensor& dy = node.grad[0];
    const Tensor dx = empty(rank, dy.dim, dy.dtype, node.at);
    float_kernel(rank, node.op, node.at, dy, [&]<class T>(T*) {
        const RopeRows<T> in = rope_rows<T>(heads_of(node), node.f[0], keep[3], keep[4], keep[5],
                                            {keep[0], keep[1]}, keep[2]);
        qk_norm_rope_bx_cpu<T>(in, dy.rows(), dy.as<T>(), dx.as<T>());
    });
    add_grad(rank, node.in[0], dx);
}

static void qk_norm_rope_bw(Rank& rank, Node* const* nodes, int n) {
    for (int i = 0; i < n; i++) {
        const Node& node = *nodes[i];
        const TensorList& keep = node.bw_keep;
        float_kernel(rank, node.op, node.at, node.grad[0], [&]<class T>(T*) {
            const RopeRows<T> in = rope_rows<T>(heads_of(node), node.f[0], keep[3], {}, {},
                                                {keep[0], keep[1]}, keep[2]);
            // In this order: one weight may serve both, and the first writer assigns.
            const Slot<T> dq_norm = writable<T>(rank, node.in[1], node.at);
            const Slot<T> dk_norm = writable<T>(rank, node.in[2], node.at);
            qk_norm_rope_bw_cpu(rank, in, node.grad[0].rows(), node.grad[0], dq_norm, dk_norm);
        });
    }
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
                const double turn = static_cast<double>(p) * std::pow(theta, -2.0 * i / size);
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
    check(
        rank, op, at,
        {{"qkv [T, (H+2K)*N] with an even N",
          qkv.dim.rank == 2 && qkv.dim[1] == width && N > 0 && N % 2 == 0},
         {"positions I32 [T]", positions.dtype == DType::I32 && positions.dim == Dims{qkv.dim[0]}},
         {"q_norm and k_norm [N], or both undefined",
          normed ? q_norm.dim == Dims{N} && k_norm.dim == Dims{N} : !k_norm.defined()},
         {"tables [positions, N/2]",
          rope.cos.dim.rank == 2 && rope.cos.dim[1] == N / 2 && rope.sin.dim == rope.cos.dim},
         {"one dtype", rope.cos.dtype == qkv.dtype && rope.sin.dtype == qkv.dtype &&
                           (!normed || (q_norm.dtype == qkv.dtype && k_norm.dtype == qkv.dtype))}},
        {&qkv, &q_norm, &k_norm, &rope.cos, &positions});
    Tensor y = empty(rank, qkv.dim, qkv.dtype, at);
    float_kernel(rank, op, at, qkv, [&]<class T>(T*) {
        check_ids(rank, op, at, "positions", positions, rope.cos.dim[0]);
        const auto in = rope_rows<T>(heads, eps, qkv, q_norm, k_norm, rope, positions);
        qk_norm_rope_cpu<T>(in, qkv.dim[0], y.as<T>());
    });
    if (Node* n = record(rank, op, at, {qkv, q_norm, k_norm}, {&y})) {
        n->f[0] = eps;
        n->i[0] = heads.query;
        n->i[1] = heads.kv;
        n->i[2] = heads.size;
        n->bx_keep = {rope.cos, rope.sin, positions};
        n->bx = qk_norm_rope_bx;
        if (normed) {
            for (const Tensor& t : {qkv, q_norm, k_norm}) n->bx_keep.push(t);
            n->bw_keep = {rope.cos, rope.sin, positions, qkv};
            set_backward<qk_norm_rope_bx, qk_norm_rope_bw>(*n, {1, 2});
        }
    }
    return y;
}

}  // namespace pith
