#include "comm/communicator.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "comm/world.h"

namespace pith {

namespace {

// Up to this size a member's input is copied where it outlives the call, which saves the second
// meeting; longer ones are read in place.
constexpr int64_t kStagedBytes = 32 * 1024;

[[noreturn]] void stop(const World& world) {
    throw Error(kExitFailed, text("stopped, because rank %d failed", world.failed_rank));
}

std::string place_of(const Call& call) {
    return text("%s:%d: %s", call.at.file, call.at.line, call.op);
}

// Leaves a call after a failure, once nobody reads this rank's memory any more.
[[noreturn]] void leave_failed(World& world, GroupState& g, std::unique_lock<std::mutex>& lock) {
    g.changed.notify_all();
    g.changed.wait(lock, [&] { return g.copying == 0; });
    stop(world);
}

std::string names_of(const std::vector<int>& ranks) {
    std::string names;
    for (size_t i = 0; i < ranks.size(); i++)
        names += text("%s%d", i == 0 ? (ranks.size() > 1 ? "ranks " : "rank ") : ", ", ranks[i]);
    return names;
}

// The one place where the host waits for other ranks. Three exits: ready() holds; another rank
// failed; the time limit, which is this rank's failure, as is a rank that has ended without coming.
// missing() lists the ranks that are waited for. Returns whether ready() holds and nobody failed.
template <class Ready, class Missing>
bool wait_for_others(Rank& rank, GroupState& g, std::unique_lock<std::mutex>& lock,
                     const Call& call, Ready ready, Missing missing) {
    World& world = *rank.comm->world;
    RankState& mine = world.ranks[rank.id];
    const double limit_s = rank.comm->limit_s;
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(limit_s);
    mine.waits = true;
    mine.call = call;
    rank.status->waiting = call.what;
    while (!ready() && world.failed_rank < 0) {
        const std::vector<int> late = missing();
        const bool ended =
            std::any_of(late.begin(), late.end(), [&](int r) { return world.ranks[r].finished; });
        const bool timed_out =
            !ended && g.changed.wait_until(lock, deadline) == std::cv_status::timeout;
        if (world.failed_rank >= 0 || ready() || !(ended || timed_out)) continue;
        const std::string names = names_of(missing());
        fail_world(
            world, rank.id, kExitFailed,
            place_of(call) + (ended ? text(" \"%s\" waits for %s, of which one has ended",
                                           call.what, names.c_str())
                                    : text(" \"%s\" waited %g s for %s (%s group)", call.what,
                                           limit_s, names.c_str(), name_of(call.group))));
    }
    mine.waits = false;
    rank.status->waiting = "";
    return world.failed_rank < 0;
}

// A collective under way: the members' slots may be read until close().
struct Meeting {
    Rank& rank;
    GroupState& g;
    Call call;
    int me, n;
    std::vector<Slot>& slots;
    bool direct = false;  // some slot is read in place
};

enum class Pass : uint8_t { Open, Middle, Close };

// All members pass together.
void meet(Meeting& m, Pass pass) {
    World& world = *m.rank.comm->world;
    std::unique_lock lock(world.mutex);
    if (pass == Pass::Close) m.g.copying--;
    if (world.failed_rank >= 0) {
        if (pass == Pass::Middle) m.g.copying--;
        leave_failed(world, m.g, lock);
    }
    const int64_t round = m.g.round;
    m.g.here[m.me] = 1;
    if (++m.g.arrived == m.n) {
        m.g.arrived = 0;
        std::fill(m.g.here.begin(), m.g.here.end(), 0);
        m.g.round++;
        m.g.changed.notify_all();
    }
    const bool passed = wait_for_others(
        m.rank, m.g, lock, m.call, [&] { return m.g.round != round; },
        [&] {
            std::vector<int> late;
            for (int i = 0; i < m.n; i++)
                if (!m.g.here[i]) late.push_back(m.g.members[i]);
            return late;
        });
    if (!passed) {
        if (pass == Pass::Middle) m.g.copying--;
        leave_failed(world, m.g, lock);
    }
    if (pass != Pass::Open) return;
    for (const Slot& slot : m.slots) m.direct = m.direct || slot.direct;
    m.g.copying += m.direct;
}

// Ends the call with an error of this rank's.
[[noreturn]] void fail_call(Meeting& m, const std::string& what) {
    World& world = *m.rank.comm->world;
    std::unique_lock lock(world.mutex);
    fail_world(world, m.rank.id, kExitFailed,
               place_of(m.call) + text(" \"%s\": ", m.call.what) + what);
    m.g.copying -= m.direct;
    leave_failed(world, m.g, lock);
}

// Every member publishes `data` and meets the others, who must be in the same call.
Meeting open(Rank& rank, const Call& call, const void* data, int64_t bytes, DType dtype,
             int detail = 0, const int64_t* counts = nullptr) {
    Comm& comm = *rank.comm;
    const int index = static_cast<int>(call.group);
    GroupState& g = *comm.group[index];
    const int n = static_cast<int>(g.members.size());
    Meeting m{rank, g, call, comm.place[index], n, g.slots[comm.calls[index]++ & 1]};
    Slot& mine = m.slots[m.me];
    mine.call = call;
    mine.dtype = dtype;
    mine.detail = detail;
    mine.bytes = bytes;
    mine.direct = bytes > kStagedBytes;
    mine.data = static_cast<const char*>(data);
    if (!mine.direct) {
        mine.staged.assign(mine.data, mine.data + bytes);
        mine.data = mine.staged.data();
    }
    mine.counts.assign(counts, counts ? counts + n : counts);
    meet(m, Pass::Open);
    for (int i = 0; i < n; i++) {
        const Slot& other = m.slots[i];
        const bool same = std::strcmp(other.call.op, call.op) == 0 && other.dtype == dtype &&
                          other.detail == detail && other.counts.empty() == mine.counts.empty();
        if (same) continue;
        fail_call(
            m, text("the members' calls differ: rank %d is in %s \"%s\" of %s, detail %d, "
                    "called at %s:%d (this one: %s, detail %d)",
                    g.members[i], other.call.op, other.call.what, name_of(other.dtype),
                    other.detail, other.call.at.file, other.call.at.line, name_of(dtype), detail));
    }
    return m;
}

void close(Meeting& m) {
    if (m.direct) meet(m, Pass::Close);
}

void need_bytes(Meeting& m, int member, int64_t want) {
    if (m.slots[member].bytes == want) return;
    fail_call(m, text("rank %d brings %lld bytes (need %lld)", m.g.members[member],
                      static_cast<long long>(m.slots[member].bytes), static_cast<long long>(want)));
}

int64_t row_bytes(const Tensor& t) {
    int64_t bytes = size_of(t.dtype);
    for (int i = 1; i < t.dim.rank; i++) bytes *= t.dim[i];
    return bytes;
}

// Byte offsets of n parts in a tensor of `total` rows, n + 1 of them; equal parts without counts.
std::vector<int64_t> part_offsets(const int64_t* rows, int n, int64_t total, int64_t bytes_a_row) {
    std::vector<int64_t> offset(n + 1, 0);
    for (int i = 0; i < n; i++)
        offset[i + 1] = offset[i] + (rows ? rows[i] : total / n) * bytes_a_row;
    return offset;
}

void copy(char* to, const char* from, int64_t bytes) {
    if (bytes > 0 && to != from) std::memmove(to, from, bytes);
}

// out[i] = reduction over members, in their order, of element `begin + i` of what they brought. A
// block at a time goes through a buffer, so that `out` may be a part of the caller's own input.
template <class T>
void reduce_as(const Meeting& m, T* out, int64_t begin, int64_t count, Reduce reduce) {
    constexpr int64_t kBlock = 2048;
    T sum[kBlock];
    for (int64_t at = 0; at < count; at += kBlock) {
        const int64_t len = std::min(kBlock, count - at);
        for (int i = 0; i < m.n; i++) {
            const T* x = reinterpret_cast<const T*>(m.slots[i].data) + begin + at;
            if (i == 0) {
                std::copy(x, x + len, sum);
            } else if (reduce == Reduce::Sum) {
                for (int64_t k = 0; k < len; k++) sum[k] += x[k];
            } else {  // a NaN stays
                for (int64_t k = 0; k < len; k++)
                    sum[k] = sum[k] >= x[k] || sum[k] != sum[k] ? sum[k] : x[k];
            }
        }
        std::copy(sum, sum + len, out + at);
    }
}

void reduce_part(const Meeting& m, DType dtype, char* out, int64_t begin_bytes, int64_t bytes,
                 Reduce reduce) {
    const int64_t size = size_of(dtype), begin = begin_bytes / size, count = bytes / size;
    switch (dtype) {
        case DType::F32: return reduce_as(m, reinterpret_cast<float*>(out), begin, count, reduce);
        case DType::F64: return reduce_as(m, reinterpret_cast<double*>(out), begin, count, reduce);
        default: return reduce_as(m, reinterpret_cast<int32_t*>(out), begin, count, reduce);
    }
}

bool reducible(DType dtype) {
    return dtype == DType::F32 || dtype == DType::F64 || dtype == DType::I32;
}

void all_reduce_raw(Rank& rank, const Call& call, char* data, int64_t bytes, DType dtype,
                    Reduce reduce) {
    if (group_size(rank, call.group) == 1) return;
    Meeting m = open(rank, call, data, bytes, dtype, static_cast<int>(reduce));
    for (int i = 0; i < m.n; i++) need_bytes(m, i, bytes);
    if (!m.direct) {
        reduce_part(m, dtype, data, 0, bytes, reduce);
        return;
    }
    // Each member reduces one part in place, which no other reads; then all collect the parts.
    const int64_t size = size_of(dtype), elements = bytes / size;
    auto part = [&](int i) { return elements * i / m.n * size; };
    reduce_part(m, dtype, data + part(m.me), part(m.me), part(m.me + 1) - part(m.me), reduce);
    meet(m, Pass::Middle);
    for (int i = 0; i < m.n; i++)
        copy(data + part(i), m.slots[i].data + part(i), part(i + 1) - part(i));
    close(m);
}

}  // namespace

int group_size(const Rank& rank, Group group) {
    if (!rank.comm) return 1;
    return static_cast<int>(rank.comm->group[static_cast<int>(group)]->members.size());
}

int group_rank(const Rank& rank, Group group) {
    return rank.comm ? rank.comm->place[static_cast<int>(group)] : 0;
}

int group_member(const Rank& rank, Group group, int member) {
    return rank.comm ? rank.comm->group[static_cast<int>(group)]->members[member] : rank.id;
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
    Meeting m = open(rank, {"all_gather", what, group, at}, in.data, in.bytes(), in.dtype);
    for (int i = 0; i < n; i++) need_bytes(m, i, offset[i + 1] - offset[i]);
    for (int i = 0; i < n; i++)
        if (i != me) copy(out.data + offset[i], m.slots[i].data, m.slots[i].bytes);
    close(m);
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
    Meeting m = open(rank, {"reduce_scatter", what, group, at}, in.data, in.bytes(), in.dtype);
    for (int i = 0; i < n; i++) need_bytes(m, i, in.bytes());
    reduce_part(m, in.dtype, out.data, offset[me], out.bytes(), Reduce::Sum);
    close(m);
}

void all_reduce(Rank& rank, Group group, const Tensor& t, Reduce reduce, const char* what, At at) {
    check(rank, "all_reduce", at,
          {{"t on the cpu", t.device == Device::CPU},
           {"dtype is f32, f64 or i32", reducible(t.dtype)}},
          {&t});
    all_reduce_raw(rank, {"all_reduce", what, group, at}, t.data, t.bytes(), t.dtype, reduce);
}

void all_reduce(Rank& rank, Group group, double* values, int n, Reduce reduce, const char* what,
                At at) {
    all_reduce_raw(rank, {"all_reduce", what, group, at}, reinterpret_cast<char*>(values),
                   n * int64_t{sizeof(double)}, DType::F64, reduce);
}

void all_to_all(Rank& rank, Group group, const Tensor& in, const int64_t* send_rows,
                const Tensor& out, const int64_t* recv_rows, const char* what, At at) {
    const int n = group_size(rank, group), me = group_rank(rank, group);
    const int64_t row = row_bytes(in);
    const auto from = part_offsets(send_rows, n, in.dim[0], row);
    const auto to = part_offsets(recv_rows, n, out.dim[0], row);
    check(
        rank, "all_to_all", at,
        {{"both on the cpu", in.device == Device::CPU && out.device == Device::CPU},
         {"equal dtypes", in.dtype == out.dtype},
         {"rows of equal length", row == row_bytes(out)},
         {"both counts or none", !send_rows == !recv_rows},
         {"in's rows are the sent ones", send_rows ? from[n] <= in.bytes() : from[n] == in.bytes()},
         {"out has room", recv_rows ? to[n] <= out.bytes() : to[n] == out.bytes()}},
        {&in, &out});
    if (n == 1) return copy(out.data, in.data, from[1]);
    std::vector<int64_t> sizes(n);
    for (int i = 0; i < n; i++) sizes[i] = from[i + 1] - from[i];
    Meeting m =
        open(rank, {"all_to_all", what, group, at}, in.data, from[n], in.dtype, 0, sizes.data());
    for (int i = 0; i < n; i++) {
        const std::vector<int64_t>& sent = m.slots[i].counts;
        const int64_t want = to[i + 1] - to[i];
        if (sent[me] != want)
            fail_call(m, text("rank %d sends %lld bytes to rank %d (need %lld, of %lld-byte rows)",
                              m.g.members[i], static_cast<long long>(sent[me]), rank.id,
                              static_cast<long long>(want), static_cast<long long>(row)));
        int64_t begin = 0;
        for (int k = 0; k < me; k++) begin += sent[k];
        copy(out.data + to[i], m.slots[i].data + begin, want);
    }
    close(m);
}

void broadcast(Rank& rank, Group group, const Tensor& t, int root, const char* what, At at) {
    const int n = group_size(rank, group);
    check(rank, "broadcast", at,
          {{"t on the cpu", t.device == Device::CPU},
           {"root is a member of the group", root >= 0 && root < n}},
          {&t});
    if (n == 1) return;
    const bool is_root = group_rank(rank, group) == root;
    Meeting m =
        open(rank, {"broadcast", what, group, at}, t.data, is_root ? t.bytes() : 0, t.dtype, root);
    need_bytes(m, root, t.bytes());
    copy(t.data, m.slots[root].data, t.bytes());
    close(m);
}

void barrier(Rank& rank, Group group, const char* what, At at) {
    check(rank, "barrier", at, {}, {});
    if (group_size(rank, group) == 1) return;
    Meeting m = open(rank, {"barrier", what, group, at}, nullptr, 0, DType::U8);
    close(m);
}

namespace {

std::string tag_text(const Transfer& t) {
    return text("kind %d, stage %d, micro-batch %d, %s", t.tag.kind, t.tag.stage, t.tag.micro_batch,
                describe(t.tensor).c_str());
}

bool same_message(const Transfer& a, const Transfer& b) {
    return a.tag == b.tag && a.tensor.dtype == b.tensor.dtype &&
           a.tensor.bytes() == b.tensor.bytes();
}

// One rank's group call of sends and receives.
struct Exchange {
    Rank& rank;
    World& world;
    GroupState& g;
    Call call;
    int me, n;
    std::vector<PostedSend> sends;
    std::vector<const Transfer*> recvs;  // still to come, in posted order

    std::vector<PostedSend*>& channel(int from, int to) { return g.sends[from * n + to]; }

    // The first receive that has a message, or null. Only the first of each peer may take one.
    const Transfer* takeable() {
        for (size_t i = 0; i < recvs.size(); i++) {
            const int peer = recvs[i]->peer;
            bool first = true;
            for (size_t k = 0; k < i; k++) first = first && recvs[k]->peer != peer;
            if (first && !channel(peer, me).empty()) return recvs[i];
        }
        return nullptr;
    }

    bool done() const {
        return recvs.empty() && std::all_of(sends.begin(), sends.end(), [](const PostedSend& s) {
                   return s.state == PostedSend::Done;
               });
    }

    std::vector<int> missing() const {
        std::vector<int> ranks;
        for (const PostedSend& s : sends)
            if (s.state != PostedSend::Done) ranks.push_back(g.members[s.transfer->peer]);
        for (const Transfer* t : recvs) ranks.push_back(g.members[t->peer]);
        std::sort(ranks.begin(), ranks.end());
        ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
        return ranks;
    }

    // Copies the message for `t` from its sender.
    void take(const Transfer* t, std::unique_lock<std::mutex>& lock) {
        std::vector<PostedSend*>& queue = channel(t->peer, me);
        PostedSend* sent = queue.front();
        if (!same_message(*sent->transfer, *t)) {
            fail_world(world, rank.id, kExitFailed,
                       place_of(call) +
                           text(" \"%s\": message from rank %d is not the one expected "
                                "(got %s, sent by \"%s\"; need %s)",
                                call.what, g.members[t->peer], tag_text(*sent->transfer).c_str(),
                                sent->call.what, tag_text(*t).c_str()));
            return;
        }
        queue.erase(queue.begin());
        sent->state = PostedSend::Copying;
        lock.unlock();
        copy(t->tensor.data, sent->transfer->tensor.data, t->tensor.bytes());
        lock.lock();
        sent->state = PostedSend::Done;
        recvs.erase(std::find(recvs.begin(), recvs.end(), t));
        g.changed.notify_all();
    }

    void run() {
        std::unique_lock lock(world.mutex);
        if (g.sends.empty()) g.sends.resize(static_cast<size_t>(n) * n);
        for (PostedSend& s : sends) channel(me, s.transfer->peer).push_back(&s);
        if (!sends.empty()) g.changed.notify_all();
        while (world.failed_rank < 0 && !done()) {
            if (const Transfer* t = takeable())
                take(t, lock);
            else
                wait_for_others(
                    rank, g, lock, call, [&] { return done() || takeable(); },
                    [&] { return missing(); });
        }
        if (world.failed_rank >= 0) leave(lock);
    }

    // Withdraws what nobody has taken; what is being copied is waited for.
    [[noreturn]] void leave(std::unique_lock<std::mutex>& lock) {
        for (PostedSend& s : sends) std::erase(channel(me, s.transfer->peer), &s);
        g.changed.wait(lock, [&] {
            return std::none_of(sends.begin(), sends.end(),
                                [](const PostedSend& s) { return s.state == PostedSend::Copying; });
        });
        stop(world);
    }
};

// Messages to oneself: each send goes to the receive of the same place.
void send_to_self(Rank& rank, const Call& call, const std::vector<const Transfer*>& sends,
                  const std::vector<const Transfer*>& recvs) {
    for (size_t i = 0; i < std::max(sends.size(), recvs.size()); i++) {
        if (i >= sends.size() || i >= recvs.size() || !same_message(*sends[i], *recvs[i]))
            failed(place_of(call), text("\"%s\": rank %d's messages to itself do not match in one "
                                        "call",
                                        call.what, rank.id));
        copy(recvs[i]->tensor.data, sends[i]->tensor.data, sends[i]->tensor.bytes());
    }
}

}  // namespace

void send_recv(Rank& rank, Group group, const Transfer* list, int n, const char* what, At at) {
    const int size = group_size(rank, group), me = group_rank(rank, group);
    const Call call{"send_recv", what, group, at};
    std::vector<const Transfer*> self_sends, self_recvs, recvs;
    std::vector<PostedSend> sends;
    for (const Transfer* t = list; t < list + n; t++) {
        check(rank, "send_recv", at,
              {{"tensor on the cpu", t->tensor.device == Device::CPU},
               {"peer is a member of the group", t->peer >= 0 && t->peer < size}},
              {&t->tensor});
        const bool is_send = t->kind == Transfer::Send;
        if (t->peer == me)
            (is_send ? self_sends : self_recvs).push_back(t);
        else if (is_send)
            sends.push_back({t, call});
        else
            recvs.push_back(t);
    }
    send_to_self(rank, call, self_sends, self_recvs);
    if (sends.empty() && recvs.empty()) return;
    GroupState& g = *rank.comm->group[static_cast<int>(group)];
    Exchange{rank, *rank.comm->world, g, call, me, size, std::move(sends), std::move(recvs)}.run();
}

}  // namespace pith
