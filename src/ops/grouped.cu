#include "ops/grouped.h"

#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "core/cuda.cuh"

namespace pith {
namespace {

using cute::Int;
using cutlass::layout::ColumnMajor, cutlass::layout::RowMajor;
using std::conditional_t;
namespace epilogue = cutlass::epilogue;
namespace gemm = cutlass::gemm;

using Shape = cute::Shape<int, int, int>;  // m, n, k
using BF16 = cutlass::bfloat16_t;

constexpr char kPlace[] = "grouped GEMM";

enum Product { kForward, kInputGrad, kWeightGrad };

// d = a b or, of weights' gradients, d += a^T b.
struct Operands {
  const Tensor &a, &b, &d, &offsets;
};

// Two warpgroups work on one tile or, where it is 128 x 128, each on its own. Two blocks share what
// they read of the tile's longer side.
template <Product kProduct, int kM, int kN>
struct Kernel {
  static constexpr bool kAdds = kProduct == kWeightGrad, kInTurn = kM == kN, kWide = kM < kN;
  using Hopper = cutlass::arch::Sm90;
  using TensorCores = cutlass::arch::OpClassTensorOp;
  using Tile = cute::Shape<Int<kM>, Int<kN>, Int<64>>;
  using Cluster = cute::Shape<Int<1 + kWide>, Int<2 - kWide>, Int<1>>;
  using Before = conditional_t<kAdds, float, void>;  // void: d is not read
  using After = conditional_t<kAdds, float, BF16>;
  static constexpr int kAligned = 16 / sizeof(After);
  using Ends = typename epilogue::collective::CollectiveBuilder<Hopper, TensorCores, Tile, Cluster,
      epilogue::collective::EpilogueTileAuto, float, float, Before, RowMajor*, kAligned, After,
      RowMajor*, kAligned,
      conditional_t<kInTurn, epilogue::PtrArrayTmaWarpSpecializedPingpong,
          epilogue::PtrArrayTmaWarpSpecializedCooperative>,
      epilogue::fusion::LinearCombination<After, float>>::CollectiveOp;
  using Multiplies = typename gemm::collective::CollectiveBuilder<Hopper, TensorCores, BF16,
      conditional_t<kAdds, ColumnMajor, RowMajor>*, 8, BF16,
      conditional_t<kProduct == kForward, ColumnMajor, RowMajor>*, 8, float, Tile, Cluster,
      gemm::collective::StageCountAutoCarveout<int(sizeof(typename Ends::SharedStorage))>,
      conditional_t<kInTurn, gemm::KernelPtrArrayTmaWarpSpecializedPingpong,
          gemm::KernelPtrArrayTmaWarpSpecializedCooperative>>::CollectiveOp;
  using Type = gemm::kernel::GemmUniversal<gemm::GroupProblemShape<Shape>, Multiplies, Ends>;
};

// A number for each expert, on the device, of the type that CUTLASS wants: an address or a stride,
// whose type knows all but the length of a row.
struct List {
  i64* data;
  template <class T>
  operator T*() const {
    static_assert(sizeof(T) == sizeof(i64));
    return reinterpret_cast<T*>(data);
  }
};
// Of an operand: where each expert's part of it begins.
struct Part {
  i64 address, cols, row_bytes, expert_bytes;
  List begin, stride;
};
struct Parts {
  Part part[3];
  Shape* shape;
};

Parts fill_parts(Rank& rank, const Operands& o, bool weight_grad, const Tensor& memory) {
  i64 E = o.offsets.dim[0] - 1;
  i64* next = memory.as<i64>();
  Parts parts;
  Part* part = parts.part;
  for (const Tensor* t : {&o.a, &o.b, &o.d}) {
    i64 row = t->cols() * size_of(t->dtype);
    bool weights = t->dim.rank == 3;
    i64 row_bytes = weights ? 0 : row, expert_bytes = weights ? row * t->dim[1] : 0;
    *part++ = {i64(t->data), t->cols(), row_bytes, expert_bytes, {next}, {next + E}};
    next += 2 * E;
  }
  parts.shape = reinterpret_cast<Shape*>(next);
  const int *offset = o.offsets.i32(), n = o.d.cols(), other = o.a.cols();
  cuda_each(rank, E, [=] __device__(i64 e) {
    int first = offset[e], rows = offset[e + 1] - first;
    // With m = 0 the gradient of an empty expert is not even read.
    parts.shape[e] = weight_grad ? Shape{rows ? other : 0, n, rows} : Shape{rows, n, other};
    for (const Part& p : parts.part) {
      p.begin.data[e] = p.address + first * p.row_bytes + e * p.expert_bytes;
      p.stride.data[e] = p.cols;
    }
  });
  return parts;
}

void check(cutlass::Status s) {
  if (s != cutlass::Status::kSuccess)
    failed(kPlace, text("CUTLASS failed (got %s)", cutlassGetStatusString(s)),
        "PITH_DEBUG=1, which names the op");
}

template <Product kProduct, int kM, int kN>
void launch(Rank& rank, const Operands& o, bool along_n) {
  using K = typename Kernel<kProduct, kM, kN>::Type;
  using Gemm = gemm::device::GemmUniversalAdapter<K>;
  using Order = typename K::TileScheduler::RasterOrderOptions;
  const Cuda& cuda = cuda_of(rank);
  int E = o.offsets.dim[0] - 1;
  Tensor memory = empty(rank, {E * i64(6 * sizeof(i64) + sizeof(Shape))}, DType::U8);
  const Parts parts = fill_parts(rank, o, kProduct == kWeightGrad, memory);
  const auto& [a, b, d] = parts.part;
  const typename Gemm::Arguments arguments{gemm::GemmUniversalMode::kGrouped, {E, parts.shape},
      {a.begin, a.stride, b.begin, b.stride},
      {{.beta = kProduct == kWeightGrad}, d.begin, d.stride, d.begin, d.stride},
      {0, cuda.processors}, {1, along_n ? Order::AlongN : Order::AlongM}};
  Tensor work = empty(rank, {i64(Gemm::get_workspace_size(arguments))}, DType::U8);
  check(Gemm::can_implement(arguments));
  check(Gemm().run(arguments, work.data, cuda.stream));
}

// A large tile wants many rows and a long sum.
int tile_for(Product product, i64 rows_of_expert, i64 k) {
  if (product == kWeightGrad) return rows_of_expert < 512 ? 4 : 1;
  return rows_of_expert < 128 || k < 1536 ? 2 : 0;
}

template <Product kProduct>
void run(Rank& rank, const Operands& o, int tile) {
  i64 rows = o.a.dim[0], E = o.offsets.dim[0] - 1;
  if (rows == 0) return;
  int device = 0, major = 0;
  cuda_check(cudaGetDevice(&device));
  cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (major != 9) failed(kPlace, text("no grouped GEMM for this GPU (got sm_%d0, need 90)", major));
  u64 addresses = u64(o.a.data) | u64(o.b.data) | u64(o.d.data);
  if (!grouped_fits(o.a.cols(), o.d.cols()) || addresses % 16)
    failed(kPlace, "rows or addresses do not fit (need multiples of 16 bytes)");
  if (tile < 0) tile = tile_for(kProduct, rows / E, o.a.cols());
  // Odd: an expert's tiles are done row by row, not column by column.
  bool along_n = tile % 2;
  if (tile / 2 == 0) return launch<kProduct, 128, 256>(rank, o, along_n);
  if (tile / 2 == 1) return launch<kProduct, 128, 128>(rank, o, along_n);
  launch<kProduct, 256, 128>(rank, o, along_n);
}

}

void grouped_forward(Rank& rank, const Tensor& x, const Tensor& w, const Tensor& offsets,
    const Tensor& y, int tile) {
  run<kForward>(rank, {x, w, y, offsets}, tile);
}

void grouped_input_grad(Rank& rank, const Tensor& dy, const Tensor& w, const Tensor& offsets,
    const Tensor& dx, int tile) {
  run<kInputGrad>(rank, {dy, w, dx, offsets}, tile);
}

void grouped_weight_grad(Rank& rank, const Tensor& dy, const Tensor& x, const Tensor& offsets,
    const Tensor& dw, int tile) {
  run<kWeightGrad>(rank, {dy, x, dw, offsets}, tile);
}

}
