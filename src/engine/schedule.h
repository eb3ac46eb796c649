// The pipeline as data: a list of actions a rank, which is proven, drawn and run.
#pragma once

#include "comm/mesh.h"
#include "models/model.h"

namespace pith {

// DualPipeV: 2*pp stages, rank r holds stage r (chunk 0) and stage 2*pp-1-r (chunk 1), weight
//   gradients deferred into the bubble (DeepSeek-V3, arXiv:2412.19437; its "cut-in-half" form).
// OneF1B: pp contiguous stages, chunk 0 only (PipeDream-Flush, arXiv:2006.09503).
enum class ScheduleKind : u8 { DualPipeV, OneF1B };
const char* name_of(ScheduleKind kind);  // "dualpipev", "1f1b"
// "auto" is OneF1B at pp = ep = 1 and DualPipeV otherwise.
ScheduleKind schedule_kind(const string& name, int pp, int ep);

inline int chunks_of(ScheduleKind kind) { return kind == ScheduleKind::DualPipeV ? 2 : 1; }
inline int stages_of(ScheduleKind kind, int pp) { return pp * chunks_of(kind); }
int stage_of(ScheduleKind kind, int pp, int rank, int chunk);
int rank_of_stage(ScheduleKind kind, int pp, int stage);

// Layers of each stage: as equal as can be, extra layers to the first interior stages.
vector<int> layer_partition(int layers, int stages);

struct ChunkLayers {
  int first = 0, count = 0;
  bool prolog = false, epilog = false;
};
vector<ChunkLayers> chunk_layers(ScheduleKind kind, int pp, int rank, int layers);

enum class Do : u8 {
  F,       // forward of (chunk, mb)
  B,       // backward; with `defer` its weight gradients are left to a later W
  W,       // weight gradients of `count` micro-batches from mb on
  FB,      // F of (chunk, mb) overlapped with B of (chunk2, mb2)
  Send,    // (chunk, mb)'s output, or its input's gradient
  Recv,    // (chunk, mb)'s input, or its output's gradient
  Gather,  // all-gather the weights of chunk's units, in order
  Reduce,  // reduce-scatter the gradients of chunk's units, in reverse order
};
enum class Payload : u8 { Activation, Gradient };

// Consecutive Sends and Recvs are one group call: all are posted together, and messages from one
// rank to another are matched in posted order.
struct Action {
  Do what = Do::F;
  int chunk = 0, mb = 0;
  int chunk2 = 0, mb2 = 0;
  int count = 1;
  bool defer = false;
  Payload payload = Payload::Activation;
  int peer = -1;  // pipeline rank at the other end of a message
  auto operator<=>(const Action&) const = default;

  bool is_message() const { return what == Do::Send || what == Do::Recv; }
  bool has_forward() const { return what == Do::F || what == Do::FB; }
  bool has_backward() const { return what == Do::B || what == Do::FB; }
  bool has_weights() const { return what == Do::W || (has_backward() && !defer); }
  int backward_chunk() const { return what == Do::FB ? chunk2 : chunk; }
  int backward_mb() const { return what == Do::FB ? mb2 : mb; }
};
using ActionList = vector<Action>;  // of one rank

struct ScheduleOptions {
  ScheduleKind kind = ScheduleKind::DualPipeV;
  int pp = 1;
  int micro_batches = 1;
  bool forward_only = false;
  int weight_grad_batch = 1;  // micro-batches of a W, except where it fills a bubble
  bool gather_step = false;   // with Gather and Reduce actions
};
int min_micro_batches(const ScheduleOptions& options);

// The list of a pipeline rank, and those of all. Exit code 2 for too few micro-batches.
ActionList make_schedule(const ScheduleOptions& options, int rank);
vector<ActionList> make_schedules(const ScheduleOptions& options);

// Stage whose output the message carries.
int message_stage(const ScheduleOptions& options, int rank, const Action& transfer);
// Rank of the stage `step` behind chunk's (negative: before it); -1: there is none.
int rank_beside(const ScheduleOptions& options, int rank, int chunk, int step);
// Rank that a chunk's message goes to or comes from; -1: none but this one.
int message_peer(const ScheduleOptions& options, int rank, const Action& transfer);

// Units of time: a forward, the gradient of its input and its weight gradients take 1 each.
int duration(const Action& action);

// Where a set of lists is wrong; rank < 0: it is right, and the rest describes it.
struct ScheduleCheck {
  int rank = -1, action = -1;  // the list's size when something is missing at its end
  string why;
  bool ok() const { return rank < 0; }
  int peak_live = 0;           // most micro-batches of activations on a rank, both chunks
  int makespan = 0, busy = 0;  // time of all; sum over ranks of the durations
  vector<vector<int>> begin;   // by rank and action
  double bubble() const { return 1 - double(busy) / (double(makespan) * double(begin.size())); }
};

// Proves the lists of all pp ranks: every action exactly once and after what it needs, messages
// that match in posted order, no deadlock when every group call blocks until all of it is matched,
// and live micro-batches bounded (2*pp + 1 for DualPipeV, pp - rank for OneF1B).
ScheduleCheck check_schedule(const ScheduleOptions& options, const vector<ActionList>& lists);
// The same for all ranks of a mesh, one list each, with sharding, experts and context.
ScheduleCheck check_collectives(const ScheduleOptions& options, const Mesh& mesh, int layers,
                                bool gather_layer, const vector<ActionList>& lists);

// "F0.3", "B1.2+" (deferred), "W1.2-4", "F0.5|B1.3", "send F0.3 > 1", "recv B1.2 < 1", "gather 0",
// "reduce 1"; parse_action is the inverse, and exits with code 2 naming `place`.
string to_text(const Action& action);
Action parse_action(const string& line, const string& place);

// Inside an action: the five stages of each layer.
enum class Part : u8 {
  Prolog,     // embedding (first stage)
  Attention,  // stage 1: attention, router, shared experts
  Dispatch,   // stage 2, started
  Experts,    // stage 3
  Combine,    // stage 4, started
  Residual,   // stage 5
  Epilog,     // final norm, LM head, loss (last stage)
  Weights,    // weight gradients of `unit`
  Gather,     // all-gather `unit`'s weights; `backward`: and make room for its gradients
  Release,    // free both
  Reduce,     // reduce-scatter `unit`'s gradients
};
struct Step {
  Part part = Part::Prolog;
  bool backward = false;
  int chunk = 0, mb = 0;
  int layer = -1;                   // global index; -1: prolog, epilog
  UnitKind unit = UnitKind::Layer;  // Weights, Gather, Release, Reduce
  int count = 1;                    // Weights: micro-batches from mb on
  bool operator==(const Step&) const = default;
};

// The steps of all but Send and Recv in the one order in which they and their collectives are
// issued; in FB the two micro-batches' take turns. `gather_layer` adds the Gather, Release and
// Reduce of layer-wise sharding. Dense layers have the same steps, which find no experts.
vector<Step> steps_of(const Action& action, const vector<ChunkLayers>& chunks, bool forward_only,
                      bool gather_layer);

}
