// communicator: every collective and message between ranks.
//
// All members of a group must make the same calls in the same order; a call returns when its
// outputs are complete and its inputs may be written again. Reductions add in the order of the
// group's ranks, so that results repeat bit for bit and are the same on every member. A rank
// without a Comm is a group of one. Errors: tensors that do not fit the counts, members whose calls
// do not match, a member that failed, ended or did not come within the time limit; all are exit
// code 1 and name the caller. `what` labels the call in messages and on the status board; it must
// stay valid until the call returns. defines: all_gather, reduce_scatter, all_reduce, all_to_all,
// broadcast, send_recv, barrier
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

// In what follows `n` is the group's size, dtypes agree, tensors are contiguous, and counts are
// rows of the first dimension, one a member, the same array on every member; null means equal
// parts. Rows have the same length in `in` and `out`. Any count may be zero.

// out [sum(rows), ...] = the members' in [rows[me], ...] one after the other. `in` may be the
// caller's own part of `out`. Any dtype.
void all_gather(Rank& rank, Group group, const Tensor& in, const Tensor& out, const char* what,
                const int64_t* rows = nullptr, At at = At::here());

// out [rows[me], ...] = the caller's part of the sum over members of in [sum(rows), ...]. `out` may
// be the caller's own part of `in`. F32, F64, I32.
void reduce_scatter(Rank& rank, Group group, const Tensor& in, const Tensor& out, const char* what,
                    const int64_t* rows = nullptr, At at = At::here());

// t = sum or maximum over members, in place. F32, F64, I32.
void all_reduce(Rank& rank, Group group, const Tensor& t, Reduce reduce, const char* what,
                At at = At::here());
// The same for `n` host values, whatever the device.
void all_reduce(Rank& rank, Group group, double* values, int n, Reduce reduce, const char* what,
                At at = At::here());

// Rows of `in` [sum(send_rows), ...] lie by destination; rows of `out` [sum(recv_rows), ...] by
// source. send_rows[j] here equals recv_rows[i] on member j, i being this member. `out` may have
// rows to spare after the received ones. Both counts null: equal parts. Any dtype; `in` and `out`
// must not overlap.
void all_to_all(Rank& rank, Group group, const Tensor& in, const int64_t* send_rows,
                const Tensor& out, const int64_t* recv_rows, const char* what, At at = At::here());

// t of every member = t of member `root`. Any dtype.
void broadcast(Rank& rank, Group group, const Tensor& t, int root, const char* what,
               At at = At::here());

void barrier(Rank& rank, Group group, const char* what, At at = At::here());

// What a message is, for the CPU form, which asserts that both ends agree; NCCL has no tags.
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
// from one member to another are matched in the order both post them. A send may block until it is
// received. Sending to oneself is allowed if the receive is in the same call. Any dtype.
void send_recv(Rank& rank, Group group, const Transfer* list, int n, const char* what,
               At at = At::here());

}  // namespace pith
