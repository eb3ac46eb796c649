// All members of a group make the same calls in the same order. Reductions (F32, F64) add in the
// order of the ranks. Calls that differ, a member that failed, ended or is late: exit code 1.
#pragma once
#include "comm/mesh.h"

namespace pith {

enum class Reduce : u8 { Sum, Max };

int group_size(const Rank& rank, Group group);
int group_rank(const Rank& rank, Group group);
const Mesh& mesh_of(const Rank& rank);

// Rows by member, null: equal parts. The smaller tensor may lie in the larger.
void all_gather(Rank& rank, Group group, const Tensor& in, const Tensor& out, const char* what,
    const i64* rows = nullptr, At at = At::here());

void reduce_scatter(Rank& rank, Group group, const Tensor& in, const Tensor& out, const char* what,
    const i64* rows = nullptr, At at = At::here());

void all_reduce(
    Rank& rank, Group group, const Tensor& t, Reduce reduce, const char* what, At at = At::here());
void all_reduce(Rank& rank, Group group, double* values, int n, Reduce reduce, const char* what,
    At at = At::here());

// Rows lie by destination and by source.
void all_to_all(Rank& rank, Group group, const Tensor& in, const i64* send_rows, const Tensor& out,
    const i64* recv_rows, const char* what, At at = At::here());

void broadcast(
    Rank& rank, Group group, const Tensor& t, int root, const char* what, At at = At::here());

void barrier(Rank& rank, Group group, const char* what, At at = At::here());

struct MessageTag {
  int kind = 0, stage = 0, micro_batch = 0;
};

struct Transfer {
  enum Kind : u8 { Send, Recv };
  Kind kind = Send;
  int peer = 0;  // member of the group
  Tensor tensor;
  MessageTag tag;
};

// All at once. Messages match in posted order; a send blocks until its receive is posted.
void send_recv(
    Rank& rank, Group group, const Transfer* list, int n, const char* what, At at = At::here());

}
