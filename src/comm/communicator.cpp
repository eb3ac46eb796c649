#include "comm/communicator.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "comm/world.h"

namespace pith {

namespace {

using ParcelRef = std::shared_ptr<const Parcel>;

[[noreturn]] void fail_call(const Call& call, const string& what) {
  throw Error(kExitFailed,
              text("%s:%d: %s \"%s\"", call.at.file, call.at.line, call.op, call.what) + what);
}

// One call of one rank: it posts what it sends and what it is to receive, then waits, holding
// World::mutex all the while. Every collective and message is one.
struct Exchange {
  Rank& rank;
  const Call& call;
  World& world = *rank.comm->world;
  GroupState& group = *rank.comm->group[int(call.group)];
  RankState& mine = world.ranks[rank.id];
  int n = int(group.members.size()), me = rank.comm->place[int(call.group)];
  std::unique_lock<std::mutex> lock{world.mutex};

  Channel& channel(int from, int to) { return group.channels[from * n + to]; }

  void send(int to, const ParcelRef& parcel) {
    channel(me, to).parcels.push_back(parcel);
    mine.open += parcel->message.defined();
    match(me, to);
  }

  void receive(int from) {
    channel(from, me).wanted++;
    mine.open++;
    match(from, me);
  }

  void match(int from, int to) {
    Channel& c = channel(from, to);
    while (c.wanted > 0 && c.matched < c.parcels.size()) {
      c.wanted--;
      settle(to);
      if (c.parcels[c.matched++]->message.defined()) settle(from);
    }
  }

  void settle(int member) {
    RankState& state = world.ranks[group.members[member]];
    if (--state.open == 0) state.changed.notify_one();
  }

  // A matched parcel; in the order of receive() a member.
  ParcelRef pick_up(int from) {
    Channel& c = channel(from, me);
    const ParcelRef parcel = c.parcels.front();
    c.parcels.pop_front();
    c.matched--;
    return parcel;
  }

  // The ranks that are waited for.
  vector<int> missing() {
    vector<int> late;
    for (int peer = 0; peer < n; peer++) {
      const Channel& out = channel(me, peer);
      const bool unsent = out.matched < out.parcels.size() && out.parcels.back()->message.defined();
      if (unsent || channel(peer, me).wanted > 0) late.push_back(group.members[peer]);
    }
    return late;
  }

  // The one place where the host waits for other ranks. Three exits: all is matched; another rank
  // failed; the time limit, which is this rank's failure, as is a rank that ended without coming.
  void wait() {
    const double limit_s = rank.comm->limit_s;
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(limit_s);
    mine.waits = true;
    mine.call = call;
    rank.status->waiting = call.what;
    for (bool timed_out = false; world.failed_rank < 0 && mine.open > 0;) {
      const vector<int> late = missing();
      string names = late.size() > 1 ? "ranks" : "rank";
      for (const int r : late) names += text("%s %d", r == late[0] ? "" : ",", r);
      if (std::ranges::any_of(late, [&](int r) { return world.ranks[r].finished; }))
        fail_call(call, " waits for " + names + ", of which one has ended");
      if (timed_out)
        fail_call(call, text(" waited %g s for %s (%s group)", limit_s, names.c_str(),
                             name_of(call.group)));
      timed_out = mine.changed.wait_until(lock, deadline) == std::cv_status::timeout;
    }
    if (world.failed_rank >= 0)
      throw Error(kExitFailed, text("stopped, because rank %d failed", world.failed_rank));
    mine.waits = false;
    rank.status->waiting = "";
  }
};

// What the members of a collective brought, in their order.
struct Meeting {
  const Rank& rank;
  Call call;
  vector<ParcelRef> parcels;

  // The data of member `i`, which must be `want` bytes.
  const char* data(int i, int64_t want) const {
    const vector<char>& bytes = parcels[i]->data;
    if (int64_t(bytes.size()) != want)
      fail_call(call, text(": rank %d brings %zu bytes (need %ld)",
                           group_member(rank, call.group, i), bytes.size(), want));
    return bytes.data();
  }
};

// Brings a copy of `data` to all members, and waits for theirs, in the same call.
Meeting meet(Rank& rank, const Call& call, const char* data, int64_t bytes, DType dtype,
             int detail = 0, const vector<int64_t>& offsets = {}) {
  const ParcelRef mine = std::make_shared<Parcel>(Parcel{.call = call,
                                                         .dtype = dtype,
                                                         .detail = detail,
                                                         .offsets = offsets,
                                                         .data = {data, data + bytes}});
  const int n = group_size(rank, call.group);
  if (n == 1) return {rank, call, {mine}};
  Meeting meeting{rank, call, {}};
  {
    Exchange exchange{rank, call};
    for (int i = 0; i < n; i++) exchange.send(i, mine);
    for (int i = 0; i < n; i++) exchange.receive(i);
    exchange.wait();
    for (int i = 0; i < n; i++) meeting.parcels.push_back(exchange.pick_up(i));
  }
  for (int i = 0; i < n; i++) {
    const Parcel& other = *meeting.parcels[i];
    if (std::strcmp(other.call.op, call.op) != 0 || other.dtype != dtype || other.detail != detail)
      fail_call(call, text(": the members' calls differ: rank %d is in %s \"%s\" of %s, detail %d, "
                           "called at %s:%d (this one: %s, detail %d)",
                           group_member(rank, call.group, i), other.call.op, other.call.what,
                           name_of(other.dtype), other.detail, other.call.at.file,
                           other.call.at.line, name_of(dtype), detail));
  }
  return meeting;
}

int64_t row_bytes(const Tensor& t) {
  int64_t bytes = size_of(t.dtype);
  for (int i = 1; i < t.dim.rank; i++) bytes *= t.dim[i];
  return bytes;
}

// Byte offsets of the n parts of `whole`, and their sum; equal parts without counts.
vector<int64_t> part_offsets(const Tensor& whole, const int64_t* rows, int n) {
  vector<int64_t> offset(n + 1, 0);
  for (int i = 0; i < n; i++)
    offset[i + 1] = offset[i] + (rows ? rows[i] : whole.dim[0] / n) * row_bytes(whole);
  return offset;
}

void copy(char* to, const char* from, int64_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

template <class T>
void add(T* to, const T* x, int64_t bytes, Reduce reduce) {
  for (int64_t i = 0, n = bytes / int64_t{sizeof(T)}; i < n; i++) {
    if (reduce == Reduce::Sum)
      to[i] += x[i];
    else if (!(to[i] >= x[i]) && to[i] == to[i])  // a NaN stays
      to[i] = x[i];
  }
}

// to [bytes] = reduction over members, in their order, of what they brought, `all` bytes, from byte
// `begin` on.
void reduce_members(const Meeting& m, DType dtype, char* to, int64_t begin, int64_t bytes,
                    int64_t all, Reduce reduce) {
  for (size_t i = 0; i < m.parcels.size(); i++) {
    const char* x = m.data(int(i), all) + begin;
    if (i == 0)
      copy(to, x, bytes);
    else if (dtype == DType::F32)
      add(reinterpret_cast<float*>(to), reinterpret_cast<const float*>(x), bytes, reduce);
    else if (dtype == DType::F64)
      add(reinterpret_cast<double*>(to), reinterpret_cast<const double*>(x), bytes, reduce);
    else
      add(reinterpret_cast<int32_t*>(to), reinterpret_cast<const int32_t*>(x), bytes, reduce);
  }
}

bool reducible(DType dtype) {
  return dtype == DType::F32 || dtype == DType::F64 || dtype == DType::I32;
}

void all_reduce_bytes(Rank& rank, const Call& call, char* data, int64_t bytes, DType dtype,
                      Reduce reduce) {
  if (group_size(rank, call.group) == 1) return;
  const Meeting m = meet(rank, call, data, bytes, dtype, int(reduce));
  reduce_members(m, dtype, data, 0, bytes, bytes, reduce);
}

}  // namespace

int group_size(const Rank& rank, Group group) {
  return rank.comm ? int(rank.comm->group[int(group)]->members.size()) : 1;
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
  const auto offset = part_offsets(out, rows, n);
  check(rank, "all_gather", at,
        {{"equal dtypes", in.dtype == out.dtype},
         {"in's rows are this member's part", in.bytes() == offset[me + 1] - offset[me]},
         {"out's rows are all parts", out.bytes() == offset[n]}},
        {&in, &out});
  const Meeting m = meet(rank, {"all_gather", what, group, at}, in.data, in.bytes(), in.dtype);
  for (int i = 0; i < n; i++) {
    const int64_t bytes = offset[i + 1] - offset[i];
    copy(out.data + offset[i], m.data(i, bytes), bytes);
  }
}

void reduce_scatter(Rank& rank, Group group, const Tensor& in, const Tensor& out, const char* what,
                    const int64_t* rows, At at) {
  const int n = group_size(rank, group), me = group_rank(rank, group);
  const auto offset = part_offsets(in, rows, n);
  check(rank, "reduce_scatter", at,
        {{"dtype is f32, f64 or i32", reducible(in.dtype)},
         {"equal dtypes", in.dtype == out.dtype},
         {"out's rows are this member's part", out.bytes() == offset[me + 1] - offset[me]},
         {"in's rows are all parts", in.bytes() == offset[n]}},
        {&in, &out});
  const Meeting m = meet(rank, {"reduce_scatter", what, group, at}, in.data, in.bytes(), in.dtype);
  reduce_members(m, in.dtype, out.data, offset[me], out.bytes(), in.bytes(), Reduce::Sum);
}

void all_reduce(Rank& rank, Group group, const Tensor& t, Reduce reduce, const char* what, At at) {
  check(rank, "all_reduce", at, {{"dtype is f32, f64 or i32", reducible(t.dtype)}}, {&t});
  all_reduce_bytes(rank, {"all_reduce", what, group, at}, t.data, t.bytes(), t.dtype, reduce);
}

void all_reduce(Rank& rank, Group group, double* values, int n, Reduce reduce, const char* what,
                At at) {
  all_reduce_bytes(rank, {"all_reduce", what, group, at}, reinterpret_cast<char*>(values),
                   n * int64_t{sizeof(double)}, DType::F64, reduce);
}

void all_to_all(Rank& rank, Group group, const Tensor& in, const int64_t* send_rows,
                const Tensor& out, const int64_t* recv_rows, const char* what, At at) {
  const int n = group_size(rank, group), me = group_rank(rank, group);
  const auto from = part_offsets(in, send_rows, n), to = part_offsets(out, recv_rows, n);
  check(rank, "all_to_all", at,
        {{"equal dtypes", in.dtype == out.dtype},
         {"rows of equal length", row_bytes(in) == row_bytes(out)},
         {"both counts or none", !send_rows == !recv_rows},
         {"in's rows are the sent ones", send_rows ? from[n] <= in.bytes() : from[n] == in.bytes()},
         {"out has room", recv_rows ? to[n] <= out.bytes() : to[n] == out.bytes()}},
        {&in, &out});
  if (n == 1) return copy(out.data, in.data, from[1]);
  const Meeting m =
      meet(rank, {"all_to_all", what, group, at}, in.data, from[n], in.dtype, 0, from);
  for (int i = 0; i < n; i++) {
    const vector<int64_t>& sent = m.parcels[i]->offsets;
    const int64_t got = sent[me + 1] - sent[me], want = to[i + 1] - to[i];
    if (got != want)
      fail_call(m.call, text(": rank %d sends %ld bytes to rank %d (need %ld, of %ld-byte rows)",
                             group_member(rank, group, i), got, rank.id, want, row_bytes(in)));
    copy(out.data + to[i], m.parcels[i]->data.data() + sent[me], want);
  }
}

void broadcast(Rank& rank, Group group, const Tensor& t, int root, const char* what, At at) {
  check(rank, "broadcast", at,
        {{"root is a member of the group", root >= 0 && root < group_size(rank, group)}}, {&t});
  const int64_t bytes = group_rank(rank, group) == root ? t.bytes() : 0;
  const Meeting m = meet(rank, {"broadcast", what, group, at}, t.data, bytes, t.dtype, root);
  copy(t.data, m.data(root, t.bytes()), t.bytes());
}

void barrier(Rank& rank, Group group, const char* what, At at) {
  check(rank, "barrier", at, {}, {});
  meet(rank, {"barrier", what, group, at}, nullptr, 0, DType::U8);
}

static string message_text(const MessageTag& tag, const Tensor& t) {
  return text("kind %d, stage %d, micro-batch %d, ", tag.kind, tag.stage, tag.micro_batch) +
         describe(t);
}

void send_recv(Rank& rank, Group group, const Transfer* list, int n, const char* what, At at) {
  const Call call{"send_recv", what, group, at};
  vector<ParcelRef> parcels(n);
  for (int i = 0; i < n; i++) {
    const Transfer& t = list[i];
    check(rank, "send_recv", at,
          {{"peer is a member of the group", t.peer >= 0 && t.peer < group_size(rank, group)}},
          {&t.tensor});
    if (t.kind == Transfer::Send)
      parcels[i] = std::make_shared<Parcel>(
          Parcel{.call = call,
                 .dtype = t.tensor.dtype,
                 .tag = t.tag,
                 .message = t.tensor.meta(),
                 .data = {t.tensor.data, t.tensor.data + t.tensor.bytes()}});
  }
  if (n == 0) return;
  {
    Exchange exchange{rank, call};
    for (int i = 0; i < n; i++)
      parcels[i] ? exchange.send(list[i].peer, parcels[i]) : exchange.receive(list[i].peer);
    exchange.wait();
    for (int i = 0; i < n; i++)
      if (!parcels[i]) parcels[i] = exchange.pick_up(list[i].peer);
  }
  for (int i = 0; i < n; i++) {
    const Transfer& t = list[i];
    const Parcel& sent = *parcels[i];
    if (t.kind == Transfer::Send) continue;
    if (sent.tag != t.tag || sent.dtype != t.tensor.dtype ||
        int64_t(sent.data.size()) != t.tensor.bytes())
      fail_call(call, text(": message from rank %d is not the one expected (got ",
                           group_member(rank, group, t.peer)) +
                          message_text(sent.tag, sent.message) + ", sent by \"" + sent.call.what +
                          "\"; need " + message_text(t.tag, t.tensor) + ")");
    copy(t.tensor.data, sent.data.data(), t.tensor.bytes());
  }
}

}  // namespace pith
