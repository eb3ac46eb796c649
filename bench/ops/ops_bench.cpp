// ops_bench: the general operations on one GPU: time, bytes a second (each input read once, each
// output written once) and floating-point operations a second; the best of five times twenty calls.
//
// Built beside the project, with B the build folder of preset cuda:
//   g++ -std=c++20 -O2 -DPITH_CUDA -Isrc bench/ops/ops_bench.cpp $B/libpith_ops.a $B/libpith_comm.a
//       $B/libpith_core.a /usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblas.a
//       -L/usr/local/cuda/lib64 -lcublas -lcudart_static -lxxhash -lpthread -lgomp -ldl -lrt -o
//       ops_bench
#include <algorithm>
#include <chrono>
#include <cstdio>

#include "core/cuda.h"
#include "ops/ops.h"

using namespace pith;

int main() {
  Allocator allocator;
  Status status;
  Rank rank;
  allocator.cuda = cuda_open(0);
  rank.device = Device::CUDA;
  rank.allocator = &allocator;
  rank.status = &status;
  const auto wait = [&] {
    vector<char> bytes;
    on_host(rank, zeros(rank, {1}, DType::F32), bytes);
  };
  const auto now = [] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
  };
  std::printf("| op | ms | GB/s | TFLOP/s |\n|---|--:|--:|--:|\n");
  const auto time = [&](const char* name, double bytes, double flops, const auto& call) {
    constexpr int kCalls = 20;
    double best_s = 1e9;
    for (int round = 0; round < 5; round++) {
      call();
      wait();
      const double start = now();
      for (int i = 0; i < kCalls; i++) call();
      wait();
      best_s = std::min(best_s, (now() - start) / kCalls);
    }
    std::printf("| %s | %.3f | %.0f | %.1f |\n", name, best_s * 1e3, bytes / best_s / 1e9,
                flops / best_s / 1e12);
  };
  constexpr int64_t kSide = 8192;
  constexpr double kBytes = double(kSide) * kSide * 4;
  {
    const Tensor x = empty(rank, {kSide, kSide}, DType::F32);
    const Tensor y = empty(rank, {kSide, kSide}, DType::F32);
    const Tensor row = empty(rank, {kSide}, DType::F32);
    for (const auto& [t, key] : {std::pair(x, 1), {y, 2}, {row, 3}}) {
      vector<float> numbers(t.numel());
      for (size_t i = 0; i < numbers.size(); i++)
        numbers[i] = float((i * key * 2654435761u) % 1009);
      cuda_copy(rank, t.data, numbers.data(), t.bytes());
    }
    time("zero", kBytes, 0, [&] { fill_zero(rank, y); });
    time("fill", kBytes, 0, [&] { fill_constant(rank, y, 0.5); });
    time("add", 3 * kBytes, 0, [&] { add(rank, x, y); });
    time("mul, one row repeated", 2 * kBytes, 0, [&] { mul(rank, x, row); });
    time("sigmoid", 2 * kBytes, 0, [&] { sigmoid(rank, x); });
    time("sum, last dimension", kBytes, 0, [&] { sum(rank, x, 1); });
    time("sum, first dimension", kBytes, 0, [&] { sum(rank, x, 0); });
    time("softmax", 2 * kBytes, 0, [&] { softmax(rank, x, 1); });
    time("cumsum", 2 * kBytes, 0, [&] { cumsum(rank, x, 1); });
    time("transpose", 2 * kBytes, 0, [&] { permute(rank, x, {1, 0}); });
    const Tensor routed = x.view({kSide * 64, 128}), rows = x.view({kSide * 4, kSide / 4});
    time("top_k, 8 of 128", kBytes, 0, [&] { top_k(rank, routed, 8); });
    vector<int32_t> chosen(kSide * 4);
    for (size_t i = 0; i < chosen.size(); i++) chosen[i] = int32_t(i * 2654435761u % kSide);
    const Tensor ids = tensor_from(rank, {kSide * 4}, DType::I32, chosen.data());
    time("index_select, rows of 2048", 2 * kBytes, 0, [&] { index_select(rank, rows, ids); });
    time("scatter_add, rows of 2048", 1.25 * kBytes, 0,
         [&] { scatter_add(rank, rows, ids, kSide); });
    time("matmul 8192^3, FP32", 3 * kBytes, 2.0 * kSide * kSide * kSide,
         [&] { matmul(rank, x, y); });
  }
  cuda_close(allocator.cuda);
}
