// communicator: every collective and message between ranks. All members of a group make the same
// calls in the same order; when one returns, its inputs may be written again. Reductions add in the
// order of the ranks, so results repeat bit for bit. A call that does not fit the others', a member
// that failed, ended or is late: exit code 1. `what`, a literal, labels the call in messages.
#pragma once
#include "comm/mesh.h"

namespace pith {

enum class Reduce : uint8_t { Sum, Max };

// Members of the rank's group, its place among them, the global rank of one.
int group_size(const Rank& rank, Group group);
int group_rank(const Rank& rank, Group group);
int group_member(const Rank& rank, Group group, int member);
const Mesh& mesh_of(const Rank& rank);  // requires rank.comm

// Counts are rows of the first dimension, one a member, any of them zero; null: equal parts.
// Reductions take F32, F64 and I32, the others any dtype.

// out [sum(rows), ...] = the members' in [rows[me], ...]; `in` may lie in `out`.
void all_gather(Rank& rank, Group group, const Tensor& in, const Tensor& out, const char* what,
                const int64_t* rows = nullptr, At at = At::here());

// out [rows[me], ...] = a part of the sum of all in [sum(rows), ...]; `out` may lie in `in`.
void reduce_scatter(Rank& rank, Group group, const Tensor& in, const Tensor& out, const char* what,
                    const int64_t* rows = nullptr, At at = At::here());

// In place; a NaN stays.
void all_reduce(Rank& rank, Group group, const Tensor& t, Reduce reduce, const char* what,
                At at = At::here());
void all_reduce(Rank& rank, Group group, double* values, int n, Reduce reduce, const char* what,
                At at = At::here());

// Rows of in [sum(send_rows), ...] lie by destination, of out [>= sum(recv_rows), ...] by source.
void all_to_all(Rank& rank, Group group, const Tensor& in, const int64_t* send_rows,
                const Tensor& out, const int64_t* recv_rows, const char* what, At at = At::here());

void broadcast(Rank& rank, Group group, const Tensor& t, int root, const char* what,
               At at = At::here());

void barrier(Rank& rank, Group group, const char* what, At at = At::here());

// Must be the same at both ends.
struct MessageTag {
  int kind = 0, stage = 0, micro_batch = 0;
  bool operator==(const MessageTag&) const = default;
};

struct Transfer {
  enum Kind : uint8_t { Send, Recv };
  Kind kind = Send;
  int peer = 0;   // member of the group
  Tensor tensor;  // sent, or received into
  MessageTag tag;
};

// Sends and receives that are under way at once. Messages between two members are matched in the
// order both post them; a send blocks until its receive is posted.
void send_recv(Rank& rank, Group group, const Transfer* list, int n, const char* what,
               At at = At::here());

}  // namespace pith
