#include "comm/communicator.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>

#include "comm/launch.h"
#include "core/process.h"

// Present when linked: OpenBLAS's number of threads is the process's, OpenMP's each thread's own.
extern "C" [[gnu::weak]] void openblas_set_num_threads(int);
extern "C" [[gnu::weak]] void omp_set_num_threads(int);
extern "C" [[gnu::weak]] int omp_get_max_threads();

namespace pith {

struct Call {
  const char *op, *what;
  Group group;
  At at;
};

// What one member brings to others, copied; constant once sent.
struct Parcel {
  Call call;
  Tensor tensor;
  vector<char> data;
  int detail = 0;           // Reduce, or the root
  vector<i64> offsets;      // of the parts by destination, in all_to_all
  bool is_message = false;  // its sender waits until a receive is posted
  MessageTag tag;
};

// From one member to another: parcels are received in the order in which both ends post.
struct Channel {
  std::deque<std::shared_ptr<const Parcel>> parcels;
  size_t matched = 0;  // parcels that have a receive
  int wanted = 0;      // receives that have no parcel
};

struct GroupState {
  vector<int> members;
  vector<Channel> channels;  // by source * n + destination
};

struct World;

struct Comm {
  World* world = nullptr;
  Rank rank;
  Allocator allocator;
  GroupState* group[kGroups] = {};
  int place[kGroups] = {};
  double limit_s = 0, limit_after_startup_s = 0;
  std::condition_variable changed;
  int open = 0;  // receives, and sends of messages, that it waits for
  bool finished = false;
};

struct World {
  Mesh mesh;
  std::mutex mutex;
  std::deque<GroupState> groups;
  vector<Comm> ranks;
  int returned = 0;
  std::condition_variable over;
  int failed_rank = -1;
  int exit_code = 0;
  string message;
};

namespace {

using ParcelRef = std::shared_ptr<const Parcel>;

[[noreturn]] void fail_call(const Call& call, const string& what) {
  throw Error(kExitFailed,
              text("%s:%d: %s \"%s\"", call.at.file, call.at.line, call.op, call.what) + what);
}

// Under every collective and message: post what is sent and what is to be received, wait, pick up.
struct Exchange {
  Comm& mine;
  const Call& call;
  World& world = *mine.world;
  GroupState& group = *mine.group[int(call.group)];
  int n = int(group.members.size()), me = mine.place[int(call.group)];
  std::unique_lock<std::mutex> lock{world.mutex};

  Channel& channel(int from, int to) { return group.channels[from * n + to]; }

  void send(int to, const ParcelRef& parcel) {
    channel(me, to).parcels.push_back(parcel);
    mine.open += parcel->is_message;
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
      if (c.parcels[c.matched++]->is_message) settle(from);
    }
  }

  void settle(int member) {
    Comm& state = world.ranks[group.members[member]];
    if (--state.open == 0) state.changed.notify_one();
  }

  ParcelRef pick_up(int from, DType dtype, int detail = 0) {
    Channel& c = channel(from, me);
    const ParcelRef parcel = c.parcels.front();
    c.parcels.pop_front();
    c.matched--;
    const Call& its = parcel->call;
    const DType its_dtype = parcel->tensor.dtype;
    if (std::strcmp(its.op, call.op) != 0 || its_dtype != dtype || parcel->detail != detail)
      fail_call(call, text(": the members' calls differ (got %s \"%s\" of %s, %d, on rank %d at "
                           "%s:%d; need %s, %d)",
                           its.op, its.what, name_of(its_dtype), parcel->detail,
                           group.members[from], its.at.file, its.at.line, name_of(dtype), detail));
    return parcel;
  }

  bool waits_for(int peer) {
    const Channel& out = channel(me, peer);
    const bool unmatched = out.matched < out.parcels.size() && out.parcels.back()->is_message;
    return unmatched || channel(peer, me).wanted > 0;
  }

  // Three exits: all is matched; another rank failed; the time limit or a rank that has ended,
  // which is this rank's failure.
  void wait() {
    const std::chrono::duration<double> limit(mine.limit_s);
    const auto deadline = std::chrono::steady_clock::now() + limit;
    auto& waiting = mine.rank.status->waiting;
    snprintf(waiting, sizeof waiting, "%s \"%s\" (%s group) called at %s:%d", call.op, call.what,
             name_of(call.group), call.at.file, call.at.line);
    for (bool late = false; world.failed_rank < 0 && mine.open > 0;) {
      string names;
      bool ended = false;
      for (int peer = 0; peer < n; peer++) {
        if (!waits_for(peer)) continue;
        names += text("%s %d", names.empty() ? "" : ",", group.members[peer]);
        ended |= world.ranks[group.members[peer]].finished;
      }
      if (ended) fail_call(call, " waits for rank" + names + ", of which one has ended");
      if (late)
        fail_call(call, text(" waited %g s for rank%s (%s group)", limit.count(), names.c_str(),
                             name_of(call.group)));
      late = mine.changed.wait_until(lock, deadline) == std::cv_status::timeout;
    }
    if (world.failed_rank >= 0)
      throw Error(kExitFailed, text("stopped, because rank %d failed", world.failed_rank));
    waiting[0] = 0;
  }
};

std::shared_ptr<Parcel> pack(const Call& call, const Tensor& t) {
  return std::make_shared<Parcel>(Parcel{call, t.meta(), {t.data, t.data + t.bytes()}});
}

struct Meeting {
  const Rank& rank;
  Call call;
  vector<ParcelRef> parcels;

  const char* data(int member, i64 want) const {
    const vector<char>& bytes = parcels[member]->data;
    if (i64(bytes.size()) != want)
      fail_call(call, text(": rank %d brings %zu bytes (need %ld)",
                           group_member(rank, call.group, member), bytes.size(), want));
    return bytes.data();
  }
};

Meeting meet(Rank& rank, const Call& call, const Tensor& t, int detail = 0,
             const vector<i64>& offsets = {}) {
  const auto mine = pack(call, t);
  mine->detail = detail;
  mine->offsets = offsets;
  const int n = group_size(rank, call.group);
  if (n == 1) return {rank, call, {mine}};
  Meeting meeting{rank, call, {}};
  Exchange exchange{*rank.comm, call};
  for (int i = 0; i < n; i++) exchange.send(i, mine);
  for (int i = 0; i < n; i++) exchange.receive(i);
  exchange.wait();
  for (int i = 0; i < n; i++) meeting.parcels.push_back(exchange.pick_up(i, t.dtype, detail));
  return meeting;
}

i64 row_bytes(const Tensor& t) {
  i64 bytes = size_of(t.dtype);
  for (int i = 1; i < t.dim.rank; i++) bytes *= t.dim[i];
  return bytes;
}

// Byte offsets of n parts, and their sum.
vector<i64> part_offsets(const Tensor& whole, const i64* rows, int n) {
  vector<i64> offset(n + 1);
  for (int i = 0; i < n; i++)
    offset[i + 1] = offset[i] + (rows ? rows[i] : whole.dim[0] / n) * row_bytes(whole);
  return offset;
}

void copy(char* to, const char* from, i64 bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

template <class T>
void reduce_as(const Meeting& m, const Tensor& in, const Tensor& out, i64 begin, Reduce reduce) {
  copy(out.data, m.data(0, in.bytes()) + begin, out.bytes());
  for (size_t i = 1; i < m.parcels.size(); i++) {
    const T* x = reinterpret_cast<const T*>(m.data(int(i), in.bytes()) + begin);
    T* sum = out.as<T>();
    for (i64 k = 0, n = out.numel(); k < n; k++) {
      if (reduce == Reduce::Sum)
        sum[k] += x[k];
      else if (!(sum[k] >= x[k]) && sum[k] == sum[k])  // a NaN stays
        sum[k] = x[k];
    }
  }
}

// out = reduction, in the members' order, of their `in` from byte `begin` on.
void reduce_members(Rank& rank, const Call& call, const Tensor& in, const Tensor& out, i64 begin,
                    Reduce reduce) {
  const Meeting m = meet(rank, call, in, int(reduce));
  if (in.dtype == DType::F64) return reduce_as<double>(m, in, out, begin, reduce);
  reduce_as<float>(m, in, out, begin, reduce);
}

Need reducible(DType dtype) {
  return {"dtype is f32 or f64", dtype == DType::F32 || dtype == DType::F64};
}

}

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
                const i64* rows, At at) {
  const int n = group_size(rank, group), me = group_rank(rank, group);
  const auto offset = part_offsets(out, rows, n);
  check(rank, "all_gather", at,
        {{"equal dtypes", in.dtype == out.dtype},
         {"in's rows are this member's part", in.bytes() == offset[me + 1] - offset[me]},
         {"out's rows are all parts", out.bytes() == offset[n]}},
        {&in, &out});
  const Meeting m = meet(rank, {"all_gather", what, group, at}, in);
  for (int i = 0; i < n; i++) {
    const i64 bytes = offset[i + 1] - offset[i];
    copy(out.data + offset[i], m.data(i, bytes), bytes);
  }
}

void reduce_scatter(Rank& rank, Group group, const Tensor& in, const Tensor& out, const char* what,
                    const i64* rows, At at) {
  const int n = group_size(rank, group), me = group_rank(rank, group);
  const auto offset = part_offsets(in, rows, n);
  check(rank, "reduce_scatter", at,
        {reducible(in.dtype),
         {"equal dtypes", in.dtype == out.dtype},
         {"out's rows are this member's part", out.bytes() == offset[me + 1] - offset[me]},
         {"in's rows are all parts", in.bytes() == offset[n]}},
        {&in, &out});
  reduce_members(rank, {"reduce_scatter", what, group, at}, in, out, offset[me], Reduce::Sum);
}

void all_reduce(Rank& rank, Group group, const Tensor& t, Reduce reduce, const char* what, At at) {
  check(rank, "all_reduce", at, {reducible(t.dtype)}, {&t});
  if (group_size(rank, group) > 1)
    reduce_members(rank, {"all_reduce", what, group, at}, t, t, 0, reduce);
}

void all_reduce(Rank& rank, Group group, double* values, int n, Reduce reduce, const char* what,
                At at) {
  Tensor t;
  t.dim = {n};
  t.dtype = DType::F64;
  t.data = reinterpret_cast<char*>(values);
  all_reduce(rank, group, t, reduce, what, at);
}

void all_to_all(Rank& rank, Group group, const Tensor& in, const i64* send_rows, const Tensor& out,
                const i64* recv_rows, const char* what, At at) {
  const int n = group_size(rank, group), me = group_rank(rank, group);
  const auto from = part_offsets(in, send_rows, n), to = part_offsets(out, recv_rows, n);
  check(rank, "all_to_all", at,
        {{"equal dtypes", in.dtype == out.dtype},
         {"rows of equal length", row_bytes(in) == row_bytes(out)},
         {"in's rows are the sent ones", from[n] == in.bytes()},
         {"out has room", to[n] <= out.bytes()}},
        {&in, &out});
  if (n == 1) return copy(out.data, in.data, from[1]);
  const Meeting m = meet(rank, {"all_to_all", what, group, at}, in, 0, from);
  for (int i = 0; i < n; i++) {
    const Parcel& sent = *m.parcels[i];
    const i64 bytes = sent.offsets[me + 1] - sent.offsets[me], want = to[i + 1] - to[i];
    if (bytes != want)
      fail_call(m.call, text(": rank %d sends %ld bytes to rank %d (need %ld, of %ld-byte rows)",
                             group_member(rank, group, i), bytes, rank.id, want, row_bytes(in)));
    copy(out.data + to[i], sent.data.data() + sent.offsets[me], want);
  }
}

void broadcast(Rank& rank, Group group, const Tensor& t, int root, const char* what, At at) {
  check(rank, "broadcast", at,
        {{"root is a member of the group", root >= 0 && root < group_size(rank, group)}}, {&t});
  const Meeting m = meet(rank, {"broadcast", what, group, at}, t, root);
  copy(t.data, m.data(root, t.bytes()), t.bytes());
}

void barrier(Rank& rank, Group group, const char* what, At at) {
  check(rank, "barrier", at, {}, {});
  meet(rank, {"barrier", what, group, at}, Tensor{});
}

static string message_text(const MessageTag& tag, const Tensor& t) {
  return text("kind %d, stage %d, micro-batch %d, ", tag.kind, tag.stage, tag.micro_batch) +
         describe(t);
}

void send_recv(Rank& rank, Group group, const Transfer* list, int n, const char* what, At at) {
  if (n == 0) return;
  const Call call{"send_recv", what, group, at};
  vector<ParcelRef> parcels;
  for (const Transfer* t = list; t < list + n; t++) {
    check(rank, "send_recv", at,
          {{"peer is a member of the group", t->peer >= 0 && t->peer < group_size(rank, group)}},
          {&t->tensor});
    const auto parcel = t->kind == Transfer::Send ? pack(call, t->tensor) : nullptr;
    if (parcel) parcel->tag = t->tag;
    if (parcel) parcel->is_message = true;
    parcels.push_back(parcel);
  }
  {
    Exchange exchange{*rank.comm, call};
    for (int i = 0; i < n; i++)
      parcels[i] ? exchange.send(list[i].peer, parcels[i]) : exchange.receive(list[i].peer);
    exchange.wait();
    for (int i = 0; i < n; i++)
      if (!parcels[i]) parcels[i] = exchange.pick_up(list[i].peer, list[i].tensor.dtype);
  }
  for (int i = 0; i < n; i++) {
    const Transfer& want = list[i];
    const Parcel& got = *parcels[i];
    if (want.kind == Transfer::Send) continue;
    if (got.tag != want.tag || i64(got.data.size()) != want.tensor.bytes())
      fail_call(call, text(": message from rank %d is not the one expected (got ",
                           group_member(rank, group, want.peer)) +
                          message_text(got.tag, got.tensor) + ", sent by \"" + got.call.what +
                          "\"; need " + message_text(want.tag, want.tensor) + ")");
    copy(want.tensor.data, got.data.data(), want.tensor.bytes());
  }
}

static void connect(World& world) {
  for (int kind = 0; kind < kGroups; kind++)
    for (size_t rank = 0; rank < world.ranks.size(); rank++) {
      if (world.ranks[rank].group[kind]) continue;
      GroupState& g = world.groups.emplace_back();
      g.members = group_members(world.mesh, Group(kind), int(rank));
      const size_t n = g.members.size();
      g.channels.resize(n * n);
      for (size_t i = 0; i < n; i++) {
        world.ranks[g.members[i]].group[kind] = &g;
        world.ranks[g.members[i]].place[kind] = int(i);
      }
    }
}

static void run_rank(World& world, Comm& mine, void (*call)(void*, Rank&), void* fn) {
  const int n = int(world.ranks.size());
  mine.rank.status->thread = gettid();
  if (n > 1 && omp_set_num_threads) omp_set_num_threads(max(1, omp_get_max_threads() / n));
  int code = kExitDone;
  string error;
  try {
    call(fn, mine.rank);
  } catch (const Error& e) {
    code = e.exit_code;
    error = e.what();
  } catch (const std::exception& e) {
    code = kExitFailed;
    error = e.what();
  }
  const std::lock_guard lock(world.mutex);
  mine.finished = code == kExitDone;
  if (!mine.finished && world.failed_rank < 0) {
    world.failed_rank = mine.rank.id;
    world.exit_code = code;
    world.message = text("rank %d: ", mine.rank.id) + error;
    for (const Comm& other : world.ranks) {
      const Status& s = *other.rank.status;
      const char* doing = other.finished ? " has ended" : s.waiting[0] ? " waits" : " runs";
      char line[1024];
      world.message += string(line, status_line(line, sizeof line, s, doing));
    }
  }
  world.returned++;
  for (Comm& other : world.ranks) other.changed.notify_all();
  world.over.notify_all();
}

void run_rank_threads(const Mesh& mesh, Device device, const LaunchOptions& options,
                      void (*call)(void*, Rank&), void* fn) {
  const int n = mesh.world();
  if (n > kMaxRanks)
    bad_input("ranks", text("too many in one process (got %d, need at most %d)", n, kMaxRanks),
              "fewer ranks");
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
    failed("ranks", "this processor lacks AVX2 or FMA", "another machine");
  if (n > 1 && openblas_set_num_threads) openblas_set_num_threads(1);
  World world{.mesh = mesh, .ranks = vector<Comm>(n)};
  connect(world);
  for (int id = 0; id < n; id++) {
    Comm& comm = world.ranks[id];
    comm.world = &world;
    comm.limit_s = options.startup_limit_s;
    comm.limit_after_startup_s = options.limit_s;
    Status& board = status_board(id);
    board = Status{.rank = id};
    comm.rank = {.id = id,
                 .world = n,
                 .mesh = coord_of(mesh, id),
                 .device = device,
                 .compute = options.compute,
                 .allocator = &comm.allocator,
                 .comm = &comm,
                 .status = &board,
                 .debug = options.debug};
  }
  vector<std::thread> threads;
  for (Comm& comm : world.ranks) threads.emplace_back([&] { run_rank(world, comm, call, fn); });
  if (options.exit_on_failure) {
    std::unique_lock lock(world.mutex);
    world.over.wait(lock, [&] { return world.failed_rank >= 0 || world.returned == n; });
    if (world.failed_rank >= 0) {
      // A rank that hangs may hold the locks of stdio.
      const string line = "error: " + world.message + "\n";
      if (write(2, line.data(), line.size()) < 0) _exit(kExitFailed);
      _exit(world.exit_code);
    }
  }
  for (std::thread& thread : threads) thread.join();
  if (world.failed_rank >= 0) throw Error(world.exit_code, world.message);
}

void end_startup(Rank& rank) {
  if (rank.comm) rank.comm->limit_s = rank.comm->limit_after_startup_s;
}

}
