// gradcheck: checks an op, or any composition of ops, against central differences in F64, and its
// manners on the tape; then, in a build with CUDA and with a GPU, the GPU's results against the
// CPU's. One call is one row of a table:
//
//     TestRank t;
//     gradcheck("add [3,4]+[4]", {t.random({3, 4}), t.random({4}, 2)},
//               [](Rank& r, TensorList x) { return add(r, x[0], x[1]); });
//
// defines: no_gpu, TestRank, values_of, relative_error, GradcheckOptions, OnGpu, gradcheck,
// expect_error
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "core/cuda.h"
#include "core/rank.h"
#include "core/rng.h"
#include "core/tape.h"

namespace pith {

// Why nothing can be computed on a GPU here; empty where it can.
inline const std::string& no_gpu() {
  static const std::string reason = [] {
    std::string why = "this build has no CUDA";
    if constexpr (kCuda)
      if (!cuda_devices(why).empty()) why = "";
    return why;
  }();
  return reason;
}

// The elements of any tensor.
inline std::vector<double> values_of(const Tensor& t) {
  Rank rank;
  if (t.storage.get()) rank.allocator = t.storage.get()->allocator;
  vector<char> bytes;
  const Tensor host = on_host(rank, t, bytes);
  std::vector<double> v(t.numel());
  for (size_t i = 0; i < v.size(); i++) {
    if (t.dtype == DType::F64)
      v[i] = host.as<double>()[i];
    else if (t.dtype == DType::F32)
      v[i] = host.f32()[i];
    else if (t.dtype == DType::BF16)
      v[i] = host.as<BF16>()[i];
    else if (t.dtype == DType::I32)
      v[i] = host.i32()[i];
    else
      v[i] = host.as<uint8_t>()[i];
  }
  return v;
}

// A rank with a tape, in a world of one. Tensors must not outlive it.
struct TestRank {
  // The first member: closed when the tape's tensors are gone.
  struct Gpu {
    Cuda* cuda = nullptr;
    ~Gpu() {
      if constexpr (kCuda) try {
          if (cuda) cuda_close(cuda);
        } catch (const Error& e) {
          ADD_FAILURE() << e.what();
        }
    }
  } gpu;
  Allocator allocator;
  Status status;
  Tape tape;
  Rank rank;
  explicit TestRank(Device device = Device::CPU) {
    if constexpr (kCuda)
      if (device == Device::CUDA) gpu.cuda = allocator.cuda = cuda_open(0);
    rank.device = device;
    rank.allocator = &allocator;
    rank.status = &status;
    rank.tape = &tape;
  }
  TestRank(const TestRank&) = delete;
  // Normal numbers of standard deviation `std` around `mean`.
  Tensor random(
      Dims dims, uint64_t seed = 1, double std = 1, double mean = 0, DType dtype = DType::F64) {
    std::vector<double> values(dims.numel());
    for (size_t i = 0; i < values.size(); i++) values[i] = mean + std * normal_at(seed, i);
    return floats(dims, values, dtype);
  }
  // The given values (of any float dtype's worth), or all zeros when there are none.
  Tensor floats(Dims dims, std::vector<double> values, DType dtype = DType::F64) {
    values.resize(dims.numel());
    if (dtype == DType::F64) return tensor_from(rank, dims, dtype, values.data());
    const std::vector<float> narrow(values.begin(), values.end());
    const std::vector<BF16> half(narrow.begin(), narrow.end());
    if (dtype == DType::BF16) return tensor_from(rank, dims, dtype, half.data());
    return tensor_from(rank, dims, dtype, narrow.data());
  }
  Tensor ints(Dims dims, const std::vector<int32_t>& values) {
    return tensor_from(rank, dims, DType::I32, values.data());
  }
  Tensor mask(Dims dims, const std::vector<uint8_t>& values) {
    return tensor_from(rank, dims, DType::U8, values.data());
  }
  // A copy of a CPU's tensor in this rank's memory; a float tensor becomes `dtype`.
  // With `round`, through BF16.
  Tensor cast(const Tensor& x, DType dtype, bool round = false) {
    if (!x.defined()) return x;
    if (!is_float(x.dtype)) return tensor_from(rank, x.dim, x.dtype, x.data);
    std::vector<double> values = values_of(x);
    for (double& v : values) v = round ? double(BF16(float(v))) : v;
    return floats(x.dim, values, dtype);
  }
};

// ||a - b|| / ||b||, or ||a - b|| where b is zero.
inline double relative_error(const std::vector<double>& a, const std::vector<double>& b) {
  if (a.size() != b.size()) return INFINITY;
  double diff = 0, norm = 0;
  for (size_t i = 0; i < a.size(); i++) {
    diff += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return std::sqrt(norm > 0 ? diff / norm : diff);
}
inline double relative_error(const Tensor& a, const Tensor& b) {
  return relative_error(values_of(a), values_of(b));
}

struct GradcheckOptions {
  double tolerance = 1e-6;       // of an element, relative to it or to its tensor's rms
  double step = 1e-5;            // of the central difference
  double f32_tolerance = 1e-5;   // relative L2 of F32 values and gradients; 0: no F32 run
  double bf16_tolerance = 5e-3;  // of BF16 ones on a GPU; 0: no BF16 run
  double bf16_row = 2e-2;        // of each row of them
  unsigned wide = 0;             // bit i: input i is F32 beside BF16
  int max_elements = 200;        // elements of an input that are checked, spread over it
  unsigned constants = 0;        // bit i: input i is a float without a gradient
  double cotangent = 0;          // != 0: every output's gradient, instead of random numbers (for
                                 // a terminal op, which takes it as given)
};

// What the GPU did in this program.
struct OnGpu {
  int compared = 0;
  std::map<std::string, int> refused;  // by the op without a CUDA form
};
inline OnGpu& on_gpu() {
  static OnGpu counts;
  return counts;
}

namespace gradcheck_detail {

using Values = std::vector<std::vector<double>>;

// How the inputs are given to the function, and which outputs get a gradient.
struct Mode {
  DType dtype = DType::F64;
  Device device = Device::CPU;
  bool tape = true;
  bool rounded = false;   // inputs and gradients are first rounded to BF16
  bool weights = false;   // inputs have accumulators, which start at `start`
  bool deferred = false;  // weight gradients in a second pass
  double start = 0;
  int only_input = -1;   // >= 0: the others are constants
  int only_output = -1;  // >= 0: the others get no gradient
  int uses = 1;          // times the function is applied to the same inputs
};
struct Result {
  Values outputs, grads;         // grads: one an input, empty where none arrived
  std::vector<int64_t> columns;  // of each output
  size_t nodes = 0;
};

inline TensorList as_list(const Tensor& t) { return {t}; }
inline TensorList as_list(const TensorList& t) { return t; }

template <class F>
struct Checker {
  std::string name;
  const std::vector<Tensor>& inputs;
  F& f;
  GradcheckOptions o;

  bool differentiable(int i) const {
    return inputs[i].defined() && is_float(inputs[i].dtype) && !(o.constants >> i & 1);
  }
  // The gradient given to output `out`.
  double cotangent(int out, int64_t i) const {
    return o.cotangent != 0 ? o.cotangent : normal_at(1000 + out, i);
  }

  Result run(const Mode& mode) const {
    TestRank t(mode.device);
    if (!mode.tape) t.rank.tape = nullptr;
    TensorList xs;
    std::vector<Tensor> accumulators(inputs.size());
    for (size_t i = 0; i < inputs.size(); i++) {
      const bool in_f32 = mode.dtype == DType::BF16 && o.wide >> i & 1;
      const bool rounds = mode.rounded && !(o.wide >> i & 1);
      Tensor x = t.cast(inputs[i], in_f32 ? DType::F32 : mode.dtype, rounds);
      const bool wanted =
          mode.tape && differentiable(i) && (mode.only_input < 0 || mode.only_input == int(i));
      if (wanted && mode.weights) {
        accumulators[i] =
            t.floats(x.dim, std::vector<double>(x.numel(), mode.start), wide(x.dtype));
        x.grad = accumulators[i].data;
        // An empty weight has no bytes, yet is a weight.
        if (!x.grad) x.grad = reinterpret_cast<char*>(&t);
        x.name = "weight";
      } else if (wanted) {
        make_leaf(t.rank, x);
      }
      xs.push(x);
    }
    Result result;
    std::vector<NodeRange> uses;
    for (int use = 0; use < mode.uses; use++) {
      const int begin = t.tape.size();
      TensorList ys = as_list(f(t.rank, xs));
      result.outputs.clear();
      for (int k = 0; k < ys.count; k++) {
        result.outputs.push_back(values_of(ys[k]));
        result.columns.push_back(ys[k].dim.rank ? ys[k].cols() : 1);
        if (mode.tape) seed(t, ys[k], k, mode);
      }
      uses.push_back({&t.tape, begin, t.tape.size()});
    }
    result.nodes = t.tape.nodes.size();
    if (!mode.tape) return result;
    backward(t.rank, 0, t.tape.size(), mode.deferred);
    if (mode.deferred) weight_grads(t.rank, uses);
    for (size_t i = 0; i < inputs.size(); i++) {
      Tensor g = mode.weights ? accumulators[i] : grad_of(t.tape, xs[i]);
      if (g.defined() && g.dim == xs[i].dim)
        result.grads.push_back(values_of(g));
      else
        result.grads.emplace_back();
    }
    return result;
  }

  void seed(TestRank& t, const Tensor& y, int k, const Mode& mode) const {
    if (!is_float(y.dtype) || !y.needs_grad()) return;
    if (mode.only_output >= 0 && mode.only_output != k) return;
    std::vector<double> c(y.numel());
    for (size_t i = 0; i < c.size(); i++)
      c[i] = mode.rounded ? double(BF16(float(cotangent(k, i)))) : cotangent(k, i);
    add_grad(t.rank, y, t.floats(y.dim, c, y.dtype));
  }

  // d(sum of cotangent * output) / d(element e of input i), from two evaluations.
  double slope(int i, int64_t e) {
    double* x = inputs[i].template as<double>() + e;
    const double was = *x, h = o.step * std::max(1.0, std::fabs(was));
    *x = was + h;
    const Values up = run({.tape = false}).outputs;
    const double high = *x;
    *x = was - h;
    const Values down = run({.tape = false}).outputs;
    const double low = *x;
    *x = was;
    double sum = 0;
    for (size_t k = 0; k < up.size(); k++)
      for (size_t j = 0; j < up[k].size(); j++)
        if (up[k][j] != down[k][j]) sum += cotangent(k, j) * (up[k][j] - down[k][j]);
    return sum / (high - low);
  }

  void compare_slopes(int i, const std::vector<double>& got) {
    const int64_t n = inputs[i].numel();
    ASSERT_EQ(int64_t(got.size()), n)
        << name << ": no gradient arrived at input " << i << " " << describe(inputs[i]);
    double square = 0;
    for (double g : got) square += g * g;
    const double floor = std::max(1e-3, n ? std::sqrt(square / n) : 0);
    const int64_t count = std::min<int64_t>(n, o.max_elements);
    for (int64_t c = 0; c < count; c++) {
      // First, last, and evenly between.
      const int64_t e = count == n ? c : c * (n - 1) / std::max<int64_t>(1, count - 1);
      const double want = slope(i, e);
      if (std::fabs(got[e] - want) <= o.tolerance * std::max(std::fabs(want), floor)) continue;
      ADD_FAILURE() << name << ": gradient of input " << i << " " << describe(inputs[i])
                    << text(", element %ld: got %.12g, want %.12g", long(e), got[e], want);
      return;
    }
  }

  void near(const char* what, const Values& got, const Values& want, double limit) {
    ASSERT_EQ(got.size(), want.size()) << name << ": " << what;
    for (size_t k = 0; k < got.size(); k++) {
      const double error = relative_error(got[k], want[k]);
      EXPECT_LE(error, limit) << name << ": " << what << ", tensor " << k;
    }
  }

  // Each row too, relative to it or, where it is small, to the tensor's rms row.
  void rows_near(const char* what, const Result& got, const Result& want) {
    near(what, got.outputs, want.outputs, o.bf16_tolerance);
    near(what, got.grads, want.grads, o.bf16_tolerance);
    const auto each_row = [&](const std::vector<double>& a, const std::vector<double>& b, int64_t n,
                              int64_t tensor) {
      double square = 0;
      for (double x : b) square += x * x;
      for (size_t first = 0; n > 0 && first + n <= b.size() && a.size() == b.size(); first += n) {
        double diff = 0, norm = 0;
        for (size_t i = first; i < first + n; i++) {
          diff += (a[i] - b[i]) * (a[i] - b[i]);
          norm += b[i] * b[i];
        }
        const double scale = std::max(norm, square * double(n) / double(b.size()));
        EXPECT_LE(std::sqrt(diff), o.bf16_row * std::sqrt(scale))
            << name << ": " << what << ", tensor " << tensor << ", row " << first / n;
      }
    };
    for (size_t k = 0; k < got.outputs.size(); k++)
      each_row(got.outputs[k], want.outputs[k], got.columns[k], k);
    for (size_t i = 0; i < got.grads.size(); i++)
      if (inputs[i].dim.rank) each_row(got.grads[i], want.grads[i], inputs[i].cols(), i);
  }

  // want * a + b, elementwise.
  static Values scaled(Values v, double a, double b) {
    for (auto& t : v)
      for (double& x : t) x = x * a + b;
    return v;
  }

  void outputs_apart(const Result& full) {
    Values sum;
    for (size_t k = 0; k < full.outputs.size(); k++) {
      const Values g = run({.only_output = int(k)}).grads;
      if (sum.empty()) sum.resize(g.size());
      for (size_t i = 0; i < g.size(); i++) {
        if (sum[i].size() < g[i].size()) sum[i].resize(g[i].size());
        for (size_t e = 0; e < g[i].size(); e++) sum[i][e] += g[i][e];
      }
    }
    near("gradients, one output at a time", sum, full.grads, 1e-9);
  }

  // The GPU's results are the CPU's, `full` and `weights`, and repeat. An op without a CUDA form
  // says so and is counted.
  void compare_gpu(const Result& full, const Result& weights) {
    constexpr Device kGpu = Device::CUDA;
    const double limit = 1e-10;
    try {
      const Result gpu = run({.device = kGpu}), again = run({.device = kGpu});
      on_gpu().compared++;
      near("F64 values on the GPU", gpu.outputs, full.outputs, limit);
      near("F64 gradients on the GPU", gpu.grads, full.grads, limit);
      EXPECT_EQ(gpu.outputs, again.outputs) << name << ": second run on the GPU";
      EXPECT_EQ(gpu.grads, again.grads) << name << ": second run on the GPU";
      EXPECT_EQ(gpu.nodes, full.nodes) << name << ": on the GPU";
      near("accumulators on the GPU", run({.device = kGpu, .weights = true, .start = 0.5}).grads,
          weights.grads, limit);
      if (o.bf16_tolerance > 0) {
        const Mode half{.dtype = DType::BF16, .device = kGpu, .rounded = true};
        const Result want = run({.rounded = true}), got = run(half), got_again = run(half);
        rows_near("BF16 on the GPU", got, want);
        EXPECT_EQ(got.outputs, got_again.outputs) << name << ": second BF16 run on the GPU";
        EXPECT_EQ(got.grads, got_again.grads) << name << ": second BF16 run on the GPU";
        Mode sums = half;
        sums.weights = true;
        sums.start = 0.5;
        near("BF16 accumulators on the GPU", run(sums).grads, scaled(want.grads, 1, 0.5),
            o.bf16_tolerance);
        sums.deferred = true;
        sums.uses = 3;
        near("BF16 accumulators of three micro-batches", run(sums).grads,
            scaled(want.grads, 3, 0.5), o.bf16_tolerance);
      }
      if (o.f32_tolerance > 0) {
        const Mode mode{.dtype = DType::F32, .device = kGpu};
        const Result f32 = run(mode), f32_again = run(mode);
        near("F32 values on the GPU", f32.outputs, full.outputs, o.f32_tolerance);
        near("F32 gradients on the GPU", f32.grads, full.grads, o.f32_tolerance);
        EXPECT_EQ(f32.outputs, f32_again.outputs) << name << ": second F32 run on the GPU";
        EXPECT_EQ(f32.grads, f32_again.grads) << name << ": second F32 run on the GPU";
      }
    } catch (const Error& e) {  // "FILE:LINE: OP: no CUDA implementation ..."
      const std::string message = e.what();
      const size_t end = message.find(": no CUDA implementation");
      if (end == std::string::npos) throw;
      const size_t begin = message.rfind(' ', end - 1) + 1;
      on_gpu().refused[message.substr(begin, end - begin)]++;
    }
  }

  void check() {
    const Result full = run({});
    for (size_t i = 0; i < inputs.size(); i++)
      if (differentiable(i)) compare_slopes(i, full.grads[i]);
    const Result again = run({}), plain = run({.tape = false});
    EXPECT_EQ(full.outputs, again.outputs) << name << ": second run";
    EXPECT_EQ(full.grads, again.grads) << name << ": second run";
    EXPECT_EQ(full.outputs, plain.outputs) << name << ": without a tape";
    EXPECT_GT(full.nodes, 0u) << name << ": nothing was recorded";
    EXPECT_EQ(plain.nodes, 0u) << name;
    const Result weights = run({.weights = true, .start = 0.5});
    near("accumulators that started at 0.5", weights.grads, scaled(full.grads, 1, 0.5), 1e-12);
    EXPECT_EQ(run({.weights = true, .deferred = true, .start = 0.5}).grads, weights.grads)
        << name << ": deferred weight gradients";
    near("accumulators of three micro-batches",
        run({.weights = true, .deferred = true, .start = 0.5, .uses = 3}).grads,
        scaled(full.grads, 3, 0.5), 1e-12);
    near("inputs used twice", run({.uses = 2}).grads, scaled(full.grads, 2, 0), 1e-12);
    for (size_t i = 0; i < inputs.size(); i++)
      if (differentiable(i))
        near("gradient of one input alone", {run({.only_input = int(i)}).grads[i]}, {full.grads[i]},
            1e-12);
    if (full.outputs.size() > 1 && o.cotangent == 0) outputs_apart(full);
    if (o.f32_tolerance > 0) {
      const Result f32 = run({.dtype = DType::F32});
      near("F32 values", f32.outputs, full.outputs, o.f32_tolerance);
      near("F32 gradients", f32.grads, full.grads, o.f32_tolerance);
    }
    if (no_gpu().empty()) compare_gpu(full, weights);
  }
};

}  // namespace gradcheck_detail

// Checks f(rank, inputs) -> Tensor or TensorList. Inputs are F64 (those get gradients), I32 or U8;
// at most 8. Everything that depends on the dtype must be among them.
template <class F>
void gradcheck(const std::string& name, const std::vector<Tensor>& inputs, F f,
    GradcheckOptions options = {}) {
  gradcheck_detail::Checker<F>{name, inputs, f, options}.check();
}

// f() throws an Error that contains each of `parts`.
template <class F>
void expect_error(F f, std::initializer_list<const char*> parts) {
  try {
    f();
  } catch (const Error& e) {
    for (const char* part : parts)
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos)
          << "no '" << part << "' in: " << e.what();
    return;
  }
  ADD_FAILURE() << "no error, expected: " << *parts.begin();
}

}  // namespace pith
