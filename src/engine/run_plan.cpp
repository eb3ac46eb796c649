#include "engine/run_plan.h"

#include <algorithm>

namespace pith {

[[noreturn]] static void refuse(const char* key, const std::string& what, const std::string& remedy) {
    bad_input(key, what, remedy);
}

static DType compute_type(const RunConfig& config, Device device) {
    const std::string& precision = config.train.precision;
    if (device == Device::CPU) {
        if (precision == "bf16")
            refuse("train.precision", "the CPU computes in FP32 (got \"bf16\", need \"fp32\")",
                   "train.precision = \"auto\"");
        return DType::F32;
    }
    return precision == "fp32" ? DType::F32 : DType::BF16;
}

static ScheduleOptions plan_schedule(const RunPlan& plan) {
    const auto& parallel = plan.config.parallel;
    ScheduleOptions s;
    s.kind = schedule_kind(parallel.schedule, parallel.pp, parallel.ep);
    s.pp = parallel.pp;
    s.micro_batches = static_cast<int>(plan.batch.num_micro_batches());
    s.gather_step = parallel.gather == "step";
    const int least = min_micro_batches(s);
    if (s.micro_batches < least) {
        const int64_t lanes = int64_t{plan.mesh.dp} * plan.mesh.ep;
        refuse("train.global_batch_size",
               text("gives too few micro-batches for the schedule %s at pp = %d (got %lld sequences "
                    "/ (micro-batch %lld * dp %d * ep %d) = %d, need at least %d)",
                    name_of(s.kind), s.pp, static_cast<long long>(plan.batch.global_batch),
                    static_cast<long long>(plan.batch.micro_batch), plan.mesh.dp, plan.mesh.ep,
                    s.micro_batches, least),
               text("train.global_batch_size = %lld, or parallel.schedule = \"1f1b\"",
                    static_cast<long long>(least * plan.batch.micro_batch * lanes)));
    }
    return s;
}

static BatchShape plan_batch(const RunConfig& config, const Mesh& mesh) {
    const BatchShape batch{config.train.global_batch_size, config.train.micro_batch_size, mesh.dp,
                           mesh.ep};
    const int64_t unit = batch.micro_batch * mesh.dp * mesh.ep;
    if (batch.global_batch % unit != 0)
        refuse("train.global_batch_size",
               text("does not split into micro-batches over the mesh (got %lld sequences, need a "
                    "multiple of micro-batch %lld * dp %d * ep %d = %lld)",
                    static_cast<long long>(batch.global_batch),
                    static_cast<long long>(batch.micro_batch), mesh.dp, mesh.ep,
                    static_cast<long long>(unit)),
               text("%lld", static_cast<long long>((batch.global_batch / unit + 1) * unit)));
    return batch;
}

static void check_model(const RunPlan& plan) {
    const int ep = plan.mesh.ep;
    const int64_t length = plan.config.data.sequence_length;
    if (plan.shape.num_experts % ep != 0)
        refuse("parallel.ep",
               text("does not divide the experts (got ep = %d and %d experts, need a divisor)", ep,
                    plan.shape.num_experts),
               "parallel.ep = 1");
    if (length % (2 * plan.mesh.cp) != 0 && plan.mesh.cp > 1)
        refuse("data.sequence_length",
               text("does not split into 2 * cp equal blocks (got %lld and cp = %d, need a multiple "
                    "of %d)",
                    static_cast<long long>(length), plan.mesh.cp, 2 * plan.mesh.cp),
               text("data.sequence_length = %lld",
                    static_cast<long long>((length / (2 * plan.mesh.cp) + 1) * 2 * plan.mesh.cp)));
    if (plan.shape.max_positions > 0 && length > plan.shape.max_positions)
        refuse("data.sequence_length",
               text("is beyond the model's positions (got %lld, need at most "
                    "max_position_embeddings = %lld)",
                    static_cast<long long>(length),
                    static_cast<long long>(plan.shape.max_positions)),
               "a shorter sequence, or a larger max_position_embeddings in config.json");
}

RunPlan plan_run(const RunConfig& config, Device device, int ranks) {
    validate(config);
    RunPlan plan;
    plan.config = config;
    plan.device = device;
    plan.compute = compute_type(config, device);
    plan.model = Json::parse_file(config.model.config);
    plan.shape = model_shape(plan.model);
    const auto& parallel = config.parallel;
    plan.mesh = make_mesh(ranks, parallel.pp, parallel.cp, parallel.ep, parallel.dp_replicate);
    check_model(plan);
    plan.batch = plan_batch(config, plan.mesh);
    plan.schedule = plan_schedule(plan);
    layer_partition(plan.shape.num_layers, stages_of(plan.schedule.kind, parallel.pp));
    plan.pipeline = {.schedule = plan.schedule.kind,
                     .gather_layer = parallel.gather == "layer",
                     .length = config.data.sequence_length,
                     .init_std = config.model.init_std};
    return plan;
}

DataOptions data_options(const RunPlan& plan) {
    const auto& data = plan.config.data;
    return {.seq_length = data.sequence_length,
            .vocab_size = plan.shape.vocab,
            .seed = data.seed,
            .shuffle = data.shuffle,
            .heldout_fraction = data.heldout_fraction,
            .max_epochs = data.max_epochs,
            .document_mask = data.document_mask};
}

ParameterCounts parameter_counts(const RunPlan& plan) {
    ParameterCounts n;
    for (const Parameter& p : whole_table(plan.model)) {
        const int64_t all = p.dims.numel();
        const int64_t used = p.unit == UnitKind::Experts
                                 ? all / plan.shape.num_experts * plan.shape.top_k
                                 : all;
        n.total += all;
        n.active += used;
        if (p.dims.rank > 1 && p.unit != UnitKind::Embedding) n.matmul += used;
    }
    return n;
}

double flops_per_token(const RunPlan& plan) {
    const double attention = 3.0 * static_cast<double>(plan.config.data.sequence_length) *
                             static_cast<double>(plan.shape.attention_width);
    return 6.0 * static_cast<double>(parameter_counts(plan).matmul) +
           attention * plan.shape.num_layers;
}

// Elements a token leaves on the tape in one layer, and the bytes of a chunk of logits.
static int64_t layer_elements(const RunPlan& plan, int64_t expert_width) {
    const ModelShape& s = plan.shape;
    const int64_t attention = 5 * s.hidden + 3 * s.attention_width;
    const int64_t experts = s.top_k * (2 * s.hidden + 3 * expert_width) + 2 * s.num_experts;
    return attention + experts;
}

// The rank's tables, as make_pipeline() lays them out.
static Parameters rank_layout(const RunPlan& plan, int rank, const ParameterTable& whole) {
    const MeshCoord at = coord_of(plan.mesh, rank);
    const int local = plan.shape.num_experts / plan.mesh.ep;
    ParameterTable table;
    std::vector<int> sizes;
    for (const ChunkLayers& c : chunk_layers(plan.schedule.kind, plan.mesh.pp, at.pp_rank,
                                             plan.shape.num_layers)) {
        const size_t before = table.size();
        for (Parameter p : whole) {
            const bool layer = p.layer >= c.first && p.layer < c.first + c.count;
            const bool edge = p.layer < 0 && (p.unit == UnitKind::Embedding ? c.prolog : c.epilog);
            if (!layer && !edge) continue;
            if (p.unit == UnitKind::Experts) p.dims[0] = local;
            table.push_back(std::move(p));
        }
        sizes.push_back(static_cast<int>(table.size() - before));
    }
    const auto place = [&](Group g) {
        const std::vector<int> members = group_members(plan.mesh, g, rank);
        const auto me = std::find(members.begin(), members.end(), rank) - members.begin();
        return ShardPlace{static_cast<int>(members.size()), static_cast<int>(me)};
    };
    return layout_parameters(std::move(table), sizes, plan.pipeline.gather_layer,
                             place(Group::DenseShard), place(Group::ExpertShard));
}

std::vector<RankMemory> rank_memory(const RunPlan& plan) {
    const ParameterTable whole = whole_table(plan.model);
    int64_t expert_width = 0;
    for (const Parameter& p : whole)
        if (p.unit == UnitKind::Experts && p.dims.rank == 3)
            expert_width = std::max(expert_width, std::min(p.dims[1], p.dims[2]));
    const int64_t tokens = plan.batch.micro_batch * plan.config.data.sequence_length / plan.mesh.cp;
    const ScheduleCheck live = check_schedule(plan.schedule, make_schedules(plan.schedule));
    const int64_t value = size_of(plan.compute);
    std::vector<RankMemory> ranks;
    for (int rank = 0; rank < plan.mesh.world(); rank++) {
        const Parameters layout = rank_layout(plan, rank, whole);
        const ParameterBytes bytes = parameter_bytes(layout, plan.compute);
        int64_t layers = 0, chunks = 0;
        for (const ChunkLayers& c : chunk_layers(plan.schedule.kind, plan.mesh.pp,
                                                 coord_of(plan.mesh, rank).pp_rank,
                                                 plan.shape.num_layers)) {
            layers += c.count;
            chunks++;
        }
        const int64_t in_flight = tokens * layer_elements(plan, expert_width) * value * layers /
                                  std::max<int64_t>(chunks, 1) * live.peak_live;
        const int64_t largest = tokens * plan.shape.top_k * expert_width * 2 * value;
        ranks.push_back({.weights = bytes.master,
                         .compute_copy = bytes.weights,
                         .gradients = bytes.gradients,
                         .optimizer = bytes.moments,
                         .activations = in_flight,
                         .workspace = 2 * largest});
    }
    return ranks;
}

}  // namespace pith
