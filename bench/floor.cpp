// `pith bench floor`: how fast a step could be if each product and attention ran as it does by
// itself and everything else moved each byte once at the speed of a copy. docs/benchmarks.md has
// the formulas.
#include "bench/bench.h"
#include "comm/launch.h"
#include "ops/grouped.h"

namespace pith {
namespace {

// The op's time, or that of a tile that is faster.
template <class F>
void try_tiles(Rank& rank, FloorLine& line, F&& call) {
  for (int tile = 0; tile < kGroupedTiles; tile++) {
    double seconds = time_call(rank, [&] { call(tile); });
    if (seconds >= line.seconds) continue;
    line.seconds = seconds;
    line.by = text("tile %d", tile);
  }
}

// Forward, input gradient and weight gradient.
void measure_product(Rank& rank, const Product& p, FloorLine* lines) {
  Inputs in{rank};
  make_product(in, p);
  const Phases t =
      time_op(in, [](Rank& r, const Inputs& x) { return TensorList{call_product(r, x)}; });
  lines[0].seconds = t.forward;
  lines[1].seconds = t.backward;
  lines[2].seconds = t.weights;
  if (p.groups == 0 || rank.compute != DType::BF16 || !grouped_fits(p.in, p.out)) return;
  in.values({p.rows, p.out});
  const Tensor &x = in[0], &w = in[1], &begin = in[2], &y = in[3];
  if constexpr (kCuda) {
    try_tiles(rank, lines[0], [&](int tile) { grouped_forward(rank, x, w, begin, y, tile); });
    try_tiles(rank, lines[1], [&](int tile) { grouped_input_grad(rank, y, w, begin, x, tile); });
    try_tiles(rank, lines[2],
        [&](int tile) { grouped_weight_grad(rank, y, x, begin, in.sums[0], tile); });
  }
}

struct Total {
  double products = 0, attention = 0, bytes = 0;  // seconds a step
  double step() const { return products + attention + bytes; }
};

Total total_of(const vector<FloorLine>& lines) {
  Total all;
  for (const FloorLine& l : lines)
    (l.bytes                              ? all.bytes
        : l.item.starts_with("attention") ? all.attention
                                          : all.products) += l.count * l.seconds;
  return all;
}

void print_lines(const vector<FloorLine>& lines, i64 micro_batches) {
  printf(
      "| item | a step | GFLOP or MB | TFLOP/s or TB/s | ms a micro-batch | ms a step | by |\n"
      "|---|--:|--:|--:|--:|--:|---|\n");
  for (const FloorLine& l : lines) {
    double ms = 1e3 * l.count * l.seconds, rate = l.seconds > 0 ? l.amount / l.seconds : 0;
    printf("| %s | %g | %.1f %s | %.*f | %.3f | %.2f | %s |\n", l.item.c_str(), l.count,
        l.amount / (l.bytes ? 1e6 : 1e9), l.bytes ? "MB" : "GF", l.bytes ? 2 : 0, rate / 1e12,
        ms / double(micro_batches), ms, l.by.c_str());
  }
}

void measure(const vector<RunPlan>& plans, bool json) {
  JsonWriter out;
  out.object().members("gpu", need_gpu()).key("floors").array();
  if (!json) printf("%s\n", need_gpu().c_str());
  const RunPlan& first = plans[0];
  run_ranks(first.mesh, Device::CUDA, {.compute = first.compute}, [&](Rank& rank) {
    for (const RunPlan& plan : plans) {
      const Sizes s = sizes_of(plan);
      const vector<FloorLine> lines = floor_lines(rank, plan, copy_rate(rank));
      const Total total = total_of(lines);
      double rate = double(plan.step_tokens()) / total.step();
      i64 n = plan.schedule.micro_batches;
      out.object().members("micro_batch", s.rows, "step_ms", 1e3 * total.step(), "products_ms",
          1e3 * total.products, "attention_ms", 1e3 * total.attention, "bytes_ms",
          1e3 * total.bytes, "tokens_per_second", rate, "goal", 0.85 * rate);
      out.key("items").array();
      for (const FloorLine& l : lines)
        out.object()
            .members("item", l.item, "count", l.count, l.bytes ? "bytes" : "flops", l.amount,
                "seconds", l.seconds, "by", l.by)
            .end();
      out.end().end();
      if (json) continue;
      printf("\nmicro-batch %ld: %ld of them a step of %s tokens, %d layers, %s\n\n", s.rows, n,
          with_commas(plan.step_tokens()).c_str(), s.model.num_layers,
          plan.compute == DType::BF16 ? "bf16" : "fp32");
      print_lines(lines, n);
      printf(
          "\nfloor: %.1f ms a step (products %.1f, attention %.1f, bytes %.1f), %.2f us a token: "
          "%s "
          "tokens/s\n85%% of it: %s tokens/s\n",
          1e3 * total.step(), 1e3 * total.products, 1e3 * total.attention, 1e3 * total.bytes,
          1e6 / rate, with_commas(i64(rate)).c_str(), with_commas(i64(0.85 * rate)).c_str());
      fflush(stdout);
    }
  });
  if (json) printf("%s\n", out.end().end().str().c_str());
}

}

void make_product(Inputs& in, const Product& p) {
  in.values({p.rows, p.in});
  if (p.groups == 0) return in.weight({p.out, p.in});
  in.weight({p.groups, p.out, p.in});
  vector<int> begin(p.groups + 1);
  for (i64 g = 0; g <= p.groups; g++) begin[g] = int(p.rows * g / p.groups);
  in.x.push_back(tensor_from(in.rank, {p.groups + 1}, DType::I32, begin.data()));
}

Tensor call_product(Rank& rank, const Inputs& in) {
  return in.x.size() == 2 ? linear(rank, in[0], in[1]) : grouped_linear(rank, in[0], in[1], in[2]);
}

vector<FloorLine> floor_lines(Rank& rank, const RunPlan& plan, double copy_rate) {
  const Sizes s = sizes_of(plan);
  vector<FloorLine> lines;
  const auto times = [&](Each each) {
    return times_a_step(each, s.model.num_layers, plan.schedule.micro_batches);
  };
  for (const Product& p : products(s)) {
    FloorLine three[3];
    const char* kinds[] = {"forward", "input gradient", "weight gradient"};
    for (int i = 0; i < 3; i++)
      three[i] = {text("%s, %s", p.name, kinds[i]), times(p.each), p.flops()};
    measure_product(rank, p, three);
    // The head's are computed in the forward, chunk by chunk.
    if (i64 b = plan.schedule.weight_grad_batch; b > 1 && p.each == Each::Layer) {
      Product several = p;
      several.rows *= b;
      FloorLine more[3];
      measure_product(rank, several, more);
      three[2].seconds = more[2].seconds;
      three[2].by = more[2].by;
      three[2].amount *= double(b);
      three[2].count /= double(b);
      three[2].item += text(" of %ld micro-batches", b);
    }
    lines.insert(lines.end(), three, three + 3);
  }
  Inputs qkv{rank};
  qkv.values({s.tokens(), s.model.heads.width()});
  const Phases t = time_op(qkv, [&](Rank& r, const Inputs& x) {
    return TensorList{attention(r, x[0], s.model.heads, s.rows, {})};
  });
  for (bool back : {false, true})
    lines.push_back({back ? "attention, backward" : "attention, forward", times(Each::Layer),
        attention_flops(s, back), back ? t.backward : t.forward});
  for (const Pass& p : passes(s)) {
    bool two = p.forward > 0 && p.backward + p.weights > 0;
    const auto add = [&](const char* part, double bytes) {
      if (bytes > 0)
        lines.push_back({p.op + string(two ? part : ""), times(p.each), bytes, bytes / copy_rate,
            true, "copy"});
    };
    add(", forward", p.forward);
    // The weights' gradients need nothing that the backward has not read.
    add(", backward", p.backward > 0 ? p.backward : p.weights);
  }
  return lines;
}

int bench_floor(int argc, char** argv) {
  Arguments args("pith bench floor");
  BenchConfig config(args);
  bool json = false;
  config.micro_batches = {"1", "2", "4", "8"};
  args.flag("--json", json, "print JSON");
  if (!args.parse(argc, argv)) return kExitDone;
  vector<RunPlan> plans;
  for (i64 m : whole_numbers("--micro-batch", config.micro_batches))
    plans.push_back(config.plan({text("train.micro_batch_size=%ld", m)}));
  need_gpu();
  measure(plans, json);
  return kExitDone;
}

}
