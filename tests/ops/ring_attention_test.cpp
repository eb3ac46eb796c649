// Attention over a cp group against the same rows on one rank.
#include "comm/launch.h"
#include "ops/gradcheck.h"
#include "ops/ops.h"

namespace pith {
namespace {

constexpr int64_t kRows = 3;     // of a batch
constexpr int64_t kLength = 48;  // of a row: 2*cp divides it for cp = 1 to 4
constexpr Heads kHeads{4, 2, 6};
constexpr int64_t kOut = 4 * 6, kPacked = (4 + 2 * 2) * 6;

struct RingCase {
  const char* name;
  bool causal;
  int window;
  bool documents;
};
const RingCase kCases[] = {
    {"causal", true, 0, false},
    {"all", false, 0, false},
    {"window within a chunk", true, 3, false},
    {"window over chunks", true, 17, false},
    {"window behind, all ahead", false, 9, false},
    {"documents", true, 0, true},
    {"documents and window", true, 5, true},
    {"documents, all", false, 0, true},
};

// End of the document that position i of a row lies in: rows differ, and some documents end on
// chunk borders, some within, some cover several chunks.
int32_t document_end(int64_t row, int64_t i) {
  const std::vector<std::vector<int32_t>> ends = {{1, 6, 24, 31, 48}, {48}, {20, 21, 40, 48}};
  for (const int32_t end : ends[row % 3])
    if (i < end) return end;
  return kLength;
}

// Value of element n of a position: the same for whoever holds it. `batch` tells the copies of the
// cp group apart.
double value(int batch, int tensor, int64_t row, int64_t position, int64_t n) {
  return normal_at(100 * batch + tensor, ((row * kLength + position) * 64) + n);
}

// A tensor [B, S, ...] over whole rows that ranks fill in and read, each its positions.
struct Whole {
  std::vector<double> data;
  int64_t width;
  explicit Whole(int64_t w) : data(kRows * kLength * w, NAN), width(w) {}
  void put(const Tensor& t, const std::vector<int32_t>& coord) {
    const auto v = values_of(t);
    const int64_t S = coord.size();
    for (int64_t b = 0; b < kRows; b++)
      for (int64_t i = 0; i < S; i++)
        std::copy_n(&v[(b * S + i) * width], width, &data[(b * kLength + coord[i]) * width]);
  }
};

std::vector<int32_t> coordinates(const Rank& rank) {
  std::vector<int32_t> coord;
  const int cp = rank.mesh.cp, r = rank.mesh.cp_rank;
  const int32_t chunk = kLength / (2 * cp);
  for (const int c : {r, 2 * cp - 1 - r})
    for (int32_t i = 0; i < chunk; i++) coord.push_back(c * chunk + i);
  return coord;
}

Tensor local(
    Rank& rank, int batch, int tensor, const std::vector<int32_t>& coord, Dims dims, DType dtype) {
  Tensor t = empty(rank, dims, dtype);
  const int64_t S = coord.size(), width = t.numel() / (kRows * S);
  for (int64_t i = 0; i < t.numel(); i++) {
    const int64_t row = i / width / S, position = coord[i / width % S];
    const double v = value(batch, tensor, row, position, i % width);
    if (dtype == DType::F64)
      t.as<double>()[i] = v;
    else
      t.f32()[i] = static_cast<float>(v);
  }
  return t;
}

AttentionMask local_mask(Rank& rank, const RingCase& c, const std::vector<int32_t>& coord) {
  const int64_t S = coord.size();
  AttentionMask mask{c.causal, c.window, {}};
  if (!c.documents) return mask;
  mask.doc_ends = empty(rank, {kRows, S}, DType::I32);
  for (int64_t i = 0; i < kRows * S; i++)
    mask.doc_ends.i32()[i] = document_end(i / S, coord[i % S]);
  return mask;
}

// Everything that one batch's ranks compute: outputs and gradients of the packed and the general
// form, over whole rows.
struct Results {
  Whole tensors[6] = {
      Whole(kOut), Whole(kPacked), Whole(4 * 5), Whole(4 * 6), Whole(2 * 6), Whole(2 * 5)};
};

void run_packed(Rank& rank, const RingCase& c, int batch, DType dtype, Results& results) {
  const auto coord = coordinates(rank);
  const int64_t T = kRows * int64_t(coord.size());
  Tensor qkv = local(rank, batch, 0, coord, {T, kPacked}, dtype);
  make_leaf(rank, qkv);
  Tensor y = attention(rank, qkv, kHeads, kRows, local_mask(rank, c, coord));
  add_grad(rank, y, local(rank, batch, 1, coord, {T, kOut}, dtype));
  backward(rank, 0, rank.tape->size());
  results.tensors[0].put(y, coord);
  results.tensors[1].put(grad_of(*rank.tape, qkv), coord);
}

void run_general(Rank& rank, const RingCase& c, int batch, DType dtype, Results& results) {
  const auto coord = coordinates(rank);
  const int64_t S = coord.size();
  Tensor x[3] = {local(rank, batch, 2, coord, {kRows, S, 4, 6}, dtype),
      local(rank, batch, 3, coord, {kRows, S, 2, 6}, dtype),
      local(rank, batch, 4, coord, {kRows, S, 2, 5}, dtype)};
  for (Tensor& t : x) make_leaf(rank, t);
  Tensor y = attention(rank, x[0], x[1], x[2], 0.4, local_mask(rank, c, coord));
  add_grad(rank, y, local(rank, batch, 5, coord, {kRows, S, 4, 5}, dtype));
  backward(rank, 0, rank.tape->size());
  results.tensors[2].put(y, coord);
  for (int i = 0; i < 3; i++) results.tensors[3 + i].put(grad_of(*rank.tape, x[i]), coord);
}

const LaunchOptions kQuick{.startup_limit_s = 60, .limit_s = 60};

// The results of each of the mesh's batches.
std::vector<Results> run(const Mesh& mesh, const RingCase& c, DType dtype) {
  std::vector<Results> results(mesh.pp * mesh.dp * mesh.ep);
  run_ranks(mesh, Device::CPU, kQuick, [&](Rank& rank) {
    const MeshCoord& at = rank.mesh;
    const int batch = (at.pp_rank * at.dp + at.dp_rank) * at.ep + at.ep_rank;
    for (const auto form : {run_packed, run_general}) {
      Tape tape;
      rank.tape = &tape;
      form(rank, c, batch, dtype, results[batch]);
      rank.tape = nullptr;
    }
  });
  return results;
}

const char* const kNames[] = {"out", "dqkv", "general out", "dq", "dk", "dv"};

TEST(RingAttention, EveryMeshGivesTheSame) {
  const Mesh meshes[] = {{.cp = 2}, {.cp = 3}, {.cp = 4}, {.dp = 2, .cp = 2}, {.cp = 2, .ep = 3},
      {.pp = 2, .cp = 2, .ep = 2}};
  for (const DType dtype : {DType::F64, DType::F32})
    for (const RingCase& c : kCases) {
      const auto want = run({.dp = 4}, c, dtype);
      for (const Mesh& mesh : meshes) {
        const auto got = run(mesh, c, dtype);
        for (size_t batch = 0; batch < got.size(); batch++)
          for (int i = 0; i < 6; i++)
            EXPECT_LT(relative_error(got[batch].tensors[i].data, want[batch].tensors[i].data),
                dtype == DType::F64 ? 1e-12 : 1e-6)
                << text("%s of \"%s\", %s, pp %d dp %d cp %d ep %d, batch %zu", kNames[i], c.name,
                       name_of(dtype), mesh.pp, mesh.dp, mesh.cp, mesh.ep, batch);
      }
    }
}

TEST(RingAttention, RepeatsBitForBit) {
  for (const RingCase& c : kCases)
    for (const Mesh& mesh : {Mesh{.cp = 4}, Mesh{.cp = 3, .ep = 2}}) {
      const auto first = run(mesh, c, DType::F32), second = run(mesh, c, DType::F32);
      for (size_t batch = 0; batch < first.size(); batch++)
        for (int i = 0; i < 6; i++)
          EXPECT_EQ(first[batch].tensors[i].data, second[batch].tensors[i].data)
              << kNames[i] << " of " << c.name;
    }
}

// Changing a document that spans members leaves all others' outputs and gradients as they are.
TEST(RingAttention, DocumentsDoNotLeak) {
  auto outputs = [](int32_t changed) {  // the end of a document of row 0; 0: none
    Whole out(kOut), grad(kPacked);
    run_ranks({.cp = 3}, Device::CPU, kQuick, [&](Rank& rank) {
      Tape tape;
      rank.tape = &tape;
      const auto coord = coordinates(rank);
      const int64_t S = coord.size();
      Tensor qkv = local(rank, 0, 0, coord, {kRows * S, kPacked}, DType::F32);
      for (int64_t i = 0; i < S; i++)
        for (int64_t n = 0; n < kPacked && document_end(0, coord[i]) == changed; n++)
          qkv.f32()[i * kPacked + n] *= -20;
      make_leaf(rank, qkv);
      Tensor y = attention(rank, qkv, kHeads, kRows, local_mask(rank, kCases[5], coord));
      add_grad(rank, y, local(rank, 0, 1, coord, {kRows * S, kOut}, DType::F32));
      backward(rank, 0, tape.size());
      out.put(y, coord);
      grad.put(grad_of(tape, qkv), coord);
      rank.tape = nullptr;
    });
    return std::pair{out.data, grad.data};
  };
  const auto before = outputs(0);
  for (const int32_t changed : {6, 24, 48}) {
    const auto after = outputs(changed);
    for (int64_t i = 0; i < kRows * kLength; i++) {
      const bool same = std::equal(&before.first[i * kOut], &before.first[i * kOut] + kOut,
                            &after.first[i * kOut]) &&
                        std::equal(&before.second[i * kPacked],
                            &before.second[i * kPacked] + kPacked, &after.second[i * kPacked]);
      EXPECT_EQ(same, i >= kLength || document_end(0, i) != changed)
          << "position " << i << ", changed the document that ends at " << changed;
    }
  }
}

TEST(RingAttention, Empty) {
  for (const bool documents : {false, true})
    for (const int64_t batch : {0, 2})
      run_ranks({.cp = 2}, Device::CPU, kQuick, [&](Rank& rank) {
        Tape tape;
        rank.tape = &tape;
        Tensor qkv = zeros(rank, {0, kPacked}, DType::F32);
        make_leaf(rank, qkv);
        AttentionMask mask;
        if (documents) mask.doc_ends = empty(rank, {batch, 0}, DType::I32);
        Tensor y = attention(rank, qkv, kHeads, batch, mask);
        add_grad(rank, y, zeros(rank, y.dim, DType::F32));
        backward(rank, 0, tape.size());
        EXPECT_EQ(grad_of(tape, qkv).dim, qkv.dim);
        rank.tape = nullptr;
      });
}

TEST(RingAttention, NamesTheCaller) {
  expect_error(
      [] {
        run_ranks({.cp = 2}, Device::CPU, kQuick, [&](Rank& rank) {
          attention(rank, zeros(rank, {3, kPacked}, DType::F32), kHeads, 1, {}, {"model.cpp", 5});
        });
      },
      {"model.cpp:5: attention", "chunks r and 2*cp-1-r"});
  expect_error(
      [] {
        run_ranks({.cp = 2}, Device::CPU, kQuick, [&](Rank& rank) {
          Tensor q = zeros(rank, {1, 2, 1, 2}, DType::F32);
          attention(
              rank, q, q, q, 1, {}, {zeros(rank, {1, 1, 2, 2}, DType::F32), {}}, {"model.cpp", 6});
        });
      },
      {"model.cpp:6: attention", "no bias, no visible and S == Z where cp > 1"});
}

}  // namespace
}  // namespace pith
