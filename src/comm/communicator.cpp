#include "comm/communicator.h"

#include <unistd.h>

#include <algorithm>
#include <array>
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
  int to;        // rank
  string label;  // the receiver has an equal one
  std::shared_ptr<const char> data;
  i64 bytes;
};

struct Channel {
  std::deque<Parcel> parcels;
  int unmatched = 0;  // parcels sent, less receives posted
};

struct World;

struct Comm {
  World* world = nullptr;
  Rank rank;
  Allocator allocator;
  vector<int> members[kGroups];
  double limit_s = 0;
  std::condition_variable changed;
  int open = 0;  // sends and receives that it waits for
  bool finished = false;
};

struct World {
  Mesh mesh;
  LaunchOptions options;
  std::mutex mutex;
  std::map<std::array<int, 3>, Channel> channels;  // by group, sender and receiver
  vector<Comm> ranks;
  int failed_rank = -1;
  int exit_code = 0;
  string message;
};

static vector<int> members_of(const Rank& rank, Group group) {
  return rank.comm ? rank.comm->members[int(group)] : vector<int>{rank.id};
}

int group_size(const Rank& rank, Group group) { return int(members_of(rank, group).size()); }

int group_rank(const Rank& rank, Group group) {
  vector<int> members = members_of(rank, group);
  return int(std::ranges::find(members, rank.id) - members.begin());
}

const Mesh& mesh_of(const Rank& rank) { return rank.comm->world->mesh; }

namespace {

[[noreturn]] void fail_call(const Call& call, const string& what) {
  throw Error(
      kExitFailed, text("%s:%d: %s \"%s\"", call.at.file, call.at.line, call.op, call.what) + what);
}

// Under every collective and message: post, wait, take.
struct Exchange {
  const Call& call;
  Comm& mine;
  World& world = *mine.world;
  int me = mine.rank.id;
  std::unique_lock<std::mutex> lock{world.mutex};

  Channel& channel(int from, int to) { return world.channels[{int(call.group), from, to}]; }

  void post(int from, int to, int sign) {
    Channel& c = channel(from, to);
    bool matches = c.unmatched * sign < 0;
    c.unmatched += sign;
    mine.open++;
    for (const int rank : {from, to}) {
      Comm& end = world.ranks[rank];
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
      for (const int peer : mine.members[int(call.group)]) {
        if (channel(me, peer).unmatched <= 0 && channel(peer, me).unmatched >= 0) continue;
        names += text("%s %d", names.empty() ? "" : ",", peer);
        ended |= world.ranks[peer].finished;
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

// Of a parcel that `from` sent; `fault` unless the labels are equal.
void take(const Call& call, const Parcel& got, const string& label, int from, const string& fault,
    char* to) {
  if (got.label != label)
    fail_call(call, text(": %s (got %s, sent by \"%s\" of rank %d at %s:%d; need %s)",
                        fault.c_str(), got.label.c_str(), got.call.what, from, got.call.at.file,
                        got.call.at.line, label.c_str()));
  if (to && got.bytes > 0) std::memcpy(to, got.data.get(), got.bytes);
}

i64 row_bytes(const Tensor& t) {
  i64 bytes = size_of(t.dtype);
  for (int i = 1; i < t.dim.rank; i++) bytes *= t.dim[i];
  return bytes;
}

// Bytes before each member's part of a tensor, and of all.
using Parts = vector<i64>;
Parts parts_of(const Rank& rank, Group group, const Tensor& whole, const i64* rows) {
  int n = group_size(rank, group);
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
  check(rank, call.op, call.at,
      {{"equal dtypes", in.dtype == out.dtype},
          {"rows of equal length", row_bytes(in) == row_bytes(out)},
          {"in's rows are all parts", parts.empty() || parts.back() == in.bytes()},
          {"out's rows are all parts", places.empty() || places.back() == out.bytes()}},
      {&in, &out});
  const vector<int> members = members_of(rank, call.group);
  string label = text("%s of %s, %d", call.op, name_of(in.dtype), detail);
  auto whole = copy_of(in);
  vector<Parcel> sent, got;
  for (int i = 0; i < int(members.size()); i++) {
    const char* begin = whole.get() + (parts.empty() ? 0 : parts[i]);
    sent.push_back({call, members[i], label, {whole, begin}, bytes_of(in, parts, i)});
  }
  got = members.size() == 1 ? sent : Exchange{call, *rank.comm}.run(std::move(sent), members);
  for (int i = 0; i < int(members.size()); i++) {
    i64 need = bytes_of(out, places, i);
    bool fits = got[i].bytes == need;
    take(call, got[i], label, members[i], "the members' calls differ",
        fits && !places.empty() ? out.data + places[i] : nullptr);
    if (!fits)
      fail_call(call, text(": rank %d sends %ld bytes to rank %d (need %ld, of %ld-byte rows)",
                          members[i], got[i].bytes, rank.id, need, row_bytes(in)));
  }
  return got;
}

template <class T>
void reduce_as(const Tensor& out, const vector<Parcel>& got, Reduce reduce) {
  for (size_t i = 0; i < got.size(); i++) {
    T* sum = out.as<T>();
    const T* x = reinterpret_cast<const T*>(got[i].data.get());
    for (i64 k = 0, n = out.numel(); k < n; k++) {
      if (i == 0)
        sum[k] = x[k];
      else if (reduce == Reduce::Sum)
        sum[k] += x[k];
      else if (!(sum[k] >= x[k]) && sum[k] == sum[k])  // a NaN stays
        sum[k] = x[k];
    }
  }
}

void reduce_parts(Rank& rank, const Call& call, const Tensor& in, const Parts& parts,
    const Tensor& out, Reduce reduce) {
  bool wide = in.dtype == DType::F64;
  check(rank, call.op, call.at, {{"dtype is f32 or f64", wide || in.dtype == DType::F32}}, {&in});
  vector<Parcel> got = meet(rank, call, in, parts, out, {}, int(reduce));
  wide ? reduce_as<double>(out, got, reduce) : reduce_as<float>(out, got, reduce);
}

}

void all_gather(Rank& rank, Group group, const Tensor& in, const Tensor& out, const char* what,
    const i64* rows, At at) {
  meet(rank, {"all_gather", what, group, at}, in, {}, out, parts_of(rank, group, out, rows));
}

void reduce_scatter(Rank& rank, Group group, const Tensor& in, const Tensor& out, const char* what,
    const i64* rows, At at) {
  reduce_parts(rank, {"reduce_scatter", what, group, at}, in, parts_of(rank, group, in, rows), out,
      Reduce::Sum);
}

void all_reduce(Rank& rank, Group group, const Tensor& t, Reduce reduce, const char* what, At at) {
  if (group_size(rank, group) > 1)
    reduce_parts(rank, {"all_reduce", what, group, at}, t, {}, t, reduce);
}

void all_reduce(
    Rank& rank, Group group, double* values, int n, Reduce reduce, const char* what, At at) {
  Tensor t;
  t.dim = {n};
  t.dtype = DType::F64;
  t.data = reinterpret_cast<char*>(values);
  all_reduce(rank, group, t, reduce, what, at);
}

void all_to_all(Rank& rank, Group group, const Tensor& in, const i64* send_rows, const Tensor& out,
    const i64* recv_rows, const char* what, At at) {
  meet(rank, {"all_to_all", what, group, at}, in, parts_of(rank, group, in, send_rows), out,
      parts_of(rank, group, out, recv_rows));
}

void broadcast(Rank& rank, Group group, const Tensor& t, int root, const char* what, At at) {
  vector<Parcel> got = meet(rank, {"broadcast", what, group, at}, t, {}, t, {}, root);
  if (t.bytes() > 0) std::memcpy(t.data, got.at(root).data.get(), t.bytes());
}

void barrier(Rank& rank, Group group, const char* what, At at) {
  meet(rank, {"barrier", what, group, at}, {}, {}, {}, {});
}

void send_recv(Rank& rank, Group group, const Transfer* list, int n, const char* what, At at) {
  const Call call{"send_recv", what, group, at};
  vector<Parcel> sent;
  vector<int> from;
  check(rank, call.op, at, {}, {});
  if (n == 0) return;
  auto label = [](const Transfer& t) {
    return text("kind %d, stage %d, micro-batch %d, [%ld] %s", t.tag.kind, t.tag.stage,
        t.tag.micro_batch, t.tensor.numel(), name_of(t.tensor.dtype));
  };
  for (const Transfer* t = list; t < list + n; t++) {
    int peer = members_of(rank, group).at(t->peer);
    if (t->kind == Transfer::Send)
      sent.push_back({call, peer, label(*t), copy_of(t->tensor), t->tensor.bytes()});
    else
      from.push_back(peer);
  }
  vector<Parcel> got = Exchange{call, *rank.comm}.run(std::move(sent), from);
  size_t i = 0;
  for (const Transfer* t = list; t < list + n; t++) {
    if (t->kind == Transfer::Send) continue;
    string fault = text("message from rank %d is not the one expected", from[i]);
    take(call, got[i], label(*t), from[i], fault, t->tensor.data);
    i++;
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
    if (world.options.exit_on_failure)
      _exit(write(2, all.data(), all.size()) < 0 ? kExitFailed : code);
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
  World world{.mesh = mesh, .options = options, .ranks = vector<Comm>(n)};
  for (int id = 0; id < n; id++) {
    Comm& comm = world.ranks[id];
    for (int kind = 0; kind < kGroups; kind++)
      comm.members[kind] = group_members(mesh, Group(kind), id);
    comm.world = &world;
    comm.limit_s = options.startup_limit_s;
    Status& board = status_board(id);
    board = Status{.rank = id};
    comm.rank = {
        .id = id,
        .world = n,
        .mesh = coord_of(mesh, id),
        .device = device,
        .compute = options.compute,
        .allocator = &comm.allocator,
        .comm = &comm,
        .status = &board,
        .debug = options.debug,
    };
  }
  vector<std::thread> threads;
  for (Comm& comm : world.ranks) threads.emplace_back([&] { run_rank(world, comm, call, fn); });
  for (std::thread& thread : threads) thread.join();
  if (world.failed_rank >= 0) throw Error(world.exit_code, world.message);
}

void end_startup(Rank& rank) {
  if (rank.comm) rank.comm->limit_s = rank.comm->world->options.limit_s;
}

}
