#include "engine/batches.h"

#include <numeric>

#include "comm/communicator.h"

namespace pith {

double LoadedBatches::global_labels(Rank& rank) const {
  double sum = double(labels);
  all_reduce(rank, Group::DpCpEp, &sum, 1, Reduce::Sum, "all_reduce labels");
  return sum;
}

// Host copies: a whole sequence, or a micro-batch of this rank, row after row.
struct Columns {
  explicit Columns(int64_t n) : tokens(n), labels(n), ends(n), positions(n) {}
  vector<int32_t> tokens, labels, ends, positions;
};

LoadedBatches make_batches(Rank& rank, const Dataset& data, const BatchShape& shape, int64_t step,
                           Split split) {
  const MeshCoord& mesh = rank.mesh;
  if (shape.dp != mesh.dp || shape.ep != mesh.ep)
    failed("make_batches",
           text("shape of dp %d, ep %d on a mesh of %d, %d", shape.dp, shape.ep, mesh.dp, mesh.ep));
  const int64_t length = data.options().seq_length, rows = shape.micro_batch;
  const ZigzagBlocks blocks = zigzag_blocks(length, mesh.cp, mesh.cp_rank);
  const int64_t local = blocks.total();
  Columns whole(length);
  vector<int32_t> order(local);  // of the local tokens, their places in the sequence
  std::iota(whole.positions.begin(), whole.positions.end(), 0);
  take_zigzag(whole.positions.data(), blocks, order.data());
  LoadedBatches loaded;
  for (int64_t mb = 0; mb < shape.num_micro_batches(); mb++) {
    Columns here(rows * local);
    vector<int64_t>& index = loaded.token_index.emplace_back();
    for (int64_t row = 0; row < rows; row++) {
      const int64_t sample =
          global_sample(shape, step, mesh.dp_rank, mesh.ep_rank, mb * rows + row);
      const SampleRow view{whole.tokens.data(), whole.labels.data(), whole.ends.data()};
      if (split == Split::Train)
        data.train_sample(sample, view);
      else
        data.heldout_sample(sample, view);
      positions_from_ends(whole.ends.data(), length, whole.positions.data());
      for (auto column : {&Columns::tokens, &Columns::labels, &Columns::ends, &Columns::positions})
        take_zigzag((whole.*column).data(), blocks, &(here.*column)[row * local]);
      const int64_t first = (sample - step * shape.global_batch) * length;
      for (const int32_t place : order) index.push_back(first + place);
    }
    for (const int32_t label : here.labels) loaded.labels += label != kIgnoreLabel;
    Batch& batch = loaded.batches.emplace_back();
    batch.rows = rows;
    batch.length = local;
    const auto upload = [&](Dims dims, const vector<int32_t>& values) {
      return tensor_from(rank, dims, DType::I32, values.data());
    };
    batch.tokens = upload({rows * local}, here.tokens);
    batch.labels = upload({rows * local}, here.labels);
    batch.positions = upload({rows * local}, here.positions);
    if (data.options().document_mask) batch.mask.doc_ends = upload({rows, local}, here.ends);
  }
  return loaded;
}

}  // namespace pith
