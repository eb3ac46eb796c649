#include "engine/run_plan.h"

#include <algorithm>

namespace pith {

static DType compute_type(const RunConfig& config, Device device) {
  const string& precision = config.train.precision;
  if (device == Device::CPU && precision == "bf16")
    bad_input("train.precision", "the CPU computes in FP32 (got \"bf16\", need \"fp32\")",
              "train.precision = \"auto\"");
  return device == Device::CPU || precision == "fp32" ? DType::F32 : DType::BF16;
}

static void check_model(const RunPlan& plan) {
  const int64_t length = plan.config.data.sequence_length, most = plan.shape.max_positions;
  if (plan.shape.num_experts % plan.mesh.ep != 0)
    bad_input("parallel.ep",
              text("does not divide the experts (got ep = %d and %d experts, need a divisor)",
                   plan.mesh.ep, plan.shape.num_experts),
              "parallel.ep = 1");
  if (most > 0 && length > most)
    bad_input("data.sequence_length",
              text("is beyond the model's positions (got %ld, need at most "
                   "max_position_embeddings = %ld)",
                   length, most),
              "a shorter sequence, or a larger max_position_embeddings in config.json");
}

static BatchShape plan_batch(const RunConfig& config, const Mesh& mesh) {
  const BatchShape batch{config.train.global_batch_size, config.train.micro_batch_size, mesh.dp,
                         mesh.ep};
  const int64_t unit = batch.micro_batch * mesh.dp * mesh.ep;
  if (batch.global_batch % unit != 0)
    bad_input("train.global_batch_size",
              text("does not split into micro-batches over the mesh (got %ld sequences, need a "
                   "multiple of micro-batch %ld * dp %d * ep %d = %ld)",
                   batch.global_batch, batch.micro_batch, mesh.dp, mesh.ep, unit),
              std::to_string((batch.global_batch / unit + 1) * unit));
  return batch;
}

static ScheduleOptions plan_schedule(const RunPlan& plan) {
  const auto& parallel = plan.config.parallel;
  ScheduleOptions s;
  s.kind = schedule_kind(parallel.schedule, parallel.pp, parallel.ep);
  s.pp = parallel.pp;
  s.micro_batches = int(plan.batch.num_micro_batches());
  s.weight_grad_batch = parallel.weight_grad_batch;
  s.gather_step = parallel.gather == "step";
  const int least = min_micro_batches(s);
  const int64_t unit = plan.batch.global_batch / s.micro_batches;
  if (s.micro_batches < least)
    bad_input("train.global_batch_size",
              text("gives too few micro-batches for the schedule %s at pp = %d (got %ld sequences "
                   "/ (micro-batch %ld * dp %d * ep %d) = %d, need at least %d)",
                   name_of(s.kind), s.pp, plan.batch.global_batch, plan.batch.micro_batch,
                   plan.mesh.dp, plan.mesh.ep, s.micro_batches, least),
              text("train.global_batch_size = %ld, or parallel.schedule = \"1f1b\"", least * unit));
  return s;
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
    const int64_t all = p.dims.numel(), experts = plan.shape.num_experts;
    const int64_t used = p.unit == UnitKind::Experts ? all / experts * plan.shape.top_k : all;
    n.total += all;
    n.active += used;
    if (p.dims.rank > 1 && p.unit != UnitKind::Embedding) n.matmul += used;
  }
  return n;
}

double flops_per_token(const RunPlan& plan) {
  const ModelShape& s = plan.shape;
  const double attention = 3.0 * plan.config.data.sequence_length * s.attention_width;
  return 6.0 * parameter_counts(plan).matmul + attention * s.num_layers;
}

// The rank's tables, as make_pipeline() lays them out.
static Parameters rank_layout(const RunPlan& plan, int rank, const ParameterTable& whole,
                              const vector<ChunkLayers>& chunks) {
  ParameterTable table;
  vector<int> sizes;
  for (const ChunkLayers& c : chunks) {
    const size_t before = table.size();
    for (Parameter p : whole) {
      const bool edge = p.unit == UnitKind::Embedding ? c.prolog : c.epilog;
      const bool layer = p.layer >= c.first && p.layer < c.first + c.count;
      if (p.layer < 0 ? !edge : !layer) continue;
      if (p.unit == UnitKind::Experts) p.dims[0] = plan.shape.num_experts / plan.mesh.ep;
      table.push_back(std::move(p));
    }
    sizes.push_back(int(table.size() - before));
  }
  const auto place = [&](Group g) {
    const vector<int> members = group_members(plan.mesh, g, rank);
    const auto me = std::ranges::find(members, rank) - members.begin();
    return ShardPlace{int(members.size()), int(me)};
  };
  return layout_parameters(std::move(table), sizes, plan.pipeline.gather_layer,
                           place(Group::DenseShard), place(Group::ExpertShard));
}

vector<RankMemory> rank_memory(const RunPlan& plan) {
  const ModelShape& s = plan.shape;
  const ParameterTable whole = whole_table(plan.model);
  int64_t expert_width = 0;
  for (const Parameter& p : whole)
    if (p.unit == UnitKind::Experts && p.dims.rank == 3)
      expert_width = std::max(expert_width, std::min(p.dims[1], p.dims[2]));
  // What a token leaves on the tape in one layer.
  const int64_t attention = 5 * s.hidden + 3 * s.attention_width;
  const int64_t experts = s.top_k * (2 * s.hidden + 3 * expert_width) + 2 * s.num_experts;
  const int64_t tokens = plan.batch.micro_batch * plan.config.data.sequence_length / plan.mesh.cp;
  const int64_t value = size_of(plan.compute);
  const ScheduleCheck live = check_schedule(plan.schedule, make_schedules(plan.schedule));
  vector<RankMemory> ranks;
  for (int rank = 0; rank < plan.mesh.world(); rank++) {
    const vector<ChunkLayers> chunks = chunk_layers(
        plan.schedule.kind, plan.mesh.pp, coord_of(plan.mesh, rank).pp_rank, s.num_layers);
    int64_t layers = 0;
    for (const ChunkLayers& c : chunks) layers += c.count;
    const int64_t per_chunk =
        tokens * (attention + experts) * value * layers / int64_t(chunks.size());
    const ParameterBytes bytes =
        parameter_bytes(rank_layout(plan, rank, whole, chunks), plan.compute);
    ranks.push_back({.weights = bytes.master,
                     .compute_copy = bytes.weights,
                     .gradients = bytes.gradients,
                     .optimizer = bytes.moments,
                     .activations = per_chunk * live.peak_live,
                     .workspace = 4 * tokens * s.top_k * expert_width * value});
  }
  return ranks;
}

}  // namespace pith
