#include "comm/communicator.h"

#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "comm/launch.h"
#include "core/cuda.h"
#include "core/process.h"

// OpenBLAS's number of threads is the process's; OpenMP's is each thread's own.
extern "C" [[gnu::weak]] void openblas_set_num_threads(int);
extern "C" [[gnu::weak]] void omp_set_num_threads(int);
extern "C" [[gnu::weak]] int omp_get_max_threads();

namespace pith {

struct Call {
  const char *op, *what;
  Group group;
  At at;
};

struct Parcel {
  Call call;
  Tensor meta;
  std::shared_ptr<const char> data;
  i64 bytes;
  int to;
  int detail;  // Reduce, or the root
  MessageTag tag = {};
};

struct Channel {
  std::deque<Parcel> parcels;
  int unmatched = 0;  // parcels sent, less receives posted
};

struct GroupState {
  vector<int> members;
  vector<Channel> channels;
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
  int open = 0;  // sends and receives that it waits for
  bool finished = false;
};

struct World {
  Mesh mesh;
  std::mutex mutex;
  std::map<std::pair<int, int>, GroupState> groups;  // by kind and first member
  vector<Comm> ranks;
  bool exit_on_failure = false;
  int failed_rank = -1;
  int exit_code = 0;
  string message;
};

namespace {

[[noreturn]] void fail_call(const Call& call, const string& what) {
  throw Error(kExitFailed,
              text("%s:%d: %s \"%s\"", call.at.file, call.at.line, call.op, call.what) + what);
}

// Under every collective and message: post, wait, take.
struct Exchange {
  Comm& mine;
  const Call& call;
  World& world = *mine.world;
  GroupState& group = *mine.group[int(call.group)];
  int n = int(group.members.size()), me = mine.place[int(call.group)];
  std::unique_lock<std::mutex> lock = {};

  Channel& channel(int from, int to) { return group.channels[from * n + to]; }

  void post(int from, int to, int sign) {
    Channel& c = channel(from, to);
    bool matches = c.unmatched * sign < 0;
    c.unmatched += sign;
    mine.open++;
    for (const int member : {from, to}) {
      Comm& end = world.ranks[group.members[member]];
      if (matches && --end.open == 0) end.changed.notify_one();
    }
  }

  // The time limit, or a rank that has ended, is this rank's failure.
  void wait() {
    const std::chrono::duration<double> limit(mine.limit_s);
    auto deadline = std::chrono::steady_clock::now() + limit;
    auto& waiting = mine.rank.status->waiting;
    snprintf(waiting, sizeof waiting, "%s \"%s\" (%s group) called at %s:%d", call.op, call.what,
             name_of(call.group), call.at.file, call.at.line);
    for (bool late = false; world.failed_rank < 0 && mine.open > 0;) {
      string names;
      bool ended = false;
      for (int peer = 0; peer < n; peer++) {
        if (channel(me, peer).unmatched <= 0 && channel(peer, me).unmatched >= 0) continue;
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

  vector<Parcel> run(vector<Parcel>&& sent, const vector<int>& from) {
    lock = std::unique_lock(world.mutex);
    for (Parcel& parcel : sent) {
      int to = parcel.to;
      channel(me, to).parcels.push_back(std::move(parcel));
      post(me, to, 1);
    }
    for (const int peer : from) post(peer, me, -1);
    wait();
    vector<Parcel> got;
    for (const int peer : from) {
      auto& parcels = channel(peer, me).parcels;
      got.push_back(std::move(parcels.front()));
      parcels.pop_front();
    }
    return got;
  }
};

std::shared_ptr<const char> copy_of(const Tensor& t) {
  auto whole = std::make_shared<vector<char>>(t.data, t.data + t.bytes());
  return {whole, whole->data()};
}

void copy(char* to, const Parcel& from) {
  if (from.bytes > 0) std::memcpy(to, from.data.get(), from.bytes);
}

i64 row_bytes(const Tensor& t) {
  i64 bytes = size_of(t.dtype);
  for (int i = 1; i < t.dim.rank; i++) bytes *= t.dim[i];
  return bytes;
}

// Bytes before each member's part of a tensor, and of all.
using Parts = vector<i64>;
Parts parts_of(const Tensor& whole, const i64* rows, int n) {
  Parts begin(n + 1);
  for (int i = 0; i < n; i++)
    begin[i + 1] = begin[i] + (rows ? rows[i] : whole.dim[0] / n) * row_bytes(whole);
  return begin;
}
i64 bytes_of(const Tensor& whole, const Parts& parts, int i) {
  return parts.empty() ? whole.bytes() : parts[i + 1] - parts[i];
}

// Without parts, `in` goes to each whole; without places, each sends as much as `out`, and nothing
// is written.
vector<Parcel> meet(Rank& rank, const Call& call, const Tensor& in, const Parts& parts,
                    const Tensor& out, const Parts& places, int detail = 0) {
  int n = group_size(rank, call.group);
  auto whole = copy_of(in);
  vector<Parcel> sent, got;
  vector<int> members(n);
  for (int i = 0; i < n; i++) {
    members[i] = i;
    const char* begin = whole.get() + (parts.empty() ? 0 : parts[i]);
    sent.push_back({call, in.meta(), {whole, begin}, bytes_of(in, parts, i), i, detail});
  }
  if (n > 1)
    got = Exchange{*rank.comm, call}.run(std::move(sent), members);
  else
    got = std::move(sent);
  for (int i = 0; i < n; i++) {
    const Parcel& p = got[i];
    const Call& its = p.call;
    int member = group_member(rank, call.group, i);
    if (std::strcmp(its.op, call.op) != 0 || p.meta.dtype != in.dtype || p.detail != detail)
      fail_call(call, text(": the members' calls differ (got %s \"%s\" of %s, %d, on rank %d at "
                           "%s:%d; need %s, %d)",
                           its.op, its.what, name_of(p.meta.dtype), p.detail, member, its.at.file,
                           its.at.line, name_of(in.dtype), detail));
    if (i64 need = bytes_of(out, places, i); p.bytes != need)
      fail_call(call, text(": rank %d sends %ld bytes to rank %d (need %ld, of %ld-byte rows)",
                           member, p.bytes, rank.id, need, row_bytes(in)));
    if (!places.empty()) copy(out.data + places[i], p);
  }
  return got;
}

template <class T>
void reduce_as(const Tensor& out, const vector<Parcel>& got, Reduce reduce) {
  T* sum = out.as<T>();
  copy(out.data, got[0]);
  for (size_t i = 1; i < got.size(); i++) {
    const T* x = reinterpret_cast<const T*>(got[i].data.get());
    for (i64 k = 0, n = out.numel(); k < n; k++) {
      if (reduce == Reduce::Sum)
        sum[k] += x[k];
      else if (!(sum[k] >= x[k]) && sum[k] == sum[k])  // a NaN stays
        sum[k] = x[k];
    }
  }
}

void reduce_parts(Rank& rank, const Call& call, const Tensor& in, const Parts& parts,
                  const Tensor& out, Reduce reduce) {
  vector<Parcel> got = meet(rank, call, in, parts, out, {}, int(reduce));
  if (in.dtype == DType::F64) return reduce_as<double>(out, got, reduce);
  reduce_as<float>(out, got, reduce);
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
  int n = group_size(rank, group), me = group_rank(rank, group);
  const Parts parts = parts_of(out, rows, n);
  check(rank, "all_gather", at,
        {{"equal dtypes", in.dtype == out.dtype},
         {"in's rows are this member's part", in.bytes() == bytes_of(out, parts, me)},
         {"out's rows are all parts", out.bytes() == parts[n]}},
        {&in, &out});
  meet(rank, {"all_gather", what, group, at}, in, {}, out, parts);
}

void reduce_scatter(Rank& rank, Group group, const Tensor& in, const Tensor& out, const char* what,
                    const i64* rows, At at) {
  int n = group_size(rank, group), me = group_rank(rank, group);
  const Parts parts = parts_of(in, rows, n);
  check(rank, "reduce_scatter", at,
        {reducible(in.dtype),
         {"equal dtypes", in.dtype == out.dtype},
         {"out's rows are this member's part", out.bytes() == bytes_of(in, parts, me)},
         {"in's rows are all parts", in.bytes() == parts[n]}},
        {&in, &out});
  reduce_parts(rank, {"reduce_scatter", what, group, at}, in, parts, out, Reduce::Sum);
}

void all_reduce(Rank& rank, Group group, const Tensor& t, Reduce reduce, const char* what, At at) {
  check(rank, "all_reduce", at, {reducible(t.dtype)}, {&t});
  if (group_size(rank, group) > 1)
    reduce_parts(rank, {"all_reduce", what, group, at}, t, {}, t, reduce);
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
  int n = group_size(rank, group);
  const Parts from = parts_of(in, send_rows, n), to = parts_of(out, recv_rows, n);
  check(rank, "all_to_all", at,
        {{"equal dtypes", in.dtype == out.dtype},
         {"rows of equal length", row_bytes(in) == row_bytes(out)},
         {"in's rows are the sent ones", from[n] == in.bytes()},
         {"out has room", to[n] <= out.bytes()}},
        {&in, &out});
  meet(rank, {"all_to_all", what, group, at}, in, from, out, to);
}

void broadcast(Rank& rank, Group group, const Tensor& t, int root, const char* what, At at) {
  check(rank, "broadcast", at,
        {{"root is a member of the group", root >= 0 && root < group_size(rank, group)}}, {&t});
  copy(t.data, meet(rank, {"broadcast", what, group, at}, t, {}, t, {}, root)[root]);
}

void barrier(Rank& rank, Group group, const char* what, At at) {
  check(rank, "barrier", at, {}, {});
  meet(rank, {"barrier", what, group, at}, {}, {}, {}, {});
}

static string message_text(const MessageTag& tag, const Tensor& t) {
  return text("kind %d, stage %d, micro-batch %d, ", tag.kind, tag.stage, tag.micro_batch) +
         describe(t);
}

void send_recv(Rank& rank, Group group, const Transfer* list, int n, const char* what, At at) {
  const Call call{"send_recv", what, group, at};
  vector<Parcel> sent;
  vector<int> peers;
  vector<const Transfer*> wanted;
  for (const Transfer* t = list; t < list + n; t++) {
    check(rank, "send_recv", at,
          {{"peer is a member of the group", t->peer >= 0 && t->peer < group_size(rank, group)}},
          {&t->tensor});
    const Tensor& x = t->tensor;
    if (t->kind == Transfer::Send) {
      sent.push_back({call, x.meta(), copy_of(x), x.bytes(), t->peer, 0, t->tag});
    } else {
      peers.push_back(t->peer);
      wanted.push_back(t);
    }
  }
  if (n == 0) return;
  vector<Parcel> got = Exchange{*rank.comm, call}.run(std::move(sent), peers);
  for (size_t i = 0; i < got.size(); i++) {
    const Tensor& x = wanted[i]->tensor;
    if (got[i].tag != wanted[i]->tag || got[i].meta.dtype != x.dtype || got[i].bytes != x.bytes())
      fail_call(call, text(": message from rank %d is not the one expected (got ",
                           group_member(rank, group, peers[i])) +
                          message_text(got[i].tag, got[i].meta) + ", sent by \"" +
                          got[i].call.what + "\"; need " + message_text(wanted[i]->tag, x) + ")");
    copy(x.data, got[i]);
  }
}

static void run_rank(World& world, Comm& mine, void (*call)(void*, Rank&), void* fn) {
  int n = int(world.ranks.size());
  mine.rank.status->thread = gettid();
  if (n > 1 && omp_set_num_threads) omp_set_num_threads(max(1, omp_get_max_threads() / n));
  int code = kExitDone;
  string error;
  try {
    if constexpr (kCuda)
      if (mine.rank.device == Device::CUDA) mine.allocator.cuda = cuda_open(mine.rank.id);
    call(fn, mine.rank);
    if constexpr (kCuda)
      if (mine.allocator.cuda) cuda_close(std::exchange(mine.allocator.cuda, nullptr));
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
    // A rank that hangs may hold the locks of stdio.
    string all = "error: " + world.message + "\n";
    if (world.exit_on_failure) _exit(write(2, all.data(), all.size()) < 0 ? kExitFailed : code);
  }
  for (Comm& other : world.ranks) other.changed.notify_all();
}

void run_rank_threads(const Mesh& mesh, Device device, const LaunchOptions& options,
                      void (*call)(void*, Rank&), void* fn) {
  int n = mesh.world();
  if (n > kMaxRanks)
    bad_input("ranks", text("too many in one process (got %d, need at most %d)", n, kMaxRanks),
              "fewer ranks");
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
    failed("ranks", "this processor lacks AVX2 or FMA", "another machine");
  if (n > 1 && openblas_set_num_threads) openblas_set_num_threads(1);
  World world{.mesh = mesh, .ranks = vector<Comm>(n), .exit_on_failure = options.exit_on_failure};
  for (int id = 0; id < n; id++) {
    Comm& comm = world.ranks[id];
    for (int kind = 0; kind < kGroups; kind++) {
      vector<int> members = group_members(mesh, Group(kind), id);
      GroupState& group = world.groups[{kind, members[0]}];
      group.members = members;
      group.channels.resize(members.size() * members.size());
      comm.group[kind] = &group;
      while (members[comm.place[kind]] != id) comm.place[kind]++;
    }
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
  for (std::thread& thread : threads) thread.join();
  if (world.failed_rank >= 0) throw Error(world.exit_code, world.message);
}

void end_startup(Rank& rank) {
  if (rank.comm) rank.comm->limit_s = rank.comm->limit_after_startup_s;
}

}
