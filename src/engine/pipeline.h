// pipeline: the one executor of action lists, for every layout down to one rank. Only
// engine/pipeline_<model>.cpp includes it; everything else goes through engine/instance.h.
#pragma once
#include <map>

#include "comm/communicator.h"
#include "engine/expert_parallel.h"
#include "engine/instance.h"
#include "engine/routing_slot.h"

namespace pith {

// One micro-batch in one chunk, from the start of its forward to its last weight gradient.
struct Flight {
  struct Nodes {
    int begin = 0, end = 0;
  };
  struct Layer {
    MoeInput in;
    Dispatch dispatch;
    Tensor rows;                      // what stage 3 made, then what stage 4 brought home
    Nodes of[int(Part::Epilog) + 1];  // the tape's nodes of each part of a forward
  };
  Tape tape;
  Tensor input;          // leaf; undefined in the first stage
  Tensor x;              // running value: [T, D]
  Tensor output_grad;    // received, or left by the chunk after this one on the same rank
  Tensor input_grad;     // result of the backward; to be sent
  vector<Layer> layers;  // and one more, of prolog and epilog
};

template <class M>
struct Pipeline {
  static_assert(Model<M>);
  typename M::Config config;
  ModelShape shape;
  PipelineOptions options;
  vector<M> chunks;               // the stages this rank holds
  vector<ChunkLayers> layers_of;  // what each chunk holds
  Parameters parameters;
  std::map<std::pair<int, int>, Flight> flights;  // by (chunk, micro-batch)
};

template <class M>
std::shared_ptr<Pipeline<M>> make_pipeline(Instance& instance, const Json& json, const Mesh& mesh,
                                           int id, Rank* rank) {
  auto pipeline = std::make_shared<Pipeline<M>>();
  Pipeline<M>& p = *pipeline;
  const MeshCoord at = coord_of(mesh, id);
  const PipelineOptions& options = p.options = instance.options;
  p.config = M::read_config(json);
  p.shape = instance.shape = M::shape(p.config);
  p.layers_of = chunk_layers(options.schedule, mesh.pp, at.pp_rank, p.shape.num_layers);
  p.chunks.resize(p.layers_of.size());
  ParameterTable table;
  vector<int> sizes;
  const int local = p.shape.num_experts / mesh.ep;
  for (size_t i = 0; i < p.chunks.size(); i++) {
    const ChunkLayers& c = p.layers_of[i];
    const StagePart part{c.first, c.count, c.prolog, c.epilog, at.ep_rank * local, local};
    const ParameterTable own = p.chunks[i].parameters(p.config, part, options.init_std);
    sizes.push_back(int(own.size()));
    table.insert(table.end(), own.begin(), own.end());
    if (rank) p.chunks[i].prepare(*rank, p.config, options.length);
  }
  p.parameters = rank ? make_parameters(*rank, std::move(table), sizes, options.gather_layer)
                      : layout_parameters(std::move(table), sizes, options.gather_layer, mesh, id);
  instance.parameters = &p.parameters;
  return pipeline;
}

// One part of a forward. A dense layer has no stages 2 to 4.
template <class M>
void forward_part(Rank& rank, Pipeline<M>& p, StepIo& io, const Step& s, Flight& f, int local) {
  const M& model = p.chunks[s.chunk];
  const Batch& batch = io.batches[s.mb];
  Flight::Layer& l = f.layers[local];
  const bool dense = !l.in.routing.ids.defined();
  switch (s.part) {
    case Part::Prolog: f.x = model.embed(rank, batch); break;
    case Part::Attention: {
      RouterOptions options{.force_balanced = io.force_balanced};
      if (io.routing) options.forced_ids = forced_ids(rank, *io.routing, s.layer, s.mb);
      l.in = model.attend(rank, p.config, model.layers[local], f.x, batch, options);
      if (io.routing) trace_routing(*io.routing, s.layer, s.mb, l.in.routing);
      if (io.balance && l.in.routing.ids.defined())
        add_balance_loss(rank, *io.balance, s.layer, l.in.routing, batch.rows);
      break;
    }
    case Part::Dispatch:
      if (dense) break;
      l.dispatch = dispatch(rank, l.in.hidden, l.in.routing, p.shape.num_experts);
      l.in.hidden = {};
      break;
    case Part::Experts:
      if (dense) break;
      l.rows = model.experts(rank, p.config, model.layers[local], l.dispatch.at_experts);
      l.dispatch.at_experts = {};
      break;
    case Part::Combine:
      if (!dense) l.rows = combine(rank, l.rows, l.dispatch);
      break;
    case Part::Residual:
      f.x = model.finish(rank, p.config, model.layers[local], l.rows, l.in);
      l.rows = {};
      l.in = {};
      l.dispatch = {};
      break;
    case Part::Epilog: {
      if (io.want_logits) io.logits[s.mb] = model.logits(rank, p.config, f.x);
      Tensor loss = model.loss(rank, p.config, f.x, batch, io.loss_scale);
      io.loss[s.mb] = loss.f32()[0];
      add_grad(rank, loss, loss);  // terminal: its own gradient only says that it is wanted
      break;
    }
    default: failed("pipeline", "a step that is not a forward part");
  }
}

// The parts that leave a unit's weight gradients, in the order of the backward.
inline vector<Part> parts_of(UnitKind unit) {
  switch (unit) {
    case UnitKind::Embedding: return {Part::Prolog};
    case UnitKind::Head: return {Part::Epilog};
    case UnitKind::Experts: return {Part::Experts};
    case UnitKind::Layer: return {Part::Residual, Part::Attention};
  }
  return {};
}

template <class M>
void run_one_step(Rank& rank, Pipeline<M>& p, StepIo& io, const Step& s) {
  const ChunkLayers& held = p.layers_of[s.chunk];
  const int local = s.layer < 0 ? held.count : s.layer - held.first;
  rank.status->layer = s.layer;
  rank.status->stage = int(s.part);
  rank.status->micro_batch = s.mb;
  rank.status->chunk = s.chunk;
  switch (s.part) {
    case Part::Gather:
    case Part::Release:
    case Part::Reduce:
      for (FlatUnit& unit : p.parameters.units) {
        if (unit.chunk != s.chunk || unit.kind != s.unit || unit.layer != s.layer) continue;
        if (s.part == Part::Gather) gather(rank, p.parameters, unit, s.backward);
        if (s.part == Part::Release) release_unit(p.parameters, unit);
        if (s.part == Part::Reduce) reduce(rank, p.parameters, unit);
      }
      return;
    case Part::Weights:
      for (int mb = s.mb; mb < s.mb + s.count; mb++)
        for (const Part part : parts_of(s.unit)) {
          Flight& f = p.flights.at({s.chunk, mb});
          const Flight::Nodes& nodes = f.layers[local].of[int(part)];
          weight_grads(rank, f.tape, nodes.begin, nodes.end);
        }
      return;
    default: break;
  }
  Flight& f = p.flights.at({s.chunk, s.mb});
  Flight::Nodes& nodes = f.layers[local].of[int(s.part)];
  rank.tape = io.forward_only ? nullptr : &f.tape;
  if (s.backward) {
    backward(rank, nodes.begin, nodes.end, true);
  } else {
    nodes.begin = f.tape.size();
    forward_part(rank, p, io, s, f, local);
    nodes.end = f.tape.size();
  }
  rank.tape = nullptr;
}

// A chunk's input: received, or, where the next stage is on this rank too, the other chunk's
// output.
template <class M>
void begin_forward(Rank& rank, Pipeline<M>& p, const StepIo& io, int chunk, int mb) {
  Flight& f = p.flights[{chunk, mb}];
  f.layers.resize(p.layers_of[chunk].count + 1);
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

template <class M>
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
template <class M>
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

// Actions [begin, end), all of them messages, as one group call.
template <class M>
void send_and_receive(Rank& rank, Pipeline<M>& p, const StepIo& io, const Action* begin,
                      const Action* end, const ScheduleOptions& schedule) {
  vector<Transfer> list;
  for (const Action* a = begin; a < end; a++) {
    Flight& f = p.flights[{a->chunk, a->mb}];
    const bool send = a->what == Do::Send, activation = a->payload == Payload::Activation;
    Tensor& t = activation ? (send ? f.x : f.input) : (send ? f.input_grad : f.output_grad);
    if (!send) t = empty(rank, {io.batches[a->mb].tokens.numel(), p.shape.hidden}, rank.compute);
    list.push_back({send ? Transfer::Send : Transfer::Recv,
                    a->peer,
                    t,
                    {int(a->payload), message_stage(schedule, rank.mesh.pp_rank, *a), a->mb}});
  }
  send_recv(rank, Group::Pp, list.data(), int(list.size()), "pipeline transfer");
  for (const Action* a = begin; a < end; a++) {
    if (a->what != Do::Send) continue;
    Flight& f = p.flights.at({a->chunk, a->mb});
    if (a->payload == Payload::Gradient)
      f.input_grad = {};
    else if (io.forward_only)
      p.flights.erase({a->chunk, a->mb});
    else
      f.x = f.x.meta();
  }
}

template <class M>
void run_compute(Rank& rank, Pipeline<M>& p, StepIo& io, const Action& a) {
  const int b_chunk = a.backward_chunk(), b_mb = a.backward_mb();
  if (a.has_forward()) begin_forward(rank, p, io, a.chunk, a.mb);
  if (a.has_backward()) begin_backward(rank, p, b_chunk, b_mb);
  for (const Step& s : steps_of(a, p.layers_of, io.forward_only, p.options.gather_layer))
    run_one_step(rank, p, io, s);
  if (io.forward_only && p.layers_of[a.chunk].epilog) p.flights.erase({a.chunk, a.mb});
  if (a.has_backward()) end_backward(rank, p, b_chunk, b_mb);
  if (a.has_backward() && !a.defer) {  // what is left of the flight waits to be sent
    Flight& f = p.flights.at({b_chunk, b_mb});
    f.tape.clear();
    f.layers.clear();
  }
  if (a.what == Do::W)
    for (int mb = a.mb; mb < a.mb + a.count; mb++) p.flights.erase({a.chunk, mb});
}

template <class M>
void run_pipeline(Rank& rank, Pipeline<M>& p, StepIo& io, const ScheduleOptions& schedule,
                  const ActionList& actions) {
  p.flights.clear();
  io.loss.assign(io.batches.size(), 0.0);
  io.logits.assign(io.want_logits ? io.batches.size() : 0, Tensor{});
  vector<FlatUnit>& units = p.parameters.units;
  const Action* const last = actions.data() + actions.size();
  for (const Action* a = actions.data(); a < last; a++) {
    if (a->what == Do::Gather) {
      for (FlatUnit& u : units)
        if (u.chunk == a->chunk) gather(rank, p.parameters, u, !io.forward_only);
    } else if (a->what == Do::Reduce) {
      for (auto u = units.rbegin(); u != units.rend(); u++)
        if (u->chunk == a->chunk) reduce(rank, p.parameters, *u);
    } else if (a->is_message()) {
      const Action* end = a;
      while (end < last && end->is_message()) end++;
      send_and_receive(rank, p, io, a, end, schedule);
      a = end - 1;
    } else {
      run_compute(rank, p, io, *a);
    }
  }
  p.flights.clear();
}

}  // namespace pith
