#include "comm/communicator.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <numeric>

#include "comm/world.h"

namespace pith {

namespace {

[[noreturn]] void fail_call(const Call& call, const string& what) {
  throw Error(kExitFailed,
              text("%s:%d: %s \"%s\"", call.at.file, call.at.line, call.op, call.what) + what);
}

string names_of(const vector<int>& ranks) {
  string names = ranks.size() > 1 ? "ranks" : "rank";
  for (size_t i = 0; i < ranks.size(); i++) names += text("%s %d", i ? "," : "", ranks[i]);
  return names;
}

// The one place where the host waits for other ranks. Three exits: ready() holds; another rank
// failed; the time limit, which is this rank's failure, as is a rank that has ended without coming.
// missing() lists the ranks that are waited for.
template <class Ready, class Missing>
void wait_for_others(Rank& rank, GroupState& g, std::unique_lock<std::mutex>& lock,
                     const Call& call, Ready ready, Missing missing) {
  World& world = *rank.comm->world;
  RankState& mine = world.ranks[rank.id];
  const double limit_s = rank.comm->limit_s;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(limit_s);
  mine.waits = true;
  mine.call = call;
  rank.status->waiting = call.what;
  bool timed_out = false;
  while (world.failed_rank < 0 && !ready()) {
    const vector<int> late = missing();
    if (std::any_of(late.begin(), late.end(), [&](int r) { return world.ranks[r].finished; }))
      fail_call(call, " waits for " + names_of(late) + ", of which one has ended");
    if (timed_out)
      fail_call(call, text(" waited %g s for %s (%s group)", limit_s, names_of(late).c_str(),
                           name_of(call.group)));
    timed_out = g.changed.wait_until(lock, deadline) == std::cv_status::timeout;
  }
  if (world.failed_rank >= 0)
    throw Error(kExitFailed, text("stopped, because rank %d failed", world.failed_rank));
  mine.waits = false;
  rank.status->waiting = "";
}

// A collective under way. Its slots stay as they are until the caller has entered the next one.
struct Meeting {
  GroupState& g;
  Call call;
  int me, n;
  const vector<Slot>& slots;
};

// Every member brings a copy of `data` and waits for the others, who must be in the same call.
Meeting meet(Rank& rank, const Call& call, const void* data, int64_t bytes, DType dtype,
             int detail = 0, const int64_t* counts = nullptr) {
  Comm& comm = *rank.comm;
  const int index = int(call.group), me = comm.place[index];
  GroupState& g = *comm.group[index];
  const int n = int(g.members.size());
  vector<Slot>& slots = g.slots[comm.calls[index]++ & 1];
  Slot& mine = slots[me];
  const char* from = static_cast<const char*>(data);
  mine.call = call;
  mine.dtype = dtype;
  mine.detail = detail;
  mine.data.assign(from, from + bytes);
  mine.counts.assign(counts, counts ? counts + n : counts);
  std::unique_lock lock(comm.world->mutex);
  const int64_t round = g.round;
  g.here[me] = 1;
  if (std::count(g.here.begin(), g.here.end(), 1) == n) {
    g.here.assign(n, 0);
    g.round++;
    g.changed.notify_all();
  }
  const auto missing = [&] {
    vector<int> late;
    for (int i = 0; i < n; i++)
      if (!g.here[i]) late.push_back(g.members[i]);
    return late;
  };
  wait_for_others(
      rank, g, lock, call, [&] { return g.round != round; }, missing);
  for (int i = 0; i < n; i++) {
    const Slot& other = slots[i];
    if (std::strcmp(other.call.op, call.op) == 0 && other.dtype == dtype &&
        other.detail == detail && other.counts.empty() == mine.counts.empty())
      continue;
    fail_call(call,
              text(": the members' calls differ: rank %d is in %s \"%s\" of %s, detail "
                   "%d, called at %s:%d (this one: %s, detail %d)",
                   g.members[i], other.call.op, other.call.what, name_of(other.dtype), other.detail,
                   other.call.at.file, other.call.at.line, name_of(dtype), detail));
  }
  return {g, call, me, n, slots};
}

// What a member brought, `want` bytes.
const char* brought(const Meeting& m, int member, int64_t want) {
  const vector<char>& data = m.slots[member].data;
  if (int64_t(data.size()) != want)
    fail_call(m.call, text(": rank %d brings %zu bytes (need %ld)", m.g.members[member],
                           data.size(), want));
  return data.data();
}

int64_t row_bytes(const Tensor& t) {
  int64_t bytes = size_of(t.dtype);
  for (int i = 1; i < t.dim.rank; i++) bytes *= t.dim[i];
  return bytes;
}

// Byte offsets of n parts in a tensor of `total` rows, n + 1 of them; equal parts without counts.
vector<int64_t> part_offsets(const int64_t* rows, int n, int64_t total, int64_t bytes_a_row) {
  vector<int64_t> offset(n + 1, 0);
  for (int i = 0; i < n; i++)
    offset[i + 1] = offset[i] + (rows ? rows[i] : total / n) * bytes_a_row;
  return offset;
}

void copy(char* to, const char* from, int64_t bytes) {
  if (bytes > 0 && to != from) std::memmove(to, from, bytes);
}

// to [bytes] = reduction over members, in their order, of what they brought from byte `begin` on,
// of `all` bytes.
template <class T>
void reduce_as(const Meeting& m, char* to, int64_t begin, int64_t bytes, int64_t all,
               Reduce reduce) {
  T* out = reinterpret_cast<T*>(to);
  copy(to, brought(m, 0, all) + begin, bytes);
  for (int i = 1; i < m.n; i++) {
    const T* x = reinterpret_cast<const T*>(brought(m, i, all) + begin);
    for (int64_t k = 0, count = bytes / int64_t{sizeof(T)}; k < count; k++) {
      if (reduce == Reduce::Sum)
        out[k] += x[k];
      else if (!(out[k] >= x[k]) && out[k] == out[k])  // a NaN stays
        out[k] = x[k];
    }
  }
}

void reduce_members(const Meeting& m, DType dtype, char* to, int64_t begin, int64_t bytes,
                    int64_t all, Reduce reduce) {
  if (dtype == DType::F32) return reduce_as<float>(m, to, begin, bytes, all, reduce);
  if (dtype == DType::F64) return reduce_as<double>(m, to, begin, bytes, all, reduce);
  reduce_as<int32_t>(m, to, begin, bytes, all, reduce);
}

bool reducible(DType dtype) {
  return dtype == DType::F32 || dtype == DType::F64 || dtype == DType::I32;
}

void all_reduce_bytes(Rank& rank, const Call& call, void* data, int64_t bytes, DType dtype,
                      Reduce reduce) {
  if (group_size(rank, call.group) == 1) return;
  const Meeting m = meet(rank, call, data, bytes, dtype, int(reduce));
  reduce_members(m, dtype, static_cast<char*>(data), 0, bytes, bytes, reduce);
}

}  // namespace

int group_size(const Rank& rank, Group group) {
  if (!rank.comm) return 1;
  return int(rank.comm->group[int(group)]->members.size());
}

int group_rank(const Rank& rank, Group group) {
  return rank.comm ? rank.comm->place[int(group)] : 0;
}

int group_member(const Rank& rank, Group group, int member) {
  return rank.comm ? rank.comm->group[int(group)]->members[member] : rank.id;
}

const Mesh& mesh_of(const Rank& rank) { return rank.comm->world->mesh; }

void all_gather(Rank& rank, Group group, const Tensor& in, const Tensor& out, const char* what,
                const int64_t* rows, At at) {
  const int n = group_size(rank, group), me = group_rank(rank, group);
  const int64_t row = row_bytes(out);
  const auto offset = part_offsets(rows, n, out.dim[0], row);
  check(rank, "all_gather", at,
        {{"both on the cpu", in.device == Device::CPU && out.device == Device::CPU},
         {"equal dtypes", in.dtype == out.dtype},
         {"in's rows are this member's part", in.bytes() == offset[me + 1] - offset[me]},
         {"out's rows are all parts", out.bytes() == offset[n]}},
        {&in, &out});
  copy(out.data + offset[me], in.data, in.bytes());
  if (n == 1) return;
  const Meeting m = meet(rank, {"all_gather", what, group, at}, in.data, in.bytes(), in.dtype);
  for (int i = 0; i < n; i++) {
    const int64_t bytes = offset[i + 1] - offset[i];
    copy(out.data + offset[i], brought(m, i, bytes), bytes);
  }
}

void reduce_scatter(Rank& rank, Group group, const Tensor& in, const Tensor& out, const char* what,
                    const int64_t* rows, At at) {
  const int n = group_size(rank, group), me = group_rank(rank, group);
  const auto offset = part_offsets(rows, n, in.dim[0], row_bytes(in));
  check(rank, "reduce_scatter", at,
        {{"both on the cpu", in.device == Device::CPU && out.device == Device::CPU},
         {"dtype is f32, f64 or i32", reducible(in.dtype)},
         {"equal dtypes", in.dtype == out.dtype},
         {"out's rows are this member's part", out.bytes() == offset[me + 1] - offset[me]},
         {"in's rows are all parts", in.bytes() == offset[n]}},
        {&in, &out});
  if (n == 1) return copy(out.data, in.data, in.bytes());
  const Meeting m = meet(rank, {"reduce_scatter", what, group, at}, in.data, in.bytes(), in.dtype);
  reduce_members(m, in.dtype, out.data, offset[me], out.bytes(), in.bytes(), Reduce::Sum);
}

void all_reduce(Rank& rank, Group group, const Tensor& t, Reduce reduce, const char* what, At at) {
  check(
      rank, "all_reduce", at,
      {{"t on the cpu", t.device == Device::CPU}, {"dtype is f32, f64 or i32", reducible(t.dtype)}},
      {&t});
  all_reduce_bytes(rank, {"all_reduce", what, group, at}, t.data, t.bytes(), t.dtype, reduce);
}

void all_reduce(Rank& rank, Group group, double* values, int n, Reduce reduce, const char* what,
                At at) {
  all_reduce_bytes(rank, {"all_reduce", what, group, at}, values, n * int64_t{sizeof(double)},
                   DType::F64, reduce);
}

void all_to_all(Rank& rank, Group group, const Tensor& in, const int64_t* send_rows,
                const Tensor& out, const int64_t* recv_rows, const char* what, At at) {
  const int n = group_size(rank, group), me = group_rank(rank, group);
  const int64_t row = row_bytes(in);
  const auto from = part_offsets(send_rows, n, in.dim[0], row);
  const auto to = part_offsets(recv_rows, n, out.dim[0], row);
  check(rank, "all_to_all", at,
        {{"both on the cpu", in.device == Device::CPU && out.device == Device::CPU},
         {"equal dtypes", in.dtype == out.dtype},
         {"rows of equal length", row == row_bytes(out)},
         {"both counts or none", !send_rows == !recv_rows},
         {"in's rows are the sent ones", send_rows ? from[n] <= in.bytes() : from[n] == in.bytes()},
         {"out has room", recv_rows ? to[n] <= out.bytes() : to[n] == out.bytes()}},
        {&in, &out});
  if (n == 1) return copy(out.data, in.data, from[1]);
  vector<int64_t> sizes(n);
  for (int i = 0; i < n; i++) sizes[i] = from[i + 1] - from[i];
  const Meeting m =
      meet(rank, {"all_to_all", what, group, at}, in.data, from[n], in.dtype, 0, sizes.data());
  for (int i = 0; i < n; i++) {
    const vector<int64_t>& sent = m.slots[i].counts;
    const int64_t want = to[i + 1] - to[i];
    if (sent[me] != want)
      fail_call(m.call, text(": rank %d sends %ld bytes to rank %d (need %ld, of %ld-byte rows)",
                             m.g.members[i], sent[me], rank.id, want, row));
    const int64_t begin = std::accumulate(sent.begin(), sent.begin() + me, int64_t{0});
    copy(out.data + to[i], m.slots[i].data.data() + begin, want);
  }
}

void broadcast(Rank& rank, Group group, const Tensor& t, int root, const char* what, At at) {
  const int n = group_size(rank, group);
  check(rank, "broadcast", at,
        {{"t on the cpu", t.device == Device::CPU},
         {"root is a member of the group", root >= 0 && root < n}},
        {&t});
  if (n == 1) return;
  const bool is_root = group_rank(rank, group) == root;
  const Meeting m =
      meet(rank, {"broadcast", what, group, at}, t.data, is_root ? t.bytes() : 0, t.dtype, root);
  copy(t.data, brought(m, root, t.bytes()), t.bytes());
}

void barrier(Rank& rank, Group group, const char* what, At at) {
  check(rank, "barrier", at, {}, {});
  if (group_size(rank, group) > 1) meet(rank, {"barrier", what, group, at}, nullptr, 0, DType::U8);
}

namespace {

string tag_text(const Transfer& t) {
  return text("kind %d, stage %d, micro-batch %d, %s", t.tag.kind, t.tag.stage, t.tag.micro_batch,
              describe(t.tensor).c_str());
}

// Receives `sent` into `t`.
void deliver(const Call& call, int from_rank, const Posted& sent, const Transfer& t) {
  const Tensor& tensor = sent.transfer.tensor;
  if (sent.transfer.tag != t.tag || tensor.dtype != t.tensor.dtype ||
      tensor.bytes() != t.tensor.bytes())
    fail_call(call,
              text(": message from rank %d is not the one expected (got %s, sent by "
                   "\"%s\"; need %s)",
                   from_rank, tag_text(sent.transfer).c_str(), sent.what, tag_text(t).c_str()));
  copy(t.tensor.data, tensor.data, tensor.bytes());
}

// One rank's group call of sends and receives.
struct Exchange {
  Rank& rank;
  GroupState& g;
  Call call;
  int me, n;
  vector<const Transfer*> recvs;  // still to come, in posted order

  vector<Posted>& channel(int from, int to) { return g.sends[from * n + to]; }
  int& unreceived(int member) { return rank.comm->world->ranks[g.members[member]].unreceived; }

  // The first receive that has a message, or the end. Only the first of each peer may take one.
  auto takeable() {
    return std::find_if(recvs.begin(), recvs.end(), [&](const Transfer* t) {
      const auto first = std::find_if(recvs.begin(), recvs.end(), [&](const Transfer* other) {
        return other->peer == t->peer;
      });
      return *first == t && !channel(t->peer, me).empty();
    });
  }

  vector<int> missing() {
    vector<int> ranks;
    for (int peer = 0; peer < n; peer++)
      if (!channel(me, peer).empty() ||
          std::any_of(recvs.begin(), recvs.end(),
                      [&](const Transfer* t) { return t->peer == peer; }))
        ranks.push_back(g.members[peer]);
    return ranks;
  }

  void run(const vector<const Transfer*>& sends) {
    std::unique_lock lock(rank.comm->world->mutex);
    g.sends.resize(size_t(n) * n);
    for (const Transfer* t : sends) channel(me, t->peer).push_back({*t, call.what});
    unreceived(me) = int(sends.size());
    g.changed.notify_all();
    while (!recvs.empty() || unreceived(me) > 0) {
      wait_for_others(
          rank, g, lock, call,
          [&] { return takeable() != recvs.end() || (recvs.empty() && unreceived(me) == 0); },
          [&] { return missing(); });
      if (recvs.empty()) break;
      const auto taken = takeable();
      const Transfer& t = **taken;
      recvs.erase(taken);
      vector<Posted>& queue = channel(t.peer, me);
      const Posted sent = std::move(queue.front());
      queue.erase(queue.begin());
      lock.unlock();
      deliver(call, g.members[t.peer], sent, t);
      lock.lock();
      unreceived(t.peer)--;
      g.changed.notify_all();
    }
  }
};

}  // namespace

void send_recv(Rank& rank, Group group, const Transfer* list, int n, const char* what, At at) {
  const int size = group_size(rank, group), me = group_rank(rank, group);
  const Call call{"send_recv", what, group, at};
  vector<const Transfer*> sends, recvs, own_sends, own_recvs;
  for (const Transfer* t = list; t < list + n; t++) {
    check(rank, "send_recv", at,
          {{"tensor on the cpu", t->tensor.device == Device::CPU},
           {"peer is a member of the group", t->peer >= 0 && t->peer < size}},
          {&t->tensor});
    if (t->kind == Transfer::Send)
      (t->peer == me ? own_sends : sends).push_back(t);
    else
      (t->peer == me ? own_recvs : recvs).push_back(t);
  }
  if (own_sends.size() != own_recvs.size())
    fail_call(call, text(": rank %d's messages to itself do not match in one call", rank.id));
  for (size_t i = 0; i < own_sends.size(); i++)
    deliver(call, rank.id, {*own_sends[i], what}, *own_recvs[i]);
  if (sends.empty() && recvs.empty()) return;
  GroupState& g = *rank.comm->group[int(group)];
  Exchange{rank, g, call, me, size, std::move(recvs)}.run(sends);
}

}  // namespace pith
