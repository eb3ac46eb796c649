// measure: how long ops take on a rank's device, a GPU but for tests. Before each time taken the
// GPU reads more than its caches hold, so that inputs come from memory and the host is ahead.
#pragma once
#include "ops/ops.h"

namespace pith {

constexpr int kWarmUp = 3, kRuns = 20;

// What an op is called with.
struct Inputs {
  Rank& rank;
  vector<Tensor> x;
  vector<Tensor> sums;  // gradients of the weights

  const Tensor& operator[](int i) const { return x[i]; }
  Tensor& values(Dims dims, DType dtype);  // standard normal
  Tensor& values(Dims dims) { return values(dims, rank.compute); }
  void weight(Dims dims);          // and its FP32 gradient
  void ids(Dims dims, i64 limit);  // random in [0, limit)
};

class Stopwatch {
 public:
  explicit Stopwatch(Rank& rank);
  Stopwatch(const Stopwatch&) = delete;
  ~Stopwatch();
  void start();
  void stop();
  double median();  // seconds, without the first kWarmUp; 0: never started. Waits.

 private:
  void mark();
  Rank& rank_;
  Tensor cold_;
  vector<void*> events_;  // of CUDA
  vector<double> times_;  // on the CPU
};

// Median seconds of the parts of an op, 0 where it has none. `backward` is of the inputs'
// gradients.
struct Phases {
  double forward = 0, backward = 0, weights = 0;
};
// `call` returns the outputs that gradients come to, if any.
template <class F>
Phases time_op(Inputs& in, F&& call) {
  Rank& rank = in.rank;
  Stopwatch forward(rank), back(rank), weights(rank);
  Inputs gradients{rank};
  for (int run = 0; run < kWarmUp + kRuns; run++) {
    Tape tape;
    rank.tape = &tape;
    for (Tensor& t : in.x)
      if (is_float(t.dtype) && !t.is_weight()) make_leaf(rank, t);
    forward.start();
    TensorList out = call(rank, in);
    forward.stop();
    bool bx = false, bw = false;
    for (const Node& node : tape.nodes) {
      bx |= (node.bx || node.bw_now) && out.count > 0;
      bw |= node.bw && !node.bw_now && out.count > 0;
    }
    rank.tape = nullptr;
    for (int i = 0; i < out.count; i++) {
      if (run == 0) gradients.values(out[i].dim, out[i].dtype);
      if (out[i].var >= 0) tape.grads[out[i].var] = gradients[i];
    }
    rank.tape = &tape;
    if (bx) back.start();
    backward(rank, 0, tape.size(), true);
    if (bx) back.stop();
    if (bw) weights.start();
    weight_grads(rank, {{&tape, 0, tape.size()}});
    if (bw) weights.stop();
    rank.tape = nullptr;
    for (Tensor& t : in.x) t.var = -1;
  }
  return {forward.median(), back.median(), weights.median()};
}
template <class F>
double time_call(Rank& rank, F&& call) {
  Stopwatch watch(rank);
  for (int run = 0; run < kWarmUp + kRuns; run++) {
    watch.start();
    call();
    watch.stop();
  }
  return watch.median();
}

// Of a copy of 1 GiB on the device, bytes read and written a second.
double copy_rate(Rank& rank);
// FLOP/s of a dense product of 8192 x 8192 matrices.
double product_rate(Rank& rank);
// In use on a GPU, by all processes; waits for the rank.
i64 device_bytes(Rank& rank);

}
