// communicator: collectives and messages between ranks. All members of a group make the same calls
// in the same order. Reductions add in the order of the ranks, so results repeat bit for bit. Calls
// that differ, a member that failed, ended or is late: exit code 1. `what` labels the call in
// messages.
#pragma once
#include "comm/mesh.h"

namespace pith {

enum class Reduce : u8 { Sum, Max };

int group_size(const Rank& rank, Group group);
int group_rank(const Rank& rank, Group group);
int group_member(const Rank& rank, Group group, int member);
const Mesh& mesh_of(const Rank& rank);

// Counts are rows, one a member; null: equal parts. Reductions take F32 and F64.

// out [sum(rows), ...] = the members' in [rows[me], ...]; `in` may lie in `out`.
void all_gather(Rank& rank, Group group, const Tensor& in, const Tensor& out, const char* what,
                const i64* rows = nullptr, At at = At::here());

// out [rows[me], ...] = a part of the sum of all in [sum(rows), ...]; `out` may lie in `in`.
void reduce_scatter(Rank& rank, Group group, const Tensor& in, const Tensor& out, const char* what,
                    const i64* rows = nullptr, At at = At::here());

void all_reduce(Rank& rank, Group group, const Tensor& t, Reduce reduce, const char* what,
                At at = At::here());
void all_reduce(Rank& rank, Group group, double* values, int n, Reduce reduce, const char* what,
                At at = At::here());

// Rows of in [sum(send_rows), ...] lie by destination, of out [>= sum(recv_rows), ...] by source.
void all_to_all(Rank& rank, Group group, const Tensor& in, const i64* send_rows, const Tensor& out,
                const i64* recv_rows, const char* what, At at = At::here());

void broadcast(Rank& rank, Group group, const Tensor& t, int root, const char* what,
               At at = At::here());

void barrier(Rank& rank, Group group, const char* what, At at = At::here());

struct MessageTag {
  int kind = 0, stage = 0, micro_batch = 0;
  bool operator==(const MessageTag&) const = default;
};

struct Transfer {
  enum Kind : u8 { Send, Recv };
  Kind kind = Send;
  int peer = 0;  // member of the group
  Tensor tensor;
  MessageTag tag;
};

// All under way at once. Messages between two members match in posted order; a send blocks until
// its receive is posted.
void send_recv(Rank& rank, Group group, const Transfer* list, int n, const char* what,
               At at = At::here());

}
