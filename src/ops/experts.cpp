#include <algorithm>

#include "ops/cpu.h"
#include "ops/grouped.h"

namespace pith {
namespace {

template <class T>
T sum_at(const T* p, const int* ids, i64 k) {
  T sum = 0;
  for (i64 j = 0; j < k; j++) sum += p[ids[j]];
  return sum;
}

// f(e, begin, end) for each expert and its rows; `work`: multiply-adds in all. Waits for a GPU.
template <class F>
void each_expert(Rank& rank, const Tensor& offsets, i64 work, F&& f) {
  i64 E = offsets.dim[0] - 1;
  vector<char> bytes;
  Tensor host = on_host(rank, offsets, bytes);
  const int* begin = host.i32();
  bool threads = E > 1 && work > kParallelProduct && offsets.device == Device::CPU;
#pragma omp parallel for schedule(dynamic) if (threads)
  for (i64 e = 0; e < E; e++) f(e, begin[e], begin[e + 1]);
}

// Whether CUTLASS's product by expert serves.
[[gnu::always_inline]] inline bool grouped(const Tensor& x, i64 in, i64 out) {
  return kCuda && x.dtype == DType::BF16 && grouped_fits(in, out);
}

void check_pairs(const Op& op, const Dispatched& d, const Tensor& x, bool rows, const char* need) {
  i64 P = d.row_of.dim[0], R = d.row_begin.dim[0] - 1;
  op.check({{"row_of I32 [P], pair_of I32 [P] and row_begin I32 [R+1]",
                is_i32(d.row_of, {P}) && is_i32(d.pair_of, {P}) && is_i32(d.row_begin, {R + 1})},
               {need, x.dim.rank == 2 && x.dim[0] == (rows ? R : P)}},
      {&x, &d.row_of, &d.pair_of, &d.row_begin});
  op.check_offsets("row_begin", d.row_begin, P);
  op.check_ids("row_of", d.row_of, R);
  op.check_ids("pair_of", d.pair_of, P);
}

// Rows index[p] of x; x itself where index is undefined.
template <class T>
Tensor chosen(const Op& op, const Tensor& x, const Tensor& index) {
  if (!index.defined()) return x;
  Tensor y = op.empty({index.numel(), x.cols()}, x.dtype);
  gather_rows<T>(op, x, x.cols(), index, {}, {y});
  return y;
}

// to = or += x w by expert; w [E, in, out] or, transposed, [E, out, in].
template <class T>
void products(const Op& op, const Tensor& x, const Tensor& w, const Tensor& offsets, Layout layout,
    const GradSlot& to) {
  i64 in = x.cols(), out = to.grad.cols();
  if (!to.add && grouped(x, in, out)) {
    const auto run = layout == kTransposed ? grouped_forward : grouped_input_grad;
    return run(op.rank, x, w, offsets, to.grad, -1);
  }
  each_expert(op.rank, offsets, x.numel() * out, [&](i64 e, i64 r, i64 end) {
    product<T>(op, x.slice_rows(r, end), w.slice_rows(e, e + 1),
        {to.grad.slice_rows(r, end), to.add}, kNormal, layout);
  });
}

// What the gradient of a product's weights reads.
struct ExpertRows {
  const Tensor &dy, &x, &offsets;
  Tensor of_dy, of_x;  // the row of each pair; undefined: its own
  explicit ExpertRows(const Node& node)
      : dy(node.grad[0]),
        x(node.bw_keep[0]),
        offsets(node.bw_keep[1]),
        of_dy(node.i[1] ? node.bw_keep[2] : Tensor{}),
        of_x(node.i[0] ? node.bw_keep[2] : Tensor{}) {}
};

constexpr auto kExpertGrad = []<class T>(Backward<T> b) {
  const ExpertRows from(b.node);
  GradSlot dw = b.slot(1);
  if (!dw.grad.defined()) return;
  Tensor dy = chosen<T>(b.op(), from.dy, from.of_dy), x = chosen<T>(b.op(), from.x, from.of_x);
  if (dw.add && dw.grad.dtype == DType::F32 && grouped(dy, x.cols(), dy.cols()))
    return grouped_weight_grad(b.rank, dy, x, from.offsets, dw.grad);
  each_expert(b.rank, from.offsets, dy.numel() * x.cols(), [&](i64 e, i64 r, i64 end) {
    product<T>(b.op(), dy.slice_rows(r, end), x.slice_rows(r, end),
        {dw.grad.slice_rows(e, e + 1), dw.add}, kTransposed);
  });
};

// PERF: adding to the FP32 sums of many experts takes longer than the product of few rows: those of
// several micro-batches are joined.
void expert_grads(Rank& rank, Node* const* nodes, int n) {
  for (int first = 0; first < n; first += TensorList::kMax) {
    int count = min(n - first, TensorList::kMax);
    Node& node = *nodes[first];
    if (count == 1 || !grouped(node.grad[0], node.bw_keep[0].cols(), node.grad[0].cols())) {
      for (int i = first; i < first + count; i++)
        run_backward<decltype(kExpertGrad)>(rank, *nodes[i], nodes[i]->bw_keep);
      continue;
    }
    TensorList dys, xs, of_dy, of_x, offsets;
    for (int i = first; i < first + count; i++) {
      const ExpertRows from(*nodes[i]);
      dys.push(from.dy);
      xs.push(from.x);
      of_dy.push(from.of_dy);
      of_x.push(from.of_x);
      offsets.push(from.offsets);
    }
    Tensor dy = cuda_join(rank, dys, of_dy, offsets), x = cuda_join(rank, xs, of_x, offsets);
    grouped_weight_grad(
        rank, dy, x, cuda_join_offsets(rank, offsets), grad_slot(rank, node.in[1], node.at).grad);
  }
}

// y = x w^T by expert; x: the rows that `expand` makes pairs, or pairs; y: pairs, or with `reduce`
// their sums, rows.
Tensor by_expert(const Op& op, Tensor x, Tensor w, const Dispatched& d, bool expand, bool reduce) {
  if (expand) check_pairs(op, d, x, true, "rows [R, D]");
  if (reduce) check_pairs(op, d, x, false, "x [P, in]");
  op.check(
      {{"x [P, in] and w [E, out, in]", x.dim.rank == 2 && w.dim.rank == 3 && x.dim[1] == w.dim[2]},
          {"offsets I32 [E+1]", is_i32(d.offsets, {w.dim[0] + 1})},
          {"one dtype", x.dtype == w.dtype}},
      {&x, &w, &d.offsets});
  i64 P = expand ? d.row_of.dim[0] : x.dim[0], out = w.dim[1];
  op.check_offsets("offsets", d.offsets, P);
  Tensor y = op.empty({reduce ? d.row_begin.dim[0] - 1 : P, out}, x.dtype);
  op.typed(x, [&]<class T>(T*) {
    Tensor from = chosen<T>(op, x, expand ? d.row_of : Tensor{});
    Tensor to = reduce ? op.empty({P, out}, x.dtype) : y;
    products<T>(op, from, w, d.offsets, kTransposed, {to});
    if (reduce) gather_rows<T>(op, to, out, d.pair_of, d.row_begin, {y});
  });
  const auto recorded =
      record(op, {x, w}, {&y})
          .numbers({expand, reduce})
          .bx({w, d.offsets, d.row_of, d.pair_of, d.row_begin}, []<class T>(Backward<T> b) {
            GradSlot dx = b.slot(0);
            if (!dx.grad.defined()) return;
            const Tensor &weight = b.keep[0], &offsets = b.keep[1];
            bool expands = b.node.i[0];
            Tensor dy = chosen<T>(b.op(), b.dy(), b.node.i[1] ? b.keep[2] : Tensor{});
            const GradSlot to =
                expands ? GradSlot{b.op().empty({dy.dim[0], weight.cols()}, dy.dtype)} : dx;
            products<T>(b.op(), dy, weight, offsets, kNormal, to);
            if (expands) gather_rows<T>(b.op(), to.grad, to.grad.cols(), b.keep[3], b.keep[4], dx);
          });
  recorded.bw(1, {x, d.offsets, d.row_of}, kExpertGrad);
  if (recorded.node) recorded.node->bw = expert_grads;
  return y;
}

// PERF: one loop an output, for vector instructions, over a stretch whose sigmoids are kept.
template <class T>
void swiglu_grad(
    const Tensor& dy, const TensorList& keep, const Tensor& dgate_up, const Tensor& dweights) {
  constexpr i64 kColumns = 256;
  const Tensor &gate_up = keep[0], &weights = keep[1];
  i64 F = dy.dim[1];
  parallel_rows(dy.dim[0], F * 32, [&](i64 p) {
    T weight = weights.defined() ? weights.as<T>()[p] : T(1);
    T s[kColumns], dweight = 0;
    for (i64 first = 0; first < F; first += kColumns) {
      i64 n = min(kColumns, F - first);
      const T *gate = row_of<T>(gate_up, p) + first, *up = gate + F;
      const T* g = row_of<T>(dy, p) + first;
      T *dgate = row_of<T>(dgate_up, p) + first, *dup = dgate + F;
      for (i64 j = 0; j < n; j++) s[j] = logistic(gate[j]);
      dweight += lane_sum<T>(n, [&](i64 j) { return g[j] * (gate[j] * s[j] * up[j]); });
      for (i64 j = 0; j < n; j++) dup[j] = g[j] * weight * (gate[j] * s[j]);
      for (i64 j = 0; j < n; j++)
        dgate[j] = g[j] * weight * up[j] * (s[j] + gate[j] * s[j] * (1 - s[j]));
    }
    if (dweights.defined()) dweights.as<T>()[p] = dweight;
  });
}

// d = probs (dprobs - <dprobs, probs>), where dprobs also has what arrives at weights.
template <class F>
void route_grad(bool normalize, const TensorList& keep, const Tensor& dweights,
    const Tensor& dprobs, const Tensor& d) {
  i64 experts = d.dim[1], chosen = keep[2].dim[1];
  parallel_rows(d.dim[0], experts * 4, [&](i64 t) {
    const F* p = row_of<F>(keep[1], t);
    const int* id = row_of<int>(keep[2], t);
    F* row = row_of<F>(d, t);
    std::fill_n(row, experts, F(0));
    if (dprobs.defined()) std::copy_n(row_of<F>(dprobs, t), experts, row);
    if (dweights.defined()) {
      const F* g = row_of<F>(dweights, t);
      const F total = normalize ? sum_at(p, id, chosen) : F(1);
      F mean = 0;
      for (i64 j = 0; normalize && j < chosen; j++) mean += g[j] * (p[id[j]] / total);
      for (i64 j = 0; j < chosen; j++) row[id[j]] += (g[j] - mean) / total;
    }
    const F along = dot(row, p, experts);
    for (i64 e = 0; e < experts; e++) row[e] = p[e] * (row[e] - along);
  });
}

}

Routing router(Rank& rank, Tensor x, Tensor w, RouterOptions options, At at) {
  Op op{rank, "router", at};
  const Tensor& forced = options.forced_ids;
  i64 k = options.top_k, T = x.dim[0], E = w.dim[0];
  op.check(
      {{"x [T, D] and w [E, D]", x.dim.rank == 2 && w.dim.rank == 2 && x.dim[1] == w.dim[1]},
          {"one dtype", x.dtype == w.dtype}, {"top_k in [1, E]", k >= 1 && k <= E},
          {"forced_ids I32 [T, k] or undefined", !forced.defined() || is_i32(forced, {T, k})},
          {"forced_ids or force_balanced, not both", !forced.defined() || !options.force_balanced}},
      {&x, &w, &forced});
  DType dtype = wide(x.dtype);
  Routing out{op.empty({T, k}, DType::I32), op.empty({T, k}, dtype), op.empty({T, E}, dtype)};
  if (forced.defined()) op.check_ids("forced_ids", forced, E);
  op.typed(x, [&]<class F>(F*) {
    product<F>(op, x, w, {out.probs}, kNormal, kTransposed);
    if (x.on_gpu()) return OnCuda<F>::route(rank, options, out);
    parallel_rows(T, E * 8, [&](i64 t) {
      F *p = row_of<F>(out.probs, t), *weights = row_of<F>(out.weights, t);
      int* ids = row_of<int>(out.ids, t);
      const F scale = 1 / exp_sum(p, E, max_of(p, E));
      for (i64 e = 0; e < E; e++) p[e] *= scale;
      if (forced.defined())
        std::copy_n(row_of<int>(forced, t), k, ids);
      else if (options.force_balanced)
        for (i64 j = 0; j < k; j++) ids[j] = int((t + j * (E / k)) % E);
      else
        largest(p, E, k, ids);
      const F divisor = options.normalize ? sum_at(p, ids, k) : F(1);
      for (i64 j = 0; j < k; j++) weights[j] = p[ids[j]] / divisor;
    });
  });
  record(op, {x, w}, {&out.weights, &out.probs})
      .numbers({options.normalize})
      .bx({w, out.probs, out.ids},
          []<class F>(Backward<F> b) {
            Tensor d = b.op().empty(b.keep[1].dim, b.node.in[0].dtype);
            if (d.on_gpu())
              OnCuda<F>::route_grad(b.rank, b.node.i[0], b.keep, b.dy(0), b.dy(1), d);
            else
              route_grad<F>(b.node.i[0], b.keep, b.dy(0), b.dy(1), d);
            product<F>(b.op(), d, b.keep[0], b.slot(0));
            b.node.bw_keep.push(d);
          })
      .bw(1, {x}, []<class F>(Backward<F> b) {
        product<F>(b.op(), b.keep[1], b.keep[0], b.slot(1), kTransposed);
      });
  return out;
}

Tensor grouped_linear(Rank& rank, Tensor x, Tensor w, Tensor offsets, At at) {
  return by_expert({rank, "grouped_linear", at}, x, w, {.offsets = offsets}, false, false);
}

Tensor expand_linear(Rank& rank, const Dispatched& d, Tensor w, At at) {
  return by_expert({rank, "expand_linear", at}, d.rows, w, d, true, false);
}

Tensor linear_reduce(Rank& rank, Tensor x, Tensor w, const Dispatched& d, At at) {
  return by_expert({rank, "linear_reduce", at}, x, w, d, false, true);
}

Tensor swiglu(Rank& rank, Tensor gate_up, Tensor weights, At at) {
  Op op{rank, "swiglu", at};
  op.check({{"gate_up [P, 2F]", gate_up.dim.rank == 2 && gate_up.dim[1] % 2 == 0},
               {"weights [P], f32 with bf16, or undefined",
                   !weights.defined() || (weights.dim == Dims{gate_up.dim[0]} &&
                                             weights.dtype == wide(gate_up.dtype))}},
      {&gate_up, &weights});
  Tensor y = op.empty({gate_up.dim[0], gate_up.dim[1] / 2}, gate_up.dtype);
  op.typed(gate_up, [&, F = y.dim[1]]<class T>(T*) {
    if (y.on_gpu()) return OnCuda<T>::swiglu(rank, gate_up, weights, y);
    parallel_rows(y.dim[0], F * 16, [&](i64 p) {
      const T *gate = row_of<T>(gate_up, p), *up = gate + F;
      T weight = weights.defined() ? weights.as<T>()[p] : T(1);
      T* out = row_of<T>(y, p);
      for (i64 j = 0; j < F; j++) out[j] = gate[j] * logistic(gate[j]) * up[j] * weight;
    });
  });
  record(op, {gate_up, weights}, {&y}).bx({gate_up, weights}, []<class T>(Backward<T> b) {
    Tensor d = b.op().like(b.keep[0]), &in = b.node.in[1];
    Tensor dweights = in.needs_grad() ? b.op().like(b.keep[1]) : Tensor{};
    if (d.on_gpu())
      OnCuda<T>::swiglu_grad(b.rank, b.dy(), b.keep, d, dweights);
    else
      swiglu_grad<T>(b.dy(), b.keep, d, dweights);
    add_grad(b.rank, b.node.in[0], d);
    if (in.needs_grad()) add_grad(b.rank, in, dweights);
  });
  return y;
}

}
