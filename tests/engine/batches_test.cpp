#include "engine/batches.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <numeric>

#include "comm/launch.h"
#include "core/rng.h"

namespace pith {

namespace fs = std::filesystem;

namespace {

constexpr int64_t kLength = 24, kGlobal = 12;

// A file of documents of 1 to 30 tokens.
std::string put_corpus(const char* name) {
  const std::string folder = testing::TempDir() + "pith_" + name + "_" + std::to_string(getpid());
  fs::create_directories(folder);
  std::vector<uint16_t> ids;
  std::vector<uint64_t> ends;
  for (uint64_t doc = 0; doc < 120; doc++) {
    const auto length = static_cast<size_t>(1 + uniform_at(1, doc) * 30);
    for (size_t i = 0; i < length; i++)
      ids.push_back(static_cast<uint16_t>(uniform_at(2, ids.size()) * 5000));
    ends.push_back(ids.size());
  }
  const auto array = [](FileDType type, const auto& values) {
    const auto* data = reinterpret_cast<const char*>(values.data());
    return npy_header(type, {static_cast<int64_t>(values.size())})
        .append(data, values.size() * sizeof(values[0]));
  };
  write_file_durably(folder + "/a.bin", array(FileDType::U16, ids) + array(FileDType::U64, ends));
  return folder + "/a.bin";
}

// The global batch of a step, sequence after sequence.
struct GlobalBatch {
  explicit GlobalBatch(int32_t fill)
      : tokens(kGlobal * kLength, fill), labels(tokens), ends(tokens), positions(tokens) {}
  bool operator==(const GlobalBatch&) const = default;
  std::vector<int32_t> tokens, labels, ends, positions;
};

GlobalBatch expected_batch(const Dataset& data, int64_t step, Split split) {
  GlobalBatch all(-1);
  for (int64_t row = 0; row < kGlobal; row++) {
    const int64_t at = row * kLength, sample = step * kGlobal + row;
    const SampleRow view = {&all.tokens[at], &all.labels[at], &all.ends[at]};
    if (split == Split::Train)
      data.train_sample(sample, view);
    else
      data.heldout_sample(sample, view);
    positions_from_ends(&all.ends[at], kLength, &all.positions[at]);
  }
  return all;
}

// Writes what a rank loaded to its place in the global batch; returns how often a place was taken.
int64_t scatter(const LoadedBatches& loaded, bool mask, GlobalBatch& all) {
  int64_t again = 0;
  for (size_t mb = 0; mb < loaded.batches.size(); mb++) {
    const Batch& batch = loaded.batches[mb];
    const std::vector<int64_t>& index = loaded.token_index[mb];
    EXPECT_EQ(static_cast<int64_t>(index.size()), batch.rows * batch.length);
    EXPECT_EQ(batch.tokens.dim, Dims({batch.rows * batch.length}));
    EXPECT_EQ(batch.labels.dim, batch.tokens.dim);
    EXPECT_EQ(batch.positions.dim, batch.tokens.dim);
    EXPECT_EQ(batch.mask.doc_ends.defined(), mask);
    EXPECT_TRUE(batch.mask.causal);
    EXPECT_EQ(batch.mask.window, 0);
    for (size_t i = 0; i < index.size(); i++) {
      const int64_t at = index[i];
      again += all.tokens[at] != -1;
      all.tokens[at] = batch.tokens.i32()[i];
      all.labels[at] = batch.labels.i32()[i];
      all.positions[at] = batch.positions.i32()[i];
      all.ends[at] = mask ? batch.mask.doc_ends.i32()[i] : static_cast<int32_t>(kLength);
    }
    if (mask) {
      EXPECT_EQ(batch.mask.doc_ends.dim, Dims({batch.rows, batch.length}));
    }
  }
  return again;
}

}  // namespace

// Ranks of one pipeline coordinate together hold the global batch, each token once, on every mesh.
TEST(Batches, RanksTogetherHoldTheGlobalBatch) {
  const std::string path = put_corpus("batches");
  const struct {
    Mesh mesh;
    int64_t micro;
  } cases[] = {
      {{1, 1, 1, 1}, 1},
      {{1, 1, 1, 1}, 4},
      {{1, 2, 1, 1}, 3},
      {{1, 1, 2, 1}, 2},
      {{1, 1, 1, 2}, 1},
      {{2, 1, 1, 1}, 2},
      {{1, 3, 2, 2}, 1},
      {{2, 2, 2, 2}, 3},
      {{1, 1, 4, 3}, 2},
      {{1, 2, 3, 1}, 2},
      {{1, 12, 1, 1}, 1},
      {{2, 2, 1, 3, 2}, 1},
  };
  for (const bool mask : {false, true})
    for (const Split split : {Split::Train, Split::Heldout}) {
      const Dataset data({path}, {.seq_length = kLength,
                                     .vocab_size = 5000,
                                     .seed = 3,
                                     .heldout_fraction = 0.4,
                                     .max_epochs = 2,
                                     .document_mask = mask});
      // A step inside the first epoch, or the held-out batch that is partly padding.
      const int64_t step = split == Split::Train ? 1 : data.heldout_samples() / kGlobal;
      ASSERT_GE(data.samples_per_epoch(), 2 * kGlobal);
      ASSERT_NE(data.heldout_samples() % kGlobal, 0);
      const GlobalBatch want = expected_batch(data, step, split);
      int64_t labels = 0;
      for (const int32_t label : want.labels) labels += label != kIgnoreLabel;
      ASSERT_GT(labels, 0);
      for (const auto& c : cases) {
        std::vector<GlobalBatch> seen(c.mesh.pp, GlobalBatch(-1));
        std::vector<int64_t> rank_labels(c.mesh.world()), again(c.mesh.world());
        const BatchShape shape{kGlobal, c.micro, c.mesh.dp, c.mesh.ep};
        run_ranks(c.mesh, Device::CPU, {}, [&](Rank& rank) {
          const LoadedBatches loaded = make_batches(rank, data, shape, step, split);
          EXPECT_EQ(static_cast<int64_t>(loaded.batches.size()), shape.num_micro_batches());
          again[rank.id] = scatter(loaded, mask, seen[rank.mesh.pp_rank]);
          rank_labels[rank.id] = loaded.labels;
          EXPECT_EQ(loaded.global_labels(rank), static_cast<double>(labels));
        });
        const std::string what = text("pp %d dp %d cp %d ep %d micro %lld", c.mesh.pp, c.mesh.dp,
            c.mesh.cp, c.mesh.ep, static_cast<long long>(c.micro));
        for (const GlobalBatch& all : seen) EXPECT_TRUE(all == want) << what;
        EXPECT_EQ(std::accumulate(again.begin(), again.end(), int64_t{0}), 0) << what;
        EXPECT_EQ(
            std::accumulate(rank_labels.begin(), rank_labels.end(), int64_t{0}), labels * c.mesh.pp)
            << what;
      }
    }
}

TEST(Batches, RefusesWhatDoesNotFit) {
  const Dataset data({put_corpus("no_batches")}, {.seq_length = 10, .vocab_size = 5000});
  const auto error_on = [&](const Mesh& mesh, const BatchShape& shape) -> std::string {
    try {
      run_ranks(mesh, Device::CPU, {},
          [&](Rank& rank) { make_batches(rank, data, shape, 0, Split::Train); });
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  EXPECT_EQ(error_on({}, {4, 1, 1, 1}), "no error");
  EXPECT_NE(error_on({1, 1, 2, 1}, {4, 1, 1, 1}).find("data.sequence_length"), std::string::npos);
}

}  // namespace pith
