#include "engine/batches.h"

#include <numeric>

#include "comm/communicator.h"

namespace pith {

double LoadedBatches::global_labels(Rank& rank) const {
    double sum = static_cast<double>(labels);
    all_reduce(rank, Group::DpCpEp, &sum, 1, Reduce::Sum, "all_reduce labels");
    return sum;
}

namespace {

// A whole sequence, before cp takes its blocks.
struct Sequence {
    explicit Sequence(int64_t length)
        : tokens(length), labels(length), ends(length), positions(length), order(length) {
        std::iota(order.begin(), order.end(), 0);
    }
    SampleRow row() { return {tokens.data(), labels.data(), ends.data()}; }
    std::vector<int32_t> tokens, labels, ends, positions, order;
};

// Host copies of one micro-batch: rows of local tokens, one after the other.
struct Local {
    explicit Local(int64_t n) : tokens(n), labels(n), ends(n), positions(n) {}
    std::vector<int32_t> tokens, labels, ends, positions;
};

}  // namespace

LoadedBatches make_batches(Rank& rank, const Dataset& data, const BatchShape& shape, int64_t step,
                           Split split) {
    const MeshCoord& mesh = rank.mesh;
    if (shape.dp != mesh.dp || shape.ep != mesh.ep)
        failed("make_batches", text("shape of dp %d, ep %d on a mesh of %d, %d", shape.dp, shape.ep,
                                    mesh.dp, mesh.ep));
    const int64_t length = data.options().seq_length, rows = shape.micro_batch;
    const ZigzagBlocks blocks = zigzag_blocks(length, mesh.cp, mesh.cp_rank);
    const int64_t local = blocks.total();
    Sequence whole(length);
    std::vector<int32_t> order(local);
    take_zigzag(whole.order.data(), blocks, order.data());
    LoadedBatches loaded;
    for (int64_t mb = 0; mb < shape.num_micro_batches(); mb++) {
        Local here(rows * local);
        std::vector<int64_t>& index = loaded.token_index.emplace_back();
        for (int64_t row = 0; row < rows; row++) {
            const int64_t in_rank = mb * rows + row, at = row * local;
            const int64_t sample = global_sample(shape, step, mesh.dp_rank, mesh.ep_rank, in_rank);
            if (split == Split::Train)
                data.train_sample(sample, whole.row());
            else
                data.heldout_sample(sample, whole.row());
            positions_from_ends(whole.ends.data(), length, whole.positions.data());
            take_zigzag(whole.tokens.data(), blocks, &here.tokens[at]);
            take_zigzag(whole.labels.data(), blocks, &here.labels[at]);
            take_zigzag(whole.ends.data(), blocks, &here.ends[at]);
            take_zigzag(whole.positions.data(), blocks, &here.positions[at]);
            const int64_t first = (sample - step * shape.global_batch) * length;
            for (const int32_t coordinate : order) index.push_back(first + coordinate);
        }
        for (const int32_t label : here.labels) loaded.labels += label != kIgnoreLabel;
        Batch& batch = loaded.batches.emplace_back();
        batch.rows = rows;
        batch.length = local;
        const Dims flat = {rows * local};
        batch.tokens = tensor_from(rank, flat, DType::I32, here.tokens.data());
        batch.labels = tensor_from(rank, flat, DType::I32, here.labels.data());
        batch.positions = tensor_from(rank, flat, DType::I32, here.positions.data());
        if (mesh.cp > 1) batch.mask.order = tensor_from(rank, {local}, DType::I32, order.data());
        if (data.options().document_mask)
            batch.mask.doc_ends = tensor_from(rank, {rows, local}, DType::I32, here.ends.data());
    }
    return loaded;
}

}  // namespace pith
