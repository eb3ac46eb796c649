// counts: what a training step has to compute and to move, by formula. docs/benchmarks.md explains
// them.
#pragma once
#include "engine/run_plan.h"
#include "models/qwen3_moe.h"

namespace pith {

// Of one micro-batch on one device.
struct Sizes {
  Qwen3Moe::Config model;
  i64 length = 0, rows = 1;  // tokens of a row, rows of a micro-batch
  i64 element = 2;           // bytes of an activation

  i64 tokens() const { return rows * length; }
  i64 pairs() const { return tokens() * model.top_k; }
  i64 attention_width() const { return i64{model.heads.query} * model.heads.size; }
  i64 parameters() const;
};
Sizes sizes_of(const RunPlan& plan);

// How often a step has it: in each layer of each micro-batch, in each micro-batch, once.
enum class Each : u8 { Layer, MicroBatch, Step };
double times_a_step(Each each, int layers, i64 micro_batches);

// y [rows, out] = x [rows, in] w^T, over all groups (0: dense). Its forward, input gradient and
// weight gradient, which is added to an FP32 sum, are `flops` each.
struct Product {
  const char* name;
  i64 rows, in, out, groups;
  Each each;
  double flops() const { return 2.0 * double(rows) * double(in) * double(out); }
};
vector<Product> products(const Sizes& s);

// Causal attention. The backward has five products for the forward's two.
double attention_flops(const Sizes& s, bool backward);

// Bytes that an op moves if it reads each input and writes each output once. `weights`: of a
// weight's gradient where the op computes it by itself.
struct Pass {
  const char* op;
  double forward, backward, weights;
  Each each;
};
// Of the floor, weights left out: the backward has read what they need.
vector<Pass> passes(const Sizes& s);
const Pass& pass_of(const vector<Pass>& all, string_view op);

}
