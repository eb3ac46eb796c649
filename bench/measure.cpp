#include "bench/measure.h"

#include <algorithm>

#include "core/log.h"
#include "core/rng.h"
#ifdef PITH_CUDA
#include "core/cuda.cuh"
#endif

namespace pith {

Tensor& Inputs::values(Dims dims, DType dtype) {
  Tensor& t = x.emplace_back(empty(rank, dims, dtype));
  if (t.numel()) fill_normal(rank, t, x.size(), 0, 1);
  return t;
}

void Inputs::weight(Dims dims) {
  Tensor& w = values(dims);
  w.grad = sums.emplace_back(zeros(rank, dims, wide(w.dtype))).data;
}

void Inputs::ids(Dims dims, i64 limit) {
  vector<int> id(dims.numel());
  for (size_t i = 0; i < id.size(); i++) id[i] = int(uniform_at(x.size(), i) * double(limit));
  x.push_back(tensor_from(rank, dims, DType::I32, id.data()));
}

#ifdef PITH_CUDA
static void* make_event(Rank& rank) {
  cudaEvent_t event;
  cuda_check(cudaEventCreate(&event));
  cuda_check(cudaEventRecord(event, cuda_of(rank).stream));
  return event;
}
static double seconds_between(void* begin, void* end) {
  float ms = 0;
  cuda_check(cudaEventSynchronize(cudaEvent_t(end)));
  cuda_check(cudaEventElapsedTime(&ms, cudaEvent_t(begin), cudaEvent_t(end)));
  return 1e-3 * ms;
}
static void drop_event(void* event) { cudaEventDestroy(cudaEvent_t(event)); }
static void copy_there(Rank& rank, const Tensor& to, const Tensor& from) {
  cuda_check(cudaMemcpyAsync(
      to.data, from.data, to.bytes(), cudaMemcpyDeviceToDevice, cuda_of(rank).stream));
}
i64 device_bytes(Rank& rank) {
  if (rank.device == Device::CPU) return 0;
  cuda_sync(cuda_of(rank));
  size_t free = 0, total = 0;
  cuda_check(cudaMemGetInfo(&free, &total));
  return i64(total - free);
}
#else
static void* make_event(Rank&) { return nullptr; }
static double seconds_between(void*, void*) { return 0; }
static void drop_event(void*) {}
static void copy_there(Rank&, const Tensor& to, const Tensor& from) {
  memcpy(to.data, from.data, to.bytes());
}
i64 device_bytes(Rank&) { return 0; }
#endif

Stopwatch::Stopwatch(Rank& rank) : rank_(rank) {
  if (rank.device == Device::CUDA) cold_ = zeros(rank, {8192, 8192}, DType::F32);
}

Stopwatch::~Stopwatch() {
  for (void* event : events_) drop_event(event);
}

void Stopwatch::mark() {
  if (rank_.device == Device::CUDA)
    events_.push_back(make_event(rank_));
  else
    times_.push_back(now_s());
}

void Stopwatch::start() {
  if (cold_.defined()) sum(rank_, cold_, 1);
  mark();
}

void Stopwatch::stop() { mark(); }

double Stopwatch::median() {
  vector<double> s;
  for (size_t i = 2 * kWarmUp; i < events_.size(); i += 2)
    s.push_back(seconds_between(events_[i], events_[i + 1]));
  for (size_t i = 2 * kWarmUp; i < times_.size(); i += 2) s.push_back(times_[i + 1] - times_[i]);
  std::ranges::sort(s);
  return s.empty() ? 0 : (s[(s.size() - 1) / 2] + s[s.size() / 2]) / 2;
}

double copy_rate(Rank& rank) {
  constexpr i64 kBytes = i64{1} << 30;
  const Tensor from = zeros(rank, {kBytes}, DType::U8), to = zeros(rank, {kBytes}, DType::U8);
  return 2 * kBytes / time_call(rank, [&] { copy_there(rank, to, from); });
}

double product_rate(Rank& rank) {
  constexpr i64 kSide = 8192;
  Inputs in{rank};
  in.values({kSide, kSide});
  in.values({kSide, kSide});
  double seconds = time_call(rank, [&] { linear(rank, in[0], in[1]); });
  return 2.0 * kSide * kSide * kSide / seconds;
}

}
