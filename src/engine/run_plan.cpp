#include "engine/run_plan.h"

#include <algorithm>

namespace pith {

RunPlan plan_run(const RunConfig& config, Device device, int ranks) {
  validate(config);
  RunPlan plan{.config = config, .model = Json::parse_file(config.model.config), .device = device};
  bool gpu = device == Device::CUDA;
  if (!gpu && config.train.precision == "bf16")
    bad_input(
        "train.precision", "is bf16 on the CPU, which computes in fp32", "fp32, or --device cuda");
  if (gpu && config.train.precision != "fp32") plan.compute = DType::BF16;
  if (gpu && ranks > 1)
    bad_input("--ranks", text("one rank alone is on a GPU as yet (got %d)", ranks), "--device cpu");
  const Instance whole = make_instance(plan.model);
  const ModelShape& shape = plan.shape = whole.shape;
  for (const Parameter& p : whole.parameters->table) {
    i64 n = p.dims.numel();
    plan.parameters += n;
    i64 active = p.unit == UnitKind::Experts ? n / shape.num_experts * shape.top_k : n;
    plan.active_parameters += active;
    if (p.dims.rank > 1 && p.unit != UnitKind::Embedding) plan.flops_per_token += 6.0 * active;
  }
  i64 length = config.data.sequence_length;
  plan.flops_per_token += 3.0 * length * shape.attention_width * shape.num_layers;
  const auto& parallel = config.parallel;
  const Mesh& mesh = plan.mesh =
      make_mesh(ranks, parallel.pp, parallel.cp, parallel.ep, parallel.dp_replicate);
  if (shape.num_experts % mesh.ep != 0)
    bad_input("parallel.ep",
        text("does not divide the experts (got ep = %d and %d experts, need a divisor)", mesh.ep,
            shape.num_experts),
        "parallel.ep = 1");
  if (shape.max_positions > 0 && length > shape.max_positions)
    bad_input("data.sequence_length",
        text("is beyond the model's positions (got %ld, need at most "
             "max_position_embeddings = %ld)",
            length, shape.max_positions),
        "a shorter sequence");
  const BatchShape& batch = plan.batch = {
      config.train.global_batch_size, config.train.micro_batch_size, mesh.dp, mesh.ep};
  i64 unit = batch.micro_batch * mesh.dp * mesh.ep;
  if (batch.global_batch % unit != 0)
    bad_input("train.global_batch_size",
        text("does not split into micro-batches over the mesh (got %ld sequences, need a "
             "multiple of micro-batch %ld * dp %d * ep %d = %ld)",
            batch.global_batch, batch.micro_batch, mesh.dp, mesh.ep, unit),
        std::to_string((batch.global_batch / unit + 1) * unit));
  ScheduleOptions& schedule = plan.schedule = {
      .kind = schedule_kind(parallel.schedule, parallel.pp, parallel.ep),
      .pp = parallel.pp,
      .micro_batches = int(batch.num_micro_batches()),
      .weight_grad_batch = parallel.weight_grad_batch,
      .gather_step = parallel.gather == "step",
  };
  int least = min_micro_batches(schedule);
  if (schedule.micro_batches < least)
    bad_input("train.global_batch_size",
        text("gives too few micro-batches for the schedule %s at pp = %d (got %ld / %ld = %d, "
             "need at least %d)",
            name_of(schedule.kind), schedule.pp, batch.global_batch, unit, schedule.micro_batches,
            least),
        text("train.global_batch_size = %ld, or parallel.schedule = \"1f1b\"", least * unit));
  layer_partition(shape.num_layers, stages_of(schedule.kind, schedule.pp));
  plan.pipeline = {schedule.kind, !schedule.gather_step, length, config.model.init_std};
  return plan;
}

Dataset open_data(const RunPlan& plan) {
  const auto& data = plan.config.data;
  const DataOptions options{
      .seq_length = data.sequence_length,
      .vocab_size = plan.shape.vocab,
      .seed = data.seed,
      .shuffle = data.shuffle,
      .heldout_fraction = data.heldout_fraction,
      .max_epochs = data.max_epochs,
      .document_mask = data.document_mask,
  };
  return Dataset(find_token_files(data.path), options);
}

vector<RankMemory> rank_memory(const RunPlan& plan) {
  const ModelShape& s = plan.shape;
  i64 tokens = plan.batch.micro_batch * plan.config.data.sequence_length / plan.mesh.cp;
  int live = check_schedule(plan.schedule, make_schedules(plan.schedule)).peak_live;
  vector<RankMemory> ranks;
  for (int rank = 0; rank < plan.mesh.world(); rank++) {
    PipelineOptions options = plan.pipeline;
    options.mesh = plan.mesh;
    options.id = rank;
    const Instance instance = make_instance(plan.model, options);
    RankMemory& bytes = ranks.emplace_back();
    i64 full = 0, largest = 0;  // elements of gathered units
    i64 layers = 0, widths = 0;
    for (const FlatUnit& unit : instance.parameters->units) {
      bool whole = unit.cuts.size() == 1;
      bytes.weights += 4 * unit.shard_count;
      bytes.gradients += 4 * unit.shard_count;
      bytes.optimizer += 8 * unit.shard_count;
      if (!whole) full += unit.numel;
      if (!whole) largest = max(largest, unit.numel);
      layers += unit.kind == UnitKind::Layer;
      if (unit.kind == UnitKind::Experts)
        widths = unit.numel / (s.num_experts / plan.mesh.ep) / s.hidden;
    }
    // At most two units' full buffers.
    bytes.compute_copy = 4 * (plan.pipeline.gather_layer ? 2 * largest : full);
    bytes.gradients += bytes.compute_copy;
    // What a token leaves on the tape in one layer.
    i64 values = 5 * s.hidden + 3 * s.attention_width + 2 * s.num_experts +
                 s.top_k * (2 * s.hidden + widths);
    bytes.activations = 4 * tokens * values * layers * live / chunks_of(plan.schedule.kind);
    bytes.workspace = 4 * 2 * tokens * s.top_k * widths;
  }
  return ranks;
}

}
