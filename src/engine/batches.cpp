#include "engine/batches.h"

#include <numeric>

#include "comm/communicator.h"

namespace pith {

double LoadedBatches::global_labels(Rank& rank) const {
  double sum = double(labels);
  all_reduce(rank, Group::DpCpEp, &sum, 1, Reduce::Sum, "all_reduce labels");
  return sum;
}

LoadedBatches make_batches(
    Rank& rank, const Dataset& data, BatchShape shape, i64 step, Split split) {
  const MeshCoord& mesh = rank.mesh;
  shape.dp = mesh.dp;
  shape.ep = mesh.ep;
  i64 length = data.options().seq_length, rows = shape.micro_batch;
  const ZigzagBlocks blocks = zigzag_blocks(length, mesh.cp, mesh.cp_rank);
  i64 local = blocks.total();
  enum { Tokens, Labels, Ends, Positions, Places, kColumns };
  vector<int> row[kColumns], here[kColumns];
  for (int c = 0; c < kColumns; c++) {
    row[c].resize(length);
    here[c].resize(rows * local);
  }
  std::iota(row[Places].begin(), row[Places].end(), 0);
  LoadedBatches loaded;
  for (i64 mb = 0; mb < shape.num_micro_batches(); mb++) {
    vector<i64>& index = loaded.token_index.emplace_back();
    for (i64 r = 0; r < rows; r++) {
      i64 sample = global_sample(shape, step, mesh.dp_rank, mesh.ep_rank, mb * rows + r);
      const SampleRow view{row[Tokens].data(), row[Labels].data(), row[Ends].data()};
      if (split == Split::Train)
        data.train_sample(sample, view);
      else
        data.heldout_sample(sample, view);
      positions_from_ends(row[Ends].data(), length, row[Positions].data());
      for (int c = 0; c < kColumns; c++) take_zigzag(row[c].data(), blocks, &here[c][r * local]);
      i64 first = (sample - step * shape.global_batch) * length;
      for (i64 i = r * local; i < (r + 1) * local; i++) index.push_back(first + here[Places][i]);
    }
    for (const int label : here[Labels]) loaded.labels += label != kIgnoreLabel;
    auto upload = [&](int column, Dims dims) {
      return tensor_from(rank, dims, DType::I32, here[column].data());
    };
    Batch batch{.rows = rows, .length = local};
    batch.tokens = upload(Tokens, {rows * local});
    batch.labels = upload(Labels, {rows * local});
    batch.positions = upload(Positions, {rows * local});
    if (data.options().document_mask) batch.mask.doc_ends = upload(Ends, {rows, local});
    loaded.batches.push_back(std::move(batch));
  }
  return loaded;
}

}
