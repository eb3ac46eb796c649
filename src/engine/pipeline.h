// pipeline: the one executor of action lists, for every layout down to one rank.
//
// Include it in engine/pipeline_<model>.cpp only, its one instantiation for that model; everything
// else goes through engine/instance.h.
// defines: Flight, Pipeline, make_pipeline, whole_table_of, run_actions
#pragma once
#include <map>

#include "comm/communicator.h"
#include "engine/expert_parallel.h"
#include "engine/instance.h"
#include "engine/routing_trace.h"

namespace pith {

// Nodes [begin, end) of a tape.
struct TapeRange {
  int begin = 0, end = 0;
};

// One micro-batch in one chunk, from the start of its forward to its last weight gradient.
struct Flight {
  struct Layer {
    MoeInput in;
    Dispatch dispatch;
    Tensor rows;  // what stage 3 made, then what stage 4 brought home
    TapeRange attention, dispatched, experts, combined, residual;
  };
  Tape tape;
  Tensor input;        // leaf; undefined in the first stage
  Tensor x;            // running value: [T, D]
  Tensor output_grad;  // received, or left by the chunk after this one on the same rank
  Tensor input_grad;   // result of the backward; to be sent
  vector<Layer> layers;
  TapeRange prolog, epilog;
};

template <Model M>
struct Pipeline {
  typename M::Config config;
  ModelShape shape;
  PipelineOptions options;
  vector<M> chunks;               // the stages this rank holds
  vector<ChunkLayers> layers_of;  // what each chunk holds
  Parameters parameters;
  std::map<std::pair<int, int>, Flight> flights;  // by (chunk, micro-batch)
};

template <Model M>
void make_pipeline(Rank& rank, Pipeline<M>& p, const Json& json, const PipelineOptions& options) {
  p.config = M::read_config(json);
  p.shape = M::shape(p.config);
  p.options = options;
  p.layers_of = chunk_layers(options.schedule, rank.mesh.pp, rank.mesh.pp_rank, p.shape.num_layers);
  p.chunks.resize(p.layers_of.size());
  ParameterTable table;
  vector<int> sizes;
  const int local = p.shape.num_experts / rank.mesh.ep;
  for (size_t i = 0; i < p.chunks.size(); i++) {
    const ChunkLayers& c = p.layers_of[i];
    const StagePart part{c.first, c.count, c.prolog, c.epilog, rank.mesh.ep_rank * local, local};
    ParameterTable own = p.chunks[i].parameters(p.config, part, options.init_std);
    sizes.push_back(int(own.size()));
    table.insert(table.end(), own.begin(), own.end());
    p.chunks[i].prepare(rank, p.config, options.length);
  }
  p.parameters = make_parameters(rank, std::move(table), sizes, options.gather_layer);
}

// Every tensor of the whole model, without targets.
template <Model M>
ParameterTable whole_table_of(const Json& json, double init_std) {
  const typename M::Config config = M::read_config(json);
  const ModelShape shape = M::shape(config);
  M model;
  ParameterTable table =
      model.parameters(config, {0, shape.num_layers, true, true, 0, shape.num_experts}, init_std);
  for (Parameter& p : table) p.target = nullptr;
  return table;
}

// ---- Steps ------------------------------------------------------------------------------------

// Null for the experts of a dense layer.
template <Model M>
FlatUnit* unit_of(Pipeline<M>& p, const Step& s) {
  for (FlatUnit& unit : p.parameters.units)
    if (unit.chunk == s.chunk && unit.kind == s.unit && unit.layer == s.layer) return &unit;
  return nullptr;
}

// One step of a forward; records the nodes it pushes as the step's range.
template <Model M>
void forward_step(Rank& rank, Pipeline<M>& p, StepIo& io, const Step& s, Flight& f) {
  const M& model = p.chunks[s.chunk];
  const Batch& batch = io.batches[s.mb];
  const int local = s.layer - p.layers_of[s.chunk].first;
  TapeRange range{f.tape.size(), 0};
  if (s.part == Part::Prolog) {
    f.x = model.embed(rank, batch);
    f.prolog = {range.begin, f.tape.size()};
    return;
  }
  if (s.part == Part::Epilog) {
    if (io.want_logits) io.logits[s.mb] = model.logits(rank, p.config, f.x);
    Tensor loss = model.loss(rank, p.config, f.x, batch, io.loss_scale);
    io.loss[s.mb] = loss.dtype == DType::F64 ? loss.as<double>()[0] : loss.f32()[0];
    add_grad(rank, loss, loss);  // terminal: its own gradient only says that it is wanted
    f.epilog = {range.begin, f.tape.size()};
    return;
  }
  Flight::Layer& l = f.layers[local];
  const typename M::Layer& w = model.layers[local];
  switch (s.part) {
    case Part::Attention: {
      RouterOptions options;
      options.force_balanced = io.force_balanced;
      if (io.routing) options.forced_ids = forced_ids(rank, *io.routing, s.layer, s.mb);
      l.in = model.attend(rank, p.config, w, f.x, batch, options);
      if (io.routing) trace_routing(*io.routing, s.layer, s.mb, l.in.routing);
      if (io.balance && l.in.routing.ids.defined())
        add_balance_loss(rank, *io.balance, s.layer, l.in.routing, batch.rows);
      l.attention = {range.begin, f.tape.size()};
      break;
    }
    case Part::Dispatch:  // a dense layer has no stages 2 to 4
      if (!l.in.routing.ids.defined()) break;
      l.dispatch = dispatch(rank, l.in.hidden, l.in.routing, p.shape.num_experts);
      l.in.hidden = {};
      l.dispatched = {range.begin, f.tape.size()};
      break;
    case Part::Experts:
      if (!l.in.routing.ids.defined()) break;
      l.rows = model.experts(rank, p.config, w, l.dispatch.at_experts);
      l.dispatch.at_experts = {};
      l.experts = {range.begin, f.tape.size()};
      break;
    case Part::Combine:
      if (!l.in.routing.ids.defined()) break;
      l.rows = combine(rank, l.rows, l.dispatch);
      l.combined = {range.begin, f.tape.size()};
      break;
    case Part::Residual:
      f.x = model.finish(rank, p.config, w, l.rows, l.in);
      l.rows = {};
      l.in = {};
      l.dispatch = {};
      l.residual = {range.begin, f.tape.size()};
      break;
    default: failed("pipeline", "a step that is not a forward part");
  }
}

inline TapeRange range_of(const Flight& f, const Step& s, int local) {
  switch (s.part) {
    case Part::Prolog: return f.prolog;
    case Part::Epilog: return f.epilog;
    case Part::Attention: return f.layers[local].attention;
    case Part::Dispatch: return f.layers[local].dispatched;
    case Part::Experts: return f.layers[local].experts;
    case Part::Combine: return f.layers[local].combined;
    case Part::Residual: return f.layers[local].residual;
    default: failed("pipeline", "a step that has no nodes");
  }
}

// Weight gradients of one unit of one micro-batch.
inline void unit_weight_grads(Rank& rank, Flight& f, UnitKind unit, int local) {
  const auto run = [&](TapeRange r) { weight_grads(rank, f.tape, r.begin, r.end); };
  switch (unit) {
    case UnitKind::Embedding: return run(f.prolog);
    case UnitKind::Head: return run(f.epilog);
    case UnitKind::Experts: return run(f.layers[local].experts);
    case UnitKind::Layer: run(f.layers[local].residual); return run(f.layers[local].attention);
  }
}

template <Model M>
void run_one_step(Rank& rank, Pipeline<M>& p, StepIo& io, const Step& s) {
  const int local = s.layer - p.layers_of[s.chunk].first;
  rank.status->layer = s.layer;
  rank.status->stage = int(s.part);
  rank.status->micro_batch = s.mb;
  rank.status->chunk = s.chunk;
  FlatUnit* unit = unit_of(p, s);
  switch (s.part) {
    case Part::Gather:
      if (unit) gather(rank, p.parameters, *unit, s.backward);
      return;
    case Part::Release:
      if (unit) release_unit(p.parameters, *unit);
      return;
    case Part::Reduce:
      if (unit) reduce(rank, p.parameters, *unit);
      return;
    case Part::Weights:
      for (int mb = s.mb; mb < s.mb + s.count; mb++)
        unit_weight_grads(rank, p.flights.at({s.chunk, mb}), s.unit, local);
      return;
    default: break;
  }
  Flight& f = p.flights.at({s.chunk, s.mb});
  rank.tape = io.forward_only ? nullptr : &f.tape;
  if (s.backward) {
    const TapeRange r = range_of(f, s, local);
    backward(rank, r.begin, r.end, true);
  } else {
    forward_step(rank, p, io, s, f);
  }
  rank.tape = nullptr;
}

// ---- Actions ----------------------------------------------------------------------------------

// A chunk's input: received, or, where the next stage is on this rank too, the other chunk's
// output.
template <Model M>
void begin_forward(Rank& rank, Pipeline<M>& p, const StepIo& io, int chunk, int mb) {
  Flight& f = p.flights[{chunk, mb}];
  f.layers.resize(p.layers_of[chunk].count);
  if (p.layers_of[chunk].prolog) return;
  if (!f.input.defined()) {
    f.input = p.flights.at({1 - chunk, mb}).x;
    if (io.forward_only) p.flights.erase({1 - chunk, mb});
  }
  f.input.var = -1;
  rank.tape = &f.tape;
  if (!io.forward_only) make_leaf(rank, f.input);
  rank.tape = nullptr;
  f.x = f.input;
}

template <Model M>
void begin_backward(Rank& rank, Pipeline<M>& p, int chunk, int mb) {
  Flight& f = p.flights.at({chunk, mb});
  if (p.layers_of[chunk].epilog) return;
  rank.tape = &f.tape;
  add_grad(rank, f.x, f.output_grad);
  rank.tape = nullptr;
  f.output_grad = {};
  f.x = {};
}

// Hands the input's gradient on and frees what the backward no longer needs.
template <Model M>
void end_backward(const Rank& rank, Pipeline<M>& p, int chunk, int mb) {
  Flight& f = p.flights.at({chunk, mb});
  f.x = {};
  if (p.layers_of[chunk].prolog) return;
  f.input_grad = grad_of(f.tape, f.input);
  f.tape.grads[f.input.var] = {};
  f.input = {};
  const ScheduleKind kind = p.options.schedule;
  const int stage = stage_of(kind, rank.mesh.pp, rank.mesh.pp_rank, chunk);
  if (chunk != 1 || rank_of_stage(kind, rank.mesh.pp, stage - 1) != rank.mesh.pp_rank) return;
  p.flights.at({0, mb}).output_grad = std::move(f.input_grad);
}

template <Model M>
void send_and_receive(Rank& rank, Pipeline<M>& p, const StepIo& io, const ActionList& actions,
                      size_t begin, size_t end, const ScheduleOptions& schedule) {
  vector<Transfer> list;
  for (size_t i = begin; i < end; i++) {
    const Action& a = actions[i];
    Flight& f = p.flights[{a.chunk, a.mb}];
    const bool activation = a.payload == Payload::Activation;
    Tensor& t = a.what == Do::Send ? (activation ? f.x : f.input_grad)
                                   : (activation ? f.input : f.output_grad);
    if (a.what == Do::Recv)
      t = empty(rank, {io.batches[a.mb].tokens.numel(), p.shape.hidden}, rank.compute);
    list.push_back({a.what == Do::Send ? Transfer::Send : Transfer::Recv,
                    a.peer,
                    t,
                    {int(a.payload), message_stage(schedule, rank.mesh.pp_rank, a), a.mb}});
  }
  send_recv(rank, Group::Pp, list.data(), int(list.size()), "pipeline transfer");
  for (size_t i = begin; i < end; i++) {
    const Action& a = actions[i];
    if (a.what != Do::Send) continue;
    Flight& f = p.flights.at({a.chunk, a.mb});
    if (a.payload == Payload::Gradient)
      f.input_grad = {};
    else if (io.forward_only)
      p.flights.erase({a.chunk, a.mb});
    else
      f.x = f.x.meta();
  }
}

template <Model M>
void run_compute(Rank& rank, Pipeline<M>& p, StepIo& io, const Action& a) {
  const bool has_f = a.what == Do::F || a.what == Do::FB;
  const bool has_b = a.what == Do::B || a.what == Do::FB;
  const int b_chunk = a.what == Do::FB ? a.chunk2 : a.chunk;
  const int b_mb = a.what == Do::FB ? a.mb2 : a.mb;
  if (has_f) begin_forward(rank, p, io, a.chunk, a.mb);
  if (has_b) begin_backward(rank, p, b_chunk, b_mb);
  for (const Step& s : steps_of(a, p.layers_of, io.forward_only, p.options.gather_layer))
    run_one_step(rank, p, io, s);
  if (has_f && io.forward_only && p.layers_of[a.chunk].epilog) p.flights.erase({a.chunk, a.mb});
  if (has_b) end_backward(rank, p, b_chunk, b_mb);
  if (has_b && !a.defer) {  // what is left of the flight waits to be sent
    Flight& f = p.flights.at({b_chunk, b_mb});
    f.tape.clear();
    f.layers.clear();
  }
  if (a.what == Do::W)
    for (int mb = a.mb; mb < a.mb + a.count; mb++) p.flights.erase({a.chunk, mb});
}

template <Model M>
void run_actions(Rank& rank, Pipeline<M>& p, StepIo& io, const ScheduleOptions& schedule,
                 const ActionList& actions) {
  p.flights.clear();
  io.loss.assign(io.batches.size(), 0.0);
  io.logits.assign(io.want_logits ? io.batches.size() : 0, Tensor{});
  for (size_t i = 0; i < actions.size(); i++) {
    const Action& a = actions[i];
    if (!a.is_message()) {
      run_compute(rank, p, io, a);
      continue;
    }
    size_t end = i;
    while (end < actions.size() && actions[end].is_message()) end++;
    send_and_receive(rank, p, io, actions, i, end, schedule);
    i = end - 1;
  }
  p.flights.clear();
}

}  // namespace pith
