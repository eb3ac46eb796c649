// communicator: every collective and message between ranks.
//
// All members of a group make the same calls in the same order; a call returns when its outputs are
// complete and its inputs may be written again. Reductions add in the order of the group's ranks,
// so results repeat bit for bit and are the same on every member. A rank without a Comm is a group
// of one. Errors (exit code 1, naming the caller): tensors that do not fit the counts, calls that
// do not match, a member that failed, ended or did not come within the time limit. `what` labels
// the call in messages and must stay valid until it returns.
#pragma once
#include "comm/mesh.h"
#include "core/tensor.h"

namespace pith {

enum class Reduce : uint8_t { Sum, Max };

// Members of the rank's group, this rank's place among them, and the global rank of a member.
int group_size(const Rank& rank, Group group);
int group_rank(const Rank& rank, Group group);
int group_member(const Rank& rank, Group group, int member);
const Mesh& mesh_of(const Rank& rank);  // requires rank.comm

// Dtypes agree, and rows have one length in `in` and `out`. Counts are rows of the first dimension,
// one a member, the same array on every member; null means equal parts; any may be zero. Reductions
// take F32, F64 and I32, the others any dtype.

// out [sum(rows), ...] = the members' in [rows[me], ...] one after the other. `in` may be the
// caller's own part of `out`.
void all_gather(Rank& rank, Group group, const Tensor& in, const Tensor& out, const char* what,
                const int64_t* rows = nullptr, At at = At::here());

// out [rows[me], ...] = the caller's part of the sum over members of in [sum(rows), ...]. `out` may
// be the caller's own part of `in`.
void reduce_scatter(Rank& rank, Group group, const Tensor& in, const Tensor& out, const char* what,
                    const int64_t* rows = nullptr, At at = At::here());

// t = sum or maximum over members, in place; a NaN stays. Or `n` host values.
void all_reduce(Rank& rank, Group group, const Tensor& t, Reduce reduce, const char* what,
                At at = At::here());
void all_reduce(Rank& rank, Group group, double* values, int n, Reduce reduce, const char* what,
                At at = At::here());

// Rows of `in` [sum(send_rows), ...] lie by destination; rows of `out` [sum(recv_rows), ...] by
// source, and it may have more behind them. send_rows[j] here equals recv_rows[i] on member j, i
// being this member.
void all_to_all(Rank& rank, Group group, const Tensor& in, const int64_t* send_rows,
                const Tensor& out, const int64_t* recv_rows, const char* what, At at = At::here());

// t of every member = t of member `root`.
void broadcast(Rank& rank, Group group, const Tensor& t, int root, const char* what,
               At at = At::here());

void barrier(Rank& rank, Group group, const char* what, At at = At::here());

// What a message is: asserted to be the same at both ends.
struct MessageTag {
  int kind = 0, stage = 0, micro_batch = 0;
  bool operator==(const MessageTag&) const = default;
};

struct Transfer {
  enum Kind : uint8_t { Send, Recv };
  Kind kind = Send;
  int peer = 0;   // member of the group
  Tensor tensor;  // sent, or received into: same bytes and dtype at both ends
  MessageTag tag;
};

// One group call of sends and receives, all under way at once; returns when all are done. Messages
// from one member to another are matched in the order both post them; a send blocks until it is
// received. Sending to oneself is allowed if the receive is in the same call.
void send_recv(Rank& rank, Group group, const Transfer* list, int n, const char* what,
               At at = At::here());

}  // namespace pith
