#include "comm/communicator.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <limits>

#include "comm/launch.h"

namespace pith {
namespace {

// Payloads are derived from (rank, index) and are small whole numbers, so sums are exact.
double payload(int rank, int64_t index) { return (rank * 31 + index * 7) % 1000 - 300; }

template <class T>
constexpr DType dtype_of() {
  if (std::is_same_v<T, float>) return DType::F32;
  if (std::is_same_v<T, double>) return DType::F64;
  if (std::is_same_v<T, int32_t>) return DType::I32;
  return std::is_same_v<T, uint16_t> ? DType::BF16 : DType::U8;
}

template <class T>
T value(int rank, int64_t index) {
  return static_cast<T>(static_cast<int64_t>(payload(rank, index)));
}

template <class T>
Tensor filled(Rank& rank, int64_t rows, int64_t cols, int64_t first_index, int owner) {
  Tensor t = empty(rank, {rows, cols}, dtype_of<T>());
  for (int64_t i = 0; i < rows * cols; i++) t.as<T>()[i] = value<T>(owner, first_index + i);
  return t;
}

LaunchOptions quick() { return {.startup_limit_s = 60, .limit_s = 60}; }

// Rows of each member under pattern `p`: equal, one holds all, the first empty, skewed, none,
// and many.
constexpr int kPatterns = 6;
std::vector<int64_t> rows_of(int pattern, int n) {
  std::vector<int64_t> rows(n, 3);
  for (int i = 0; i < n; i++) switch (pattern) {
      case 1: rows[i] = i == n / 2 ? 11 : 0; break;
      case 2: rows[i] = i == 0 ? 0 : 2; break;
      case 3: rows[i] = i * 5 % 7; break;
      case 4: rows[i] = 0; break;
      case 5: rows[i] = i == n - 1 ? 5000 : i * 301; break;
    }
  return rows;
}

int64_t sum(const std::vector<int64_t>& v, int end) {
  int64_t total = 0;
  for (int i = 0; i < end; i++) total += v[i];
  return total;
}

template <class T>
void expect_equal(
    const Tensor& got, int64_t first, int64_t count, auto want, const std::string& where) {
  for (int64_t i = 0; i < count; i++) {
    if (got.as<T>()[first + i] == want(i)) continue;
    ADD_FAILURE() << where << ": element " << first + i << " is " << +got.as<T>()[first + i]
                  << ", want " << +want(i);
    return;
  }
}

constexpr int64_t kCols = 3;

int group_member(const Rank& rank, Group group, int member) {
  return rank.comm ? group_members(mesh_of(rank), group, rank.id)[member] : rank.id;
}

template <class T>
void gather_case(Rank& rank, Group group, int pattern) {
  const int n = group_size(rank, group), me = group_rank(rank, group);
  const auto rows = rows_of(pattern, n);
  const int64_t total = sum(rows, n), before = sum(rows, me);
  const std::string where =
      text("all_gather %s, %d members, pattern %d", name_of(dtype_of<T>()), n, pattern);
  for (const bool in_place : {false, true}) {
    Tensor out = zeros(rank, {total, kCols}, dtype_of<T>());
    Tensor in = filled<T>(rank, rows[me], kCols, 0, group_member(rank, group, me));
    if (in_place && rows[me] > 0) {
      Tensor part = out.slice_rows(before, before + rows[me]);
      std::memcpy(part.data, in.data, in.bytes());
      in = part;
    }
    all_gather(rank, group, in, out, "test", pattern == 0 ? nullptr : rows.data());
    for (int j = 0; j < n; j++)
      expect_equal<T>(
          out, sum(rows, j) * kCols, rows[j] * kCols,
          [&](int64_t i) { return value<T>(group_member(rank, group, j), i); }, where);
  }
}

template <class T>
void reduce_scatter_case(Rank& rank, Group group, int pattern) {
  const int n = group_size(rank, group), me = group_rank(rank, group);
  const auto rows = rows_of(pattern, n);
  const int64_t total = sum(rows, n), before = sum(rows, me);
  for (const bool in_place : {false, true}) {
    Tensor in = filled<T>(rank, total, kCols, 0, rank.id);
    Tensor out = in_place ? in.slice_rows(before, before + rows[me])
                          : zeros(rank, {rows[me], kCols}, dtype_of<T>());
    reduce_scatter(rank, group, in, out, "test", pattern == 0 ? nullptr : rows.data());
    expect_equal<T>(
        out, 0, rows[me] * kCols,
        [&](int64_t i) {
          T s = 0;
          for (int j = 0; j < n; j++)
            s += value<T>(group_member(rank, group, j), before * kCols + i);
          return s;
        },
        text("reduce_scatter %s, %d members, pattern %d", name_of(dtype_of<T>()), n, pattern));
  }
}

template <class T>
void all_reduce_case(Rank& rank, Group group, int64_t count, Reduce reduce) {
  Tensor t = filled<T>(rank, count, 1, 0, rank.id);
  all_reduce(rank, group, t, reduce, "test");
  const int n = group_size(rank, group);
  expect_equal<T>(
      t, 0, count,
      [&](int64_t i) {
        T all = value<T>(group_member(rank, group, 0), i);
        for (int j = 1; j < n; j++) {
          const T x = value<T>(group_member(rank, group, j), i);
          all = reduce == Reduce::Sum ? all + x : std::max(all, x);
        }
        return all;
      },
      text("all_reduce %s, %d members, %lld elements", name_of(dtype_of<T>()), n,
          static_cast<long long>(count)));
}

// Rows that member `from` sends to member `to`.
int64_t rows_between(int pattern, int n, int from, int to) {
  switch (pattern) {
    case 0: return 2;
    case 1: return to == n / 2 ? 4 : 0;      // all to one
    case 2: return from == to ? 0 : 1;       // nothing to itself
    case 3: return (from * 5 + to * 3) % 7;  // skewed
    case 4: return 0;
    default: return from == 0 ? 4000 : from;  // long and short senders
  }
}

template <class T>
void all_to_all_case(Rank& rank, Group group, int pattern) {
  const int n = group_size(rank, group), me = group_rank(rank, group);
  std::vector<int64_t> send(n), recv(n);
  for (int j = 0; j < n; j++) {
    send[j] = rows_between(pattern, n, me, j);
    recv[j] = rows_between(pattern, n, j, me);
  }
  Tensor in = filled<T>(rank, sum(send, n), kCols, 0, rank.id);
  Tensor out = zeros(rank, {sum(recv, n), kCols}, dtype_of<T>());
  all_to_all(rank, group, in, pattern == 0 ? nullptr : send.data(), out,
      pattern == 0 ? nullptr : recv.data(), "test");
  const std::string where =
      text("all_to_all %s, %d members, pattern %d", name_of(dtype_of<T>()), n, pattern);
  for (int j = 0; j < n; j++) {
    int64_t begin = 0;
    for (int k = 0; k < me; k++) begin += rows_between(pattern, n, j, k);
    expect_equal<T>(
        out, sum(recv, j) * kCols, recv[j] * kCols,
        [&](int64_t i) { return value<T>(group_member(rank, group, j), begin * kCols + i); },
        where);
  }
}

template <class T>
void every_collective(Rank& rank, Group group) {
  for (int pattern = 0; pattern < kPatterns; pattern++) {
    gather_case<T>(rank, group, pattern);
    all_to_all_case<T>(rank, group, pattern);
  }
  for (int root = 0; root < group_size(rank, group); root += 3)
    for (const int64_t count : {0, 5, 40000}) {
      Tensor t = filled<T>(rank, count, 1, 0, rank.id);
      broadcast(rank, group, t, root, "test");
      expect_equal<T>(
          t, 0, count, [&](int64_t i) { return value<T>(group_member(rank, group, root), i); },
          text("broadcast from %d", root));
    }
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    for (int pattern = 0; pattern < kPatterns; pattern++)
      reduce_scatter_case<T>(rank, group, pattern);
    for (const int64_t count : {0, 1, 7, 20011})
      for (const Reduce reduce : {Reduce::Sum, Reduce::Max})
        all_reduce_case<T>(rank, group, count, reduce);
  }
  barrier(rank, group, "test");
}

// The wording of the failure that `fn` on `n` ranks ends in.
template <class Fn>
std::string failure_of(int n, const LaunchOptions& options, Fn fn) {
  try {
    run_ranks(make_mesh(n, 1, 1, 1), Device::CPU, options, fn);
  } catch (const Error& e) {
    EXPECT_EQ(e.exit_code, kExitFailed);
    return e.what();
  }
  return "no failure";
}

void expect_contains(const std::string& message, std::initializer_list<const char*> parts) {
  for (const char* part : parts)
    EXPECT_NE(message.find(part), std::string::npos) << "no \"" << part << "\" in:\n" << message;
}

TEST(Communicator, EveryCollectiveMatchesItsDefinition) {
  for (const int n : {1, 2, 3, 4, 5, 8, 16})
    run_ranks(make_mesh(n, 1, 1, 1), Device::CPU, quick(), [](Rank& rank) {
      every_collective<float>(rank, Group::World);
      every_collective<double>(rank, Group::World);
      every_collective<int32_t>(rank, Group::World);
      every_collective<uint8_t>(rank, Group::World);
      every_collective<uint16_t>(rank, Group::World);
    });
}

TEST(Communicator, GroupsOfAMeshWorkSideBySide) {
  run_ranks(make_mesh(16, 2, 2, 2, 1), Device::CPU, quick(), [](Rank& rank) {
    for (int kind = 0; kind < kGroups; kind++)
      every_collective<float>(rank, static_cast<Group>(kind));
  });
}

TEST(Communicator, ARankWithoutOthersNeedsNoComm) {
  run_ranks(make_mesh(1, 1, 1, 1), Device::CPU, quick(), [](Rank& rank) {
    rank.comm = nullptr;
    every_collective<float>(rank, Group::DpCpEp);
    double x = 2.5;
    all_reduce(rank, Group::World, &x, 1, Reduce::Sum, "test");
    EXPECT_EQ(x, 2.5);
  });
}

// Sums of numbers that do not add exactly: the order must be that of the ranks, on every rank.
TEST(Communicator, SumsAddInRankOrder) {
  for (const int64_t count : {5, 30000})
    run_ranks(make_mesh(7, 1, 1, 1), Device::CPU, quick(), [&](Rank& rank) {
      auto term = [](int r, int64_t i) { return 1.0f / static_cast<float>(3 + r * 17 + i); };
      Tensor t = empty(rank, {count}, DType::F32);
      for (int64_t i = 0; i < count; i++) t.f32()[i] = term(rank.id, i);
      all_reduce(rank, Group::World, t, Reduce::Sum, "test");
      expect_equal<float>(
          t, 0, count,
          [&](int64_t i) {
            float s = term(0, i);
            for (int r = 1; r < 7; r++) s += term(r, i);
            return s;
          },
          "sum in rank order");
    });
}

TEST(Communicator, MaximumKeepsNaN) {
  run_ranks(make_mesh(3, 1, 1, 1), Device::CPU, quick(), [](Rank& rank) {
    for (int bad = 0; bad < 3; bad++) {
      double x[2] = {rank.id == bad ? std::numeric_limits<double>::quiet_NaN() : rank.id,
          static_cast<double>(-rank.id)};
      all_reduce(rank, Group::World, x, 2, Reduce::Max, "test");
      EXPECT_TRUE(x[0] != x[0]);
      EXPECT_EQ(x[1], 0);
    }
  });
}

// A ring in both directions at once, several messages a pair in one call, empty and long ones.
TEST(Communicator, MessagesMatchInPostedOrder) {
  for (const int n : {1, 2, 3, 16})
    run_ranks(make_mesh(n, 1, 1, 1), Device::CPU, quick(), [n](Rank& rank) {
      const int next = (rank.id + 1) % n, last = (rank.id + n - 1) % n;
      for (int round = 0; round < 5; round++) {
        std::vector<Transfer> list;
        std::vector<Tensor> from_last, from_next;
        for (const int64_t count : {3, 0, 20000, 1}) {
          const MessageTag tag{.kind = 0, .stage = round, .micro_batch = int(count)};
          from_last.push_back(zeros(rank, {count, 1}, DType::F32));
          from_next.push_back(zeros(rank, {count, 1}, DType::F32));
          const Tensor out = filled<float>(rank, count, 1, round + count, rank.id);
          const MessageTag back{.kind = 1, .stage = round, .micro_batch = int(count)};
          list.push_back({Transfer::Recv, last, from_last.back(), tag});
          list.push_back({Transfer::Send, next, out, tag});
          if (n < 3) continue;  // to the same peer there is one order, not two
          list.push_back({Transfer::Send, last, out, back});
          list.push_back({Transfer::Recv, next, from_next.back(), back});
        }
        send_recv(rank, Group::World, list.data(), int(list.size()), "ring");
        for (const auto& [got, peer] : {std::pair{&from_last, last}, {&from_next, next}})
          for (const Tensor& t : *got)
            if (got == &from_last || n >= 3)
              expect_equal<float>(
                  t, 0, t.numel(),
                  [&](int64_t i) { return value<float>(peer, round + t.numel() + i); },
                  text("from rank %d", peer));
      }
    });
}

// A send blocks until it is received: nothing but the pair's own order decides who gets what.
TEST(Communicator, MessagesWaitForTheirReceiver) {
  run_ranks(make_mesh(2, 1, 1, 1), Device::CPU, quick(), [](Rank& rank) {
    for (int i = 0; i < 200; i++) {
      Tensor t = filled<float>(rank, 4, 1, i, rank.id);
      const auto kind = rank.id == 0 ? Transfer::Send : Transfer::Recv;
      const Transfer one{kind, 1 - rank.id, t, {.micro_batch = i}};
      send_recv(rank, Group::World, &one, 1, "one way");
      expect_equal<float>(
          t, 0, 4, [&](int64_t k) { return value<float>(0, i + k); }, "msg");
    }
  });
}

TEST(Communicator, AMessageOfTheWrongKindIsNamed) {
  const std::string message = failure_of(2, quick(), [](Rank& rank) {
    Tensor t = zeros(rank, {4}, DType::F32);
    const Transfer one{rank.id == 0 ? Transfer::Send : Transfer::Recv, 1 - rank.id, t,
        {.kind = rank.id, .stage = 3, .micro_batch = 5}};
    send_recv(rank, Group::World, &one, 1, rank.id == 0 ? "activations" : "gradients");
  });
  expect_contains(message, {"rank 1: ", "message from rank 0 is not the one expected",
                               "got kind 0, stage 3, micro-batch 5, [4] f32",
                               "sent by \"activations\"", "need kind 1, stage 3"});
}

TEST(Communicator, CallsThatDifferAreNamed) {
  const struct {
    void (*call)(Rank&);
    const char* part;
    const char* seen_first = nullptr;  // what rank 1 says where it is the first to see it
  } cases[] = {
      {[](Rank& r) {
         Tensor t = zeros(r, {8}, DType::F32);
         if (r.id == 1) return broadcast(r, Group::World, t, 0, "weights");
         all_reduce(r, Group::World, t, Reduce::Sum, "grads");
       },
          "the members' calls differ"},
      {[](Rank& r) {
         Tensor t = zeros(r, {8}, r.id == 1 ? DType::F64 : DType::F32);
         all_reduce(r, Group::World, t, Reduce::Sum, "grads");
       },
          "the members' calls differ"},
      {[](Rank& r) { broadcast(r, Group::World, zeros(r, {8}, DType::F32), r.id % 2, "w"); },
          "the members' calls differ"},
      {[](Rank& r) {
         Tensor t = zeros(r, {r.id == 1 ? 40000 : 80000}, DType::F32);
         all_reduce(r, Group::World, t, Reduce::Sum, "grads");
       },
          "rank 1 sends 160000 bytes to rank", "rank 0 sends 320000 bytes to rank 1 (need 160000"},
      {[](Rank& r) {
         const int64_t send[] = {1, r.id == 0 ? 2 : 1, 1}, recv[] = {1, 1, 1};
         all_to_all(r, Group::World, zeros(r, {send[1] + 2, 5}, DType::F32), send,
             zeros(r, {3, 5}, DType::F32), recv, "dispatch");
       },
          "rank 0 sends 40 bytes to rank 1 (need 20, of 20-byte rows)"},
      {[](Rank& r) {
         all_gather(r, Group::World, zeros(r, {2}, DType::F32), zeros(r, {7}, DType::F32), "w");
       },
          "all_gather: need out's rows are all parts (got"},
  };
  for (const auto& c : cases) {
    const std::string message = failure_of(3, quick(), c.call);
    const bool first = c.seen_first && message.find(c.seen_first) != std::string::npos;
    expect_contains(message, {first ? c.seen_first : c.part});
  }
}

TEST(Failure, TheFirstExceptionWakesAllAndTellsWhatEachDid) {
  const std::string message = failure_of(4, quick(), [](Rank& rank) {
    rank.status->step = 7;
    if (rank.id == 2) {
      const Transfer get{Transfer::Recv, 1, zeros(rank, {1}, DType::F32), {}};
      send_recv(rank, Group::World, &get, 1, "starting gun");
      check(rank, "linear", {"model.cpp", 10}, {{"x.dim[1] == w.dim[1]", false}}, {});
    }
    if (rank.id == 1) {
      const Transfer put{Transfer::Send, 2, zeros(rank, {1}, DType::F32), {}};
      send_recv(rank, Group::World, &put, 1, "starting gun");
    }
    barrier(rank, Group::World, "end of step");
  });
  expect_contains(message,
      {"rank 2: model.cpp:10: linear: need x.dim[1] == w.dim[1]", "\n  rank 0 ", "\n  rank 1 ",
          "\n  rank 3 ", "step 7",
          "\n  rank 2 runs: step 7, layer -1, stage 0, micro-batch -1, last op linear called at "
          "model.cpp:10"});
}

TEST(Failure, AnExceptionInEveryPlaceOfALongRunIsSurvived) {
  // Ranks fail at different moments of a mix of calls.
  for (int bad_call = 0; bad_call < 12; bad_call++) {
    const std::string message = failure_of(5, quick(), [bad_call](Rank& rank) {
      int calls = 0;
      for (int i = 0; i < 4; i++) {
        Tensor big = filled<float>(rank, 30000, 1, 0, rank.id);
        Tensor back = zeros(rank, {30000, 1}, DType::F32);
        auto maybe_fail = [&] {
          if (rank.id == bad_call % 5 && calls++ == bad_call) throw std::runtime_error("planted");
        };
        maybe_fail();
        all_reduce(rank, Group::World, big, Reduce::Sum, "a");
        maybe_fail();
        all_to_all(rank, Group::World, big, nullptr, back, nullptr, "b");
        maybe_fail();
        const Transfer both[] = {{Transfer::Send, (rank.id + 1) % 5, big, {}},
            {Transfer::Recv, (rank.id + 4) % 5, back, {}}};
        send_recv(rank, Group::World, both, 2, "c");
      }
    });
    expect_contains(message, {text("rank %d: planted", bad_call % 5).c_str()});
  }
}

TEST(Failure, ARankThatHangsIsNamedAfterTheTimeLimit) {
  const std::string message =
      failure_of(4, {.startup_limit_s = 0.3, .limit_s = 60}, [](Rank& rank) {
        if (rank.id == 3) {
          check(rank, "matmul", {"model.cpp", 77}, {}, {});
          usleep(1000000);
          return;
        }
        barrier(rank, Group::World, "end of step");
      });
  expect_contains(message,
      {"barrier \"end of step\" waited 0.3 s for rank 3 (world group)",
          "waits in barrier \"end of step\" (world group) called at",
          "rank 3 runs: step 0, layer -1, stage 0, micro-batch -1, last op matmul called at "
          "model.cpp:77"});
}

TEST(Failure, TheLimitAfterStartUpIsTheShortOne) {
  const std::string message =
      failure_of(2, {.startup_limit_s = 600, .limit_s = 0.2}, [](Rank& rank) {
        barrier(rank, Group::World, "start");
        end_startup(rank);
        if (rank.id == 1) usleep(1200000);
        if (rank.id == 0) barrier(rank, Group::World, "step");
      });
  expect_contains(message, {"rank 0: ", "waited 0.2 s for rank 1"});
}

TEST(Failure, ARankThatReturnedIsNotWaitedFor) {
  const std::string message = failure_of(3, quick(), [](Rank& rank) {
    if (rank.id != 1) barrier(rank, Group::World, "step");
  });
  expect_contains(message, {"waits for rank", "has ended", "rank 1 has ended"});
}

TEST(Failure, ADeadlockOfMessagesTimesOut) {
  const std::string message =
      failure_of(2, {.startup_limit_s = 0.3, .limit_s = 60}, [](Rank& rank) {
        Tensor t = zeros(rank, {1}, DType::F32);
        for (const auto kind : {Transfer::Send, Transfer::Recv}) {
          const Transfer one{kind, 1 - rank.id, t, {}};
          send_recv(rank, Group::World, &one, 1, "both send first");
        }
      });
  expect_contains(message, {"send_recv \"both send first\" waited 0.3 s for rank "});
}

// The program's policy: one message, exit code 1, although a rank hangs for ever.
TEST(FailureDeathTest, TheProgramEndsAtOnce) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(run_ranks(make_mesh(3, 1, 1, 1), Device::CPU, {.exit_on_failure = true},
                  [](Rank& rank) {
                    if (rank.id == 0) failed("train", "planted");
                    if (rank.id == 1)
                      while (true) pause();
                    barrier(rank, Group::World, "step");
                  }),
      testing::ExitedWithCode(kExitFailed), "^error: rank 0: train: planted\n  rank 0 ");
  EXPECT_EXIT(run_ranks(make_mesh(2, 1, 1, 1), Device::CPU, {.exit_on_failure = true},
                  [](Rank& rank) {
                    if (rank.id == 1) bad_input("run.toml", "wrong", "right");
                    barrier(rank, Group::World, "step");
                  }),
      testing::ExitedWithCode(kExitBadInput), "^error: rank 1: run.toml: wrong. Try");
}

}  // namespace
}  // namespace pith
