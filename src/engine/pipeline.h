// Only engine/pipeline_<model>.cpp includes it.
#pragma once
#include <map>

#include "comm/communicator.h"
#include "engine/expert_parallel.h"
#include "engine/instance.h"
#include "engine/routing_trace.h"
#include "observe/profile.h"

namespace pith {

// One micro-batch in one chunk, until its last weight gradient.
struct Flight {
  struct Layer {
    MoeInput in;
    Dispatch dispatch;
    Tensor rows;  // of stage 3, then of stage 4
    NodeRange of[int(Part::Epilog) + 1];
  };
  Tape tape;
  Tensor input, x;  // [T, D]; input: undefined in the first stage
  Tensor output_grad, input_grad;
  vector<Layer> layers;  // and one more, of prolog and epilog
};

template <class M>
struct Pipeline {
  static_assert(Model<M>);
  typename M::Config config;
  ModelShape shape;
  vector<M> chunks;
  vector<ChunkLayers> layers_of;
  Parameters parameters;
  std::map<std::pair<int, int>, Flight> flights;  // by (chunk, micro-batch)
};

template <class M>
std::shared_ptr<Pipeline<M>> make_pipeline(
    Instance& instance, const Json& json, const PipelineOptions& o) {
  auto p = std::make_shared<Pipeline<M>>();
  MeshCoord at = coord_of(o.mesh, o.id);
  p->config = M::read_config(json);
  p->shape = instance.shape = M::shape(p->config);
  p->layers_of = chunk_layers(o.schedule, o.mesh.pp, at.pp_rank, p->shape.num_layers);
  p->chunks.resize(p->layers_of.size());
  vector<ParameterTable> tables;
  int local = p->shape.num_experts / o.mesh.ep;
  for (size_t i = 0; i < p->chunks.size(); i++) {
    const ChunkLayers& c = p->layers_of[i];
    const StagePart part{c.first, c.count, c.prolog, c.epilog, at.ep_rank * local, local};
    tables.push_back(p->chunks[i].parameters(p->config, part, o.init_std));
    if (o.rank) p->chunks[i].prepare(*o.rank, p->config, o.length);
  }
  p->parameters = make_parameters(tables, o.gather_layer, o.mesh, o.id, o.rank);
  instance.parameters = &p->parameters;
  return p;
}

template <class M>
struct Executor {
  Rank& rank;
  Pipeline<M>& p;
  StepIo& io;
  const ScheduleOptions& schedule;
  vector<Tensor> losses = vector<Tensor>(io.batches.size());  // [1], where they were computed

  void forward_part(const Step& s, Flight& f, int local) {
    const M& model = p.chunks[s.chunk];
    const Batch& batch = io.batches[s.mb];
    Flight::Layer& l = f.layers[local];
    bool of_experts = s.part >= Part::Dispatch && s.part <= Part::Combine;
    if (of_experts && !l.in.routing.ids.defined()) return;  // a dense layer
    switch (s.part) {
      case Part::Prolog: f.x = model.embed(rank, batch); break;
      case Part::Attention: {
        RouterOptions router{.force_balanced = io.force_balanced};
        if (io.routing) router.forced_ids = forced_ids(rank, *io.routing, s.layer, s.mb);
        l.in = model.attend(rank, p.config, model.layers[local], f.x, batch, router);
        if (io.routing) trace_routing(rank, *io.routing, s.layer, s.mb, l.in.routing);
        if (io.balance && l.in.routing.ids.defined())
          add_balance_loss(rank, *io.balance, s.layer, l.in.routing, batch.rows);
        break;
      }
      case Part::Dispatch:
        l.dispatch = dispatch(rank, l.in.hidden, l.in.routing, p.shape.num_experts);
        l.in.hidden = {};
        break;
      case Part::Experts:
        l.rows = model.experts(rank, p.config, model.layers[local], l.dispatch.at_experts);
        l.dispatch.at_experts = {};
        break;
      case Part::Combine: l.rows = combine(rank, l.rows, l.dispatch); break;
      case Part::Residual:
        f.x = model.finish(rank, p.config, model.layers[local], l.rows, l.in);
        l.rows = {};
        l.in = {};
        l.dispatch = {};
        break;
      case Part::Epilog: {
        if (!io.logits.empty()) io.logits[s.mb] = model.logits(rank, p.config, f.x);
        Tensor loss = model.loss(rank, p.config, f.x, batch, io.loss_scale);
        losses[s.mb] = loss;
        add_grad(rank, loss, loss);  // its own gradient only says that it is wanted
        break;
      }
      default: failed("pipeline", "a step that is not a forward part");
    }
  }

  void weight_gradients(const Step& s, int local) {
    auto of = [&](Part part) {
      vector<NodeRange> ranges;
      for (int mb = s.mb; mb < s.mb + s.count; mb++)
        ranges.push_back(p.flights.at({s.chunk, mb}).layers[local].of[int(part)]);
      weight_grads(rank, ranges);
    };
    switch (s.unit) {
      case UnitKind::Embedding: return of(Part::Prolog);
      case UnitKind::Head: return of(Part::Epilog);
      case UnitKind::Experts: return of(Part::Experts);
      case UnitKind::Layer: of(Part::Residual); return of(Part::Attention);
    }
  }

  void run_step(const Step& s) {
    const ChunkLayers& held = p.layers_of[s.chunk];
    int local = s.layer < 0 ? held.count : s.layer - held.first;
    rank.status->layer = s.layer;
    rank.status->stage = int(s.part);
    rank.status->micro_batch = s.mb;
    rank.status->chunk = s.chunk;
    const StageRange range(rank, {name_of(s), s.layer, s.mb});
    if (s.part == Part::Weights) return weight_gradients(s, local);
    if (s.part == Part::Gather || s.part == Part::Release || s.part == Part::Reduce) {
      for (FlatUnit& unit : p.parameters.units) {
        if (unit.chunk != s.chunk || unit.kind != s.unit || unit.layer != s.layer) continue;
        if (s.part == Part::Gather) gather(rank, p.parameters, unit, s.backward);
        if (s.part == Part::Release) release_unit(p.parameters, unit);
        if (s.part == Part::Reduce) reduce(rank, p.parameters, unit);
      }
      return;
    }
    Flight& f = p.flights.at({s.chunk, s.mb});
    NodeRange& nodes = f.layers[local].of[int(s.part)];
    rank.tape = schedule.forward_only ? nullptr : &f.tape;
    const AllocatesFor use(rank, s.backward ? MemoryUse::Workspace : MemoryUse::Activations);
    if (s.backward) {
      backward(rank, nodes.begin, nodes.end, true);
    } else {
      nodes = {&f.tape, f.tape.size()};
      forward_part(s, f, local);
      nodes.end = f.tape.size();
    }
    rank.tape = nullptr;
  }

  // The input was received, or is the output of the other chunk of this rank.
  void begin_forward(int chunk, int mb) {
    Flight& f = p.flights[{chunk, mb}];
    f.layers.resize(p.layers_of[chunk].count + 1);
    if (p.layers_of[chunk].prolog) return;
    if (!f.input.defined()) {
      f.input = p.flights.at({1 - chunk, mb}).x;
      if (schedule.forward_only) p.flights.erase({1 - chunk, mb});
    }
    f.input.var = -1;
    rank.tape = &f.tape;
    if (!schedule.forward_only) make_leaf(rank, f.input);
    rank.tape = nullptr;
    f.x = f.input;
  }

  void end_backward(int chunk, int mb, bool defer) {
    Flight& f = p.flights.at({chunk, mb});
    f.x = {};
    if (!p.layers_of[chunk].prolog) {
      f.input_grad = grad_of(f.tape, f.input);
      f.tape.grads[f.input.var] = {};
      f.input = {};
      if (rank_beside(schedule, rank.mesh.pp_rank, chunk, -1) == rank.mesh.pp_rank)
        p.flights.at({0, mb}).output_grad = std::move(f.input_grad);
    }
    if (defer) return;
    f.tape.clear();
    f.layers.clear();
  }

  void send_and_receive(const Action* begin, const Action* end) {
    vector<Transfer> list;
    for (const Action* a = begin; a < end; a++) {
      Flight& f = p.flights[{a->chunk, a->mb}];
      bool send = a->what == Do::Send, activation = a->payload == Payload::Activation;
      Tensor& t = activation ? (send ? f.x : f.input) : (send ? f.input_grad : f.output_grad);
      if (!send) t = empty(rank, {io.batches[a->mb].tokens.numel(), p.shape.hidden}, rank.compute);
      int stage = message_stage(schedule, rank.mesh.pp_rank, *a);
      list.push_back(
          {send ? Transfer::Send : Transfer::Recv, a->peer, t, {int(a->payload), stage, a->mb}});
    }
    send_recv(rank, Group::Pp, list.data(), int(list.size()), "pipeline transfer");
    for (const Action* a = begin; a < end; a++) {
      if (a->what != Do::Send) continue;
      Flight& f = p.flights.at({a->chunk, a->mb});
      if (a->payload == Payload::Gradient)
        f.input_grad = {};
      else if (schedule.forward_only)
        p.flights.erase({a->chunk, a->mb});
      else
        f.x = f.x.meta();
    }
  }

  void compute(const Action& a) {
    int chunk = a.backward_chunk(), mb = a.backward_mb();
    if (a.has_forward()) begin_forward(a.chunk, a.mb);
    if (a.has_backward() && !p.layers_of[chunk].epilog) {
      Flight& f = p.flights.at({chunk, mb});
      f.tape.grads[f.x.var] = std::exchange(f.output_grad, {});
    }
    for (const Step& s : steps_of(a, p.layers_of, schedule.forward_only, p.parameters.gather_layer))
      run_step(s);
    if (a.has_backward()) end_backward(chunk, mb, a.defer);
    if (a.has_forward() && schedule.forward_only && p.layers_of[a.chunk].epilog)
      p.flights.erase({a.chunk, a.mb});
    for (int w = a.mb; a.what == Do::W && w < a.mb + a.count; w++) p.flights.erase({a.chunk, w});
  }
};

template <class M>
void run_pipeline(Rank& rank, Pipeline<M>& p, StepIo& io, const ScheduleOptions& schedule,
    const ActionList& actions) {
  p.flights.clear();
  Executor<M> executor{rank, p, io, schedule};
  const Action* const last = actions.data() + actions.size();
  for (const Action* a = actions.data(); a < last; a++) {
    if (a->is_message()) {
      const Action* end = a;
      while (end < last && end->is_message()) end++;
      executor.send_and_receive(a, end);
      a = end - 1;
    } else {
      executor.compute(*a);
    }
  }
  p.flights.clear();
  io.loss.clear();
  vector<char> bytes;
  for (const Tensor& loss : executor.losses)
    io.loss.push_back(loss.defined() ? on_host(rank, loss, bytes).f32()[0] : 0.0);
}

}
