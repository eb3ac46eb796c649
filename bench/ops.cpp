// `pith bench ops`: every op at the training shapes of Qwen3-30B-A3B, and the general vocabulary at
// the shape of its hidden states.
#include <algorithm>
#include <array>

#include "bench/bench.h"
#include "comm/launch.h"
#include "engine/expert_parallel.h"
#include "ops/cuda.h"

namespace pith {
namespace {

// Calls F, a lambda without captures that returns what gradients come to, if anything.
template <class F>
TensorList called(Rank& rank, const Inputs& in) {
  if constexpr (std::is_void_v<decltype(F{}(rank, in))>) {
    F{}(rank, in);
    return {};
  } else {
    return {F{}(rank, in)};
  }
}

// Elements of a unit of experts, on which the flat buffers' ops run.
i64 unit_elements(const Sizes& s) {
  return s.model.num_experts * 3 * s.model.hidden * s.model.expert_width;
}

constexpr Heads kHeads = {.query = 32, .kv = 4, .size = 128};
constexpr int kExperts = 128, kTopK = 8;
constexpr double kEps = 1e-6;

void hidden(Inputs& in, const Sizes& s) { in.values({s.tokens(), s.model.hidden}); }
void two_hidden(Inputs& in, const Sizes& s) {
  hidden(in, s);
  hidden(in, s);
}
void normed(Inputs& in, const Sizes& s) {
  hidden(in, s);
  in.weight({s.model.hidden});
}
template <int i>
void product_of(Inputs& in, const Sizes& s) {
  make_product(in, products(s)[i]);
}
// Routing weights [T, k] and the ids of balanced routing.
void routed(Inputs& in, const Sizes& s) {
  i64 T = s.tokens(), k = s.model.top_k, E = s.model.num_experts;
  vector<int> ids(T * k);
  for (i64 i = 0; i < T * k; i++) ids[i] = int((i / k + i % k * (E / k)) % E);
  in.values({T, k}, wide(in.rank.compute));
  in.x.push_back(tensor_from(in.rank, {T, k}, DType::I32, ids.data()));
}
Dispatched dispatched(Rank& rank, const Inputs& in) {
  Routing routing{.ids = in[2], .weights = in[1], .probs = {}};
  return dispatch(rank, in[0], routing, kExperts).at_experts;
}
void flat(Inputs& in, const Sizes& s, int count) {
  for (int i = 0; i < count; i++) in.x.push_back(zeros(in.rank, {unit_elements(s)}, DType::F32));
}

// What training calls.
vector<OpCase> training_cases(const Sizes& s) {
  const vector<Pass> all = passes(s);
  const auto moves = [&](const char* pass) -> std::array<Cost, 3> {
    const Pass& p = pass_of(all, pass);
    return {Cost{0, p.forward}, Cost{0, p.backward}, Cost{0, p.weights}};
  };
  vector<OpCase> cases;
  const auto add_case = [&]<class F>(
                            const string& name, const std::array<Cost, 3>& cost, auto make, F) {
    cases.push_back({name, cost[0], cost[1], cost[2], make, called<F>});
  };
  const vector<Product> all_products = products(s);
  const auto add_product = [&](const char* op, const Product& p, auto make) {
    const Cost cost{p.flops(), 0};
    add_case(string(op) + " " + p.name, {cost, cost, cost}, make,
        [](Rank& r, const Inputs& in) { return call_product(r, in); });
  };
  add_product("linear", all_products[0], product_of<0>);
  add_product("linear", all_products[1], product_of<1>);
  add_product("linear", all_products[2], product_of<2>);
  add_product("grouped_linear", all_products[3], product_of<3>);
  add_product("grouped_linear", all_products[4], product_of<4>);
  add_product("linear", all_products[5], product_of<5>);
  add_case(
      "attention", {Cost{attention_flops(s, false), 0}, Cost{attention_flops(s, true), 0}, Cost{}},
      [](Inputs& in, const Sizes& z) {
        in.values({z.tokens(), kHeads.width()});
        in.ids({z.rows}, 1);
      },
      [](Rank& r, const Inputs& in) { return attention(r, in[0], kHeads, in[1].dim[0], {}); });
  add_case(
      "lm_head_cross_entropy, its gradients too",
      {Cost{3 * all_products[5].flops(), 0}, Cost{}, Cost{}},
      [](Inputs& in, const Sizes& z) {
        product_of<5>(in, z);
        in.ids({z.tokens()}, z.model.vocab);
      },
      [](Rank& r, const Inputs& in) { lm_head_cross_entropy(r, in[0], in[1], in[2], 1e-4); });
  if constexpr (kCuda)
    add_case(
        "cross entropy of logits", moves("cross entropy"),
        [](Inputs& in, const Sizes& z) {
          in.values({z.tokens(), z.model.vocab});
          in.ids({z.tokens()}, z.model.vocab);
          in.x.push_back(zeros(in.rank, {z.tokens()}, DType::F64));
        },
        [](Rank& r, const Inputs& in) {
          OnCuda<BF16>::row_losses(r, in[0], in[1], 1e-4, true, in[2]);
        });
  add_case(
      "embedding", moves("embedding"),
      [](Inputs& in, const Sizes& z) {
        in.ids({z.tokens()}, z.model.vocab);
        in.weight({z.model.vocab, z.model.hidden});
      },
      [](Rank& r, const Inputs& in) { return embedding(r, in[0], in[1]); });
  add_case("rms_norm", moves("rms_norm"), normed,
      [](Rank& r, const Inputs& in) { return rms_norm(r, in[0], in[1], kEps); });
  add_case(
      "add_rms_norm", moves("add_rms_norm"),
      [](Inputs& in, const Sizes& z) {
        normed(in, z);
        hidden(in, z);
      },
      [](Rank& r, const Inputs& in) {
        const AddRmsNorm y = add_rms_norm(r, in[0], in[2], in[1], kEps);
        return TensorList{y.sum, y.normed};
      });
  add_case(
      "qk_norm_rope", moves("qk_norm_rope"),
      [](Inputs& in, const Sizes& z) {
        in.values({z.tokens(), kHeads.width()});
        in.weight({kHeads.size});
        in.weight({kHeads.size});
        const Rope rope = rope_tables(in.rank, z.length, kHeads.size, 1e6);
        vector<int> positions(z.tokens());
        for (size_t i = 0; i < positions.size(); i++) positions[i] = int(i % z.length);
        in.x.push_back(rope.cos);
        in.x.push_back(rope.sin);
        in.x.push_back(tensor_from(in.rank, {z.tokens()}, DType::I32, positions.data()));
      },
      [](Rank& r, const Inputs& in) {
        return qk_norm_rope(r, in[0], kHeads, in[1], in[2], kEps, {in[3], in[4]}, in[5]);
      });
  // Its three products are small: x is read for the logits, for dw, and dx is written.
  const double x = double(s.tokens() * s.model.hidden * s.element);
  const Pass& route = pass_of(all, "route");
  const double chosen = 4.0 * double(s.tokens() * s.model.num_experts);
  add_case("router", {Cost{0, x + chosen}, Cost{0, route.backward + x}, Cost{0, x + chosen / 2}},
      product_of<2>, [](Rank& r, const Inputs& in) {
        return router(r, in[0], in[1], {.top_k = kTopK, .normalize = true}).weights;
      });
  add_case(
      "dispatch", moves("dispatch"),
      [](Inputs& in, const Sizes& z) {
        hidden(in, z);
        routed(in, z);
      },
      [](Rank& r, const Inputs& in) { return dispatched(r, in).weights; });
  add_case(
      "swiglu", moves("swiglu"),
      [](Inputs& in, const Sizes& z) {
        in.values({z.pairs(), 2 * z.model.expert_width});
        in.values({z.pairs()}, wide(in.rank.compute));
      },
      [](Rank& r, const Inputs& in) { return swiglu(r, in[0], in[1]); });
  add_case("add, the residual", {Cost{0, 3 * x}, Cost{0, 3 * x}, Cost{}}, two_hidden,
      [](Rank& r, const Inputs& in) { return add(r, in[0], in[1]); });
  const double n = 4.0 * double(unit_elements(s));
  add_case(
      "adamw_step", {Cost{0, 7 * n}}, [](Inputs& in, const Sizes& z) { flat(in, z, 4); },
      [](Rank& r, const Inputs& in) { adamw_step(r, in[0], in[1], in[2], in[3], {.lr = 1e-4}); });
  add_case(
      "sum_squares", {Cost{0, n}}, [](Inputs& in, const Sizes& z) { flat(in, z, 1); },
      [](Rank& r, const Inputs& in) { sum_squares(r, in[0]); });
  if constexpr (kCuda)
    add_case(
        "cast, F32 to BF16", {Cost{0, 1.5 * n}},
        [](Inputs& in, const Sizes& z) {
          flat(in, z, 1);
          in.x.push_back(empty(in.rank, {unit_elements(z)}, DType::BF16));
        },
        [](Rank& r, const Inputs& in) { cast(r, in[0], in[1]); });
  add_case(
      "fill_zero", {Cost{0, n}}, [](Inputs& in, const Sizes& z) { flat(in, z, 1); },
      [](Rank& r, const Inputs& in) { fill_zero(r, in[0]); });
  return cases;
}

// The general vocabulary. `reads` and `writes` count tensors [T, D], of the forward and then of the
// input gradients.
vector<OpCase> general_cases(const Sizes& s) {
  const i64 T = s.tokens(), D = s.model.hidden;
  const double x = double(T * D * s.element);
  vector<OpCase> cases;
  const auto add_case = [&]<class F>(
                            const char* name, double forward, double backward, auto make, F) {
    cases.push_back({name, {0, forward * x}, {0, backward * x}, {}, make, called<F>});
  };
  const auto one = [&](const char* name, auto call) { add_case(name, 2, 3, hidden, call); };
  const auto two = [&](const char* name, double backward, auto call) {
    add_case(name, 3, backward, two_hidden, call);
  };
  two("add", 3, [](Rank& r, const Inputs& in) { return add(r, in[0], in[1]); });
  two("sub", 3, [](Rank& r, const Inputs& in) { return sub(r, in[0], in[1]); });
  two("mul", 5, [](Rank& r, const Inputs& in) { return mul(r, in[0], in[1]); });
  two("div", 5, [](Rank& r, const Inputs& in) { return div(r, in[0], in[1]); });
  add_case(
      "mul, one row repeated", 2, 3,
      [](Inputs& in, const Sizes& z) {
        hidden(in, z);
        in.values({z.model.hidden});
      },
      [](Rank& r, const Inputs& in) { return mul(r, in[0], in[1]); });
  add_case(
      "add, a number", 2, 2, hidden, [](Rank& r, const Inputs& in) { return add(r, in[0], 0.5); });
  add_case(
      "mul, a number", 2, 2, hidden, [](Rank& r, const Inputs& in) { return mul(r, in[0], 0.5); });
  one("exp", [](Rank& r, const Inputs& in) { return exp(r, in[0]); });
  one("log", [](Rank& r, const Inputs& in) { return log(r, in[0]); });
  one("sqrt", [](Rank& r, const Inputs& in) { return sqrt(r, in[0]); });
  one("tanh", [](Rank& r, const Inputs& in) { return tanh(r, in[0]); });
  one("sigmoid", [](Rank& r, const Inputs& in) { return sigmoid(r, in[0]); });
  one("silu", [](Rank& r, const Inputs& in) { return silu(r, in[0]); });
  one("softplus", [](Rank& r, const Inputs& in) { return softplus(r, in[0]); });
  one("relu", [](Rank& r, const Inputs& in) { return relu(r, in[0]); });
  one("clamp", [](Rank& r, const Inputs& in) { return clamp(r, in[0], -1, 1); });
  add_case(
      "where", 3.5, 3.5,
      [](Inputs& in, const Sizes& z) {
        two_hidden(in, z);
        in.x.push_back(zeros(in.rank, in[0].dim, DType::U8));
      },
      [](Rank& r, const Inputs& in) { return where(r, in[2], in[0], in[1]); });
  add_case("sum, last dimension", 1, 1, hidden,
      [](Rank& r, const Inputs& in) { return sum(r, in[0], 1); });
  add_case("sum, first dimension", 1, 1, hidden,
      [](Rank& r, const Inputs& in) { return sum(r, in[0], 0); });
  add_case("mean, last dimension", 1, 1, hidden,
      [](Rank& r, const Inputs& in) { return mean(r, in[0], 1); });
  add_case("max, last dimension", 1, 2, hidden,
      [](Rank& r, const Inputs& in) { return max(r, in[0], 1); });
  add_case("cumsum", 2, 2, hidden, [](Rank& r, const Inputs& in) { return cumsum(r, in[0], 1); });
  one("softmax", [](Rank& r, const Inputs& in) { return softmax(r, in[0], 1); });
  add_case("permute", 2, 2, hidden, [](Rank& r, const Inputs& in) {
    return permute(r, in[0], {1, 0});
  });
  add_case("slice, half of the columns", 1, 1.5, hidden,
      [](Rank& r, const Inputs& in) { return slice(r, in[0], 1, 0, in[0].dim[1] / 2); });
  add_case("split, in halves", 2, 2, hidden, [](Rank& r, const Inputs& in) {
    return split(r, in[0], 1, {in[0].dim[1] / 2, in[0].dim[1] / 2});
  });
  add_case("concat", 4, 4, two_hidden, [](Rank& r, const Inputs& in) {
    return concat(r, {in[0], in[1]}, 1);
  });
  add_case("repeat, twice", 3, 3, hidden,
      [](Rank& r, const Inputs& in) { return repeat(r, in[0], 0, 2); });
  const auto chosen = [](Inputs& in, const Sizes& z) {
    hidden(in, z);
    in.ids({z.tokens()}, z.tokens());
  };
  add_case("index_select", 2, 2, chosen,
      [](Rank& r, const Inputs& in) { return index_select(r, in[0], in[1]); });
  add_case("scatter_add", 2, 2, chosen,
      [](Rank& r, const Inputs& in) { return scatter_add(r, in[0], in[1], in[0].dim[0]); });
  add_case(
      "top_k, 8 of 128", 1, 1,
      [](Inputs& in, const Sizes& z) {
        in.values({z.tokens() * z.model.hidden / 128, 128});
      },
      [](Rank& r, const Inputs& in) { return top_k(r, in[0], kTopK).values; });
  add_case("fill_normal", 1, 0, hidden,
      [](Rank& r, const Inputs& in) { fill_normal(r, in[0], 1, 0, 1); });
  add_case("fill_constant", 1, 0, hidden,
      [](Rank& r, const Inputs& in) { fill_constant(r, in[0], 0.5); });
  const Cost product{2.0 * double(T) * double(D) * double(D), 0};
  add_case(
      "matmul", 0, 0,
      [](Inputs& in, const Sizes& z) {
        hidden(in, z);
        in.values({z.model.hidden, z.model.hidden});
      },
      [](Rank& r, const Inputs& in) { return matmul(r, in[0], in[1]); });
  cases.back().forward = product;
  cases.back().backward = {2 * product.flops, 0};
  add_case(
      "attention of separate heads, rows a quarter as long", 0, 0,
      [](Inputs& in, const Sizes& z) {
        in.values({z.rows, z.length / 4, kHeads.query, kHeads.size});
        in.values({z.rows, z.length / 4, kHeads.kv, kHeads.size});
        in.values({z.rows, z.length / 4, kHeads.kv, kHeads.size});
      },
      [](Rank& r, const Inputs& in) { return attention(r, in[0], in[1], in[2], 0.088, {}); });
  Sizes plain = s;
  plain.length = s.length / 4;
  cases.back().forward = {attention_flops(plain, false), 0};
  cases.back().backward = {attention_flops(plain, true), 0};
  return cases;
}

void print_phase(const string& name, double seconds, const Cost& cost, double copy, double product,
    bool& missed) {
  if (seconds == 0) return;
  bool flops = cost.flops > 0;
  double rate = (flops ? cost.flops : cost.bytes) / seconds,
         share = rate / (flops ? product : copy);
  bool low = !flops && share < 0.8;
  missed |= low;
  printf("| %s | %.3f | %.*f %s | %.0f%%%s |\n", name.c_str(), 1e3 * seconds, flops ? 0 : 2,
      rate / 1e12, flops ? "TFLOP/s" : "TB/s", 100 * share, low ? " LOW" : "");
}

void measure(const vector<OpCase>& cases, const Sizes& s) {
  printf("%s; BF16, micro-batch %ld of %ld tokens; the median of %d calls after %d\n\n",
      need_gpu().c_str(), s.rows, s.length, kRuns, kWarmUp);
  run_ranks(make_mesh(1, 1, 1, 1), Device::CUDA, {.compute = DType::BF16}, [&](Rank& rank) {
    const double copy = copy_rate(rank);
    double product = product_rate(rank);
    vector<Phases> times;
    for (const OpCase& c : cases) {
      Inputs in{rank};
      c.make(in, s);
      const Phases t = times.emplace_back(time_op(in, c.call));
      // Dense ones raise the ceiling.
      if (!c.name.starts_with("linear")) continue;
      for (double seconds : {t.forward, t.backward, t.weights})
        if (seconds > 0) product = max(product, c.forward.flops / seconds);
    }
    printf("| op | ms | rate | of the ceiling |\n|---|--:|--:|--:|\n");
    bool missed = false;
    for (size_t i = 0; i < cases.size(); i++) {
      const OpCase& c = cases[i];
      print_phase(c.name, times[i].forward, c.forward, copy, product, missed);
      print_phase(c.name + ", backward", times[i].backward, c.backward, copy, product, missed);
      print_phase(c.name + ", weight gradient", times[i].weights, c.weights, copy, product, missed);
    }
    printf("\nceilings of this run: a copy %.2f TB/s, a dense product %.0f TFLOP/s%s\n",
        copy / 1e12, product / 1e12, missed ? "\nLOW: less than 80% of a copy" : "");
  });
}

}

Sizes q1(i64 rows) {
  Qwen3Moe::Config c;
  c.hidden = 2048;
  c.expert_width = 768;
  c.vocab = 151936;
  c.num_layers = 3;
  c.num_experts = kExperts;
  c.top_k = kTopK;
  c.heads = kHeads;
  return {.model = c, .length = 4096, .rows = rows};
}
vector<OpCase> op_cases(const Sizes& s) {
  vector<OpCase> cases = training_cases(s);
  for (const OpCase& c : general_cases(s)) cases.push_back(c);
  return cases;
}

int bench_ops(int argc, char** argv) {
  Arguments args("pith bench ops");
  string filter;
  i64 rows = 4;
  if (argc > 1 && argv[1][0] != '-') {
    filter = argv[1];
    argc--;
    argv++;
  }
  args.option("--micro-batch", rows, "sequences of 4096 tokens", 1, 16);
  if (!args.parse(argc, argv)) return kExitDone;
  const Sizes s = q1(rows);
  vector<OpCase> cases = op_cases(s);
  string names;
  for (const OpCase& c : cases) names += (names.empty() ? "" : "; ") + c.name;
  std::erase_if(cases, [&](const OpCase& c) { return c.name.find(filter) == string::npos; });
  if (cases.empty())
    bad_input("pith bench ops", "no op has this in its name (got \"" + filter + "\")",
        "part of one of: " + names);
  need_gpu();
  measure(cases, s);
  return kExitDone;
}

}
