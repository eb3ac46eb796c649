#pragma once

#include "comm/mesh.h"
#include "models/model.h"

namespace pith {

// DualPipeV: rank r holds stages r and 2*pp-1-r (DeepSeek-V3, arXiv:2412.19437, "cut in half").
// OneF1B: pp contiguous stages (PipeDream-Flush, arXiv:2006.09503).
enum class ScheduleKind : u8 { DualPipeV, OneF1B };
const char* name_of(ScheduleKind kind);
ScheduleKind schedule_kind(const string& name, int pp, int ep);

inline int chunks_of(ScheduleKind kind) { return kind == ScheduleKind::DualPipeV ? 2 : 1; }
inline int stages_of(ScheduleKind kind, int pp) { return pp * chunks_of(kind); }
int stage_of(ScheduleKind kind, int pp, int rank, int chunk);
int rank_of_stage(ScheduleKind kind, int pp, int stage);

// Layers of each stage; extra ones go to the first interior stages.
vector<int> layer_partition(int layers, int stages);

struct ChunkLayers {
  int first = 0, count = 0;
  bool prolog = false, epilog = false;
};
vector<ChunkLayers> chunk_layers(ScheduleKind kind, int pp, int rank, int layers);

enum class Do : u8 {
  F,       // forward
  B,       // backward; with `defer`, weight gradients are left to a later W
  W,       // weight gradients of `count` micro-batches
  FB,      // F of (chunk, mb) overlapped with B of (chunk2, mb2)
  Send,    // (chunk, mb)'s output, or its input's gradient
  Recv,    // (chunk, mb)'s input, or its output's gradient
  Gather,  // weights of chunk's units
  Reduce,
};
enum class Payload : u8 { Activation, Gradient };

// Consecutive Sends and Recvs are one group call.
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
using ActionList = vector<Action>;

struct ScheduleOptions {
  ScheduleKind kind = ScheduleKind::DualPipeV;
  int pp = 1;
  int micro_batches = 1;
  bool forward_only = false;
  int weight_grad_batch = 1;
  bool gather_step = false;
};
int min_micro_batches(const ScheduleOptions& options);

// Exit code 2 for too few micro-batches.
ActionList make_schedule(const ScheduleOptions& options, int rank);
vector<ActionList> make_schedules(const ScheduleOptions& options);

// Stage whose output the message carries.
int message_stage(const ScheduleOptions& options, int rank, const Action& transfer);
// Rank of the stage `step` behind chunk's; -1: there is none.
int rank_beside(const ScheduleOptions& options, int rank, int chunk, int step);

// A forward, an input's gradient and weight gradients take 1 each.
int duration(const Action& action);

struct ScheduleCheck {
  int rank = -1, action = -1;  // what is wrong; the list's size: its end
  string why;
  bool ok() const { return rank < 0; }
  int peak_live = 0;           // micro-batches whose activations a rank holds
  int makespan = 0, busy = 0;  // busy: summed over ranks
  vector<vector<int>> begin;   // by rank and action
  double bubble() const { return 1 - double(busy) / (double(makespan) * double(begin.size())); }
};

// Each action once and after what it needs, messages matched in posted order, no deadlock though
// every group call blocks, live micro-batches bounded. With layers, lists are those of all ranks of
// the mesh, and the collectives of sharding, experts and context are checked too.
ScheduleCheck check_schedule(const ScheduleOptions& options, const vector<ActionList>& lists,
    const Mesh& mesh = {}, int layers = 0, bool gather_layer = false);

// "F0.3", "B1.2+" (deferred), "W1.2-4", "F0.5|B1.3", "send F0.3 > 1", "gather 0".
string to_text(const Action& action);

// Inside an action.
enum class Part : u8 {
  Prolog,
  Attention,
  Dispatch,
  Experts,
  Combine,
  Residual,
  Epilog,
  Weights,  // gradients
  Gather,   // `backward`: and make room for gradients
  Release,
  Reduce,
};
const char* name_of(Part part);
struct Step {
  Part part = Part::Prolog;
  bool backward = false;
  int chunk = 0, mb = 0;
  int layer = -1;  // -1: prolog, epilog
  UnitKind unit = UnitKind::Layer;
  int count = 1;  // micro-batches of Weights
  bool starts_communication() const { return part == Part::Dispatch || part == Part::Combine; }
  bool operator==(const Step&) const = default;
};

string name_of(const Step& step);  // "experts backward", "experts weights"

// In the order in which their collectives are issued; in FB two micro-batches' take turns.
// `gather_layer` adds the Gather, Release and Reduce of layer-wise sharding.
vector<Step> steps_of(
    const Action& action, const vector<ChunkLayers>& chunks, bool forward_only, bool gather_layer);

}
