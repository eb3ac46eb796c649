#include "engine/checkpoint.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

#include "comm/communicator.h"
#include "comm/launch.h"
#include "core/log.h"
#include "core/rng.h"
#include "helpers.h"

namespace pith {
namespace {

namespace fs = std::filesystem;

LaunchOptions quick() { return {.startup_limit_s = 60, .limit_s = 60}; }

// ---- a model of uneven sizes ----

constexpr int kLayers = 4, kExperts = 4;

// What the rank at `c` holds: cuts of the units cross tensors, and the head's single block leaves
// most members of a group nothing.
ParameterTable table_of(const MeshCoord& c) {
  const Init none{};
  ParameterTable table;
  if (c.pp_rank == 0)
    table.push_back({nullptr, {7, 33}, UnitKind::Embedding, -1, {{"embed", {7, 33}, none}}});
  const int layers = kLayers / c.pp, experts = kExperts / c.ep;
  for (int l = c.pp_rank * layers; l < (c.pp_rank + 1) * layers; l++) {
    const std::string name = "layers." + std::to_string(l) + ".";
    table.push_back({nullptr, {33}, UnitKind::Layer, l, {{name + "norm", {33}, none}}});
    table.push_back({nullptr, {26, 33}, UnitKind::Layer, l,
        {{name + "q", {17, 33}, none}, {name + "k", {5, 33}, none}, {name + "v", {4, 33}, none}}});
    Parameter up{nullptr, {experts, 11, 33}, UnitKind::Experts, l, {}};
    for (int e = c.ep_rank * experts; e < (c.ep_rank + 1) * experts; e++)
      up.pieces.push_back({name + "experts." + std::to_string(e) + ".up", {11, 33}, none});
    table.push_back(up);
  }
  if (c.pp_rank == c.pp - 1)
    table.push_back({nullptr, {33}, UnitKind::Head, -1, {{"norm", {33}, none}}});
  return table;
}

// What element `index` of tensor `name` is, as a moment `kind` (0: the weight) of generation
// `salt`.
float value_of(const std::string& name, int kind, int64_t index, int salt) {
  const uint64_t key = stream_key(static_cast<uint64_t>(kind * 1000 + salt), name);
  return static_cast<float>(normal_at(key, static_cast<uint64_t>(index)));
}

const Tensor& kind_of(const FlatUnit& unit, int kind) {
  return kind == 0 ? unit.master : kind == 1 ? unit.m : unit.v;
}

Parameters parameters_of(Rank& rank) {
  ParameterTable table = table_of(rank.mesh);
  return make_parameters({std::move(table)}, false, mesh_of(rank), rank.id, &rank);
}

void fill(const Parameters& p, int salt, int only_unit = -1) {
  for (const Fragment& f : fragments(p))
    for (int kind = 0; kind < 3; kind++)
      for (int64_t i = 0; i < f.count && (only_unit < 0 || only_unit == f.unit); i++)
        kind_of(p.units[f.unit], kind).f32()[f.offset + i] =
            value_of(f.piece->name, kind, f.begin + i, salt);
}

// Elements that are not what fill(salt) wrote, bit by bit; moments only if `kinds` is 3.
int64_t differing(const Parameters& p, int salt, int kinds = 3) {
  int64_t wrong = 0;
  for (const Fragment& f : fragments(p))
    for (int kind = 0; kind < kinds; kind++)
      for (int64_t i = 0; i < f.count; i++) {
        const float want = value_of(f.piece->name, kind, f.begin + i, salt);
        const float* got = kind_of(p.units[f.unit], kind).f32() + f.offset + i;
        wrong += memcmp(got, &want, sizeof(float)) != 0;
      }
  return wrong;
}

const char* const kConfig = "[train]\nsteps = 10\n\n[data]\nsequence_length = 32\n";

RunState state_at(int64_t step) {
  return {.step = step,
      .updates = step - 1,
      .samples = step * 64,
      .seed = 0xfedcba9876543210,
      .data_fingerprint = 0x8000000000000001,
      .optimizer = "adamw",
      .balance_counts = {1.0 / 3, 0, 1e300, 12345678901234.0},
      .config = kConfig,
      .model = R"({"model_type": "test", "hidden_size": 33})"};
}

// Saves `salt` as a step of the run, under a mesh.
void save(const Mesh& mesh, const std::string& folder, int64_t step, int salt, int64_t keep = 0) {
  run_ranks(mesh, Device::CPU, quick(), [&](Rank& rank) {
    const Parameters p = parameters_of(rank);
    fill(p, salt);
    CheckpointSaver saver(rank, p, {folder, keep});
    saver.begin(rank, state_at(step));
    EXPECT_TRUE(saver.finish(rank));
    EXPECT_EQ(find_checkpoint(folder)->state.step, step);
  });
}

void expect_loads(const Mesh& mesh, const Checkpoint& c, int salt) {
  run_ranks(mesh, Device::CPU, quick(), [&](Rank& rank) {
    Parameters p = parameters_of(rank);
    load_state(rank, p, c);
    EXPECT_EQ(differing(p, salt), 0) << "rank " << rank.id << " of pp " << mesh.pp << " dp "
                                     << mesh.dp << " cp " << mesh.cp << " ep " << mesh.ep;
  });
}

std::vector<std::string> names_in(const std::string& folder) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder)) names.push_back(entry.path().filename());
  std::sort(names.begin(), names.end());
  return names;
}

// ---- saving and loading ----

TEST(Checkpoint, EveryLayoutLoadsEveryOther) {
  const Mesh meshes[] = {make_mesh(1, 1, 1, 1), make_mesh(3, 1, 1, 1), make_mesh(5, 1, 5, 1),
      make_mesh(4, 1, 1, 4), make_mesh(4, 4, 1, 1), make_mesh(16, 2, 2, 2), make_mesh(8, 1, 2, 1),
      make_mesh(4, 1, 1, 1, 2), make_mesh(12, 2, 1, 1, 2), make_mesh(9, 1, 3, 1)};
  const std::string run = fresh_folder("ckpt_layouts");
  int salt = 0;
  for (const Mesh& from : meshes) {
    salt++;
    save(from, run, salt, salt);
    const Checkpoint c = open_checkpoint(run + "/" + text("step-%08d", salt));
    verify(c);
    EXPECT_EQ(c.mesh, from);
    EXPECT_EQ(c.files.size(), names_in(c.folder).size() - 1);  // and the manifest
    for (const Mesh& to : meshes) expect_loads(to, c, salt);
  }
}

TEST(Checkpoint, KeepsWhatIsNotATensor) {
  const std::string run = fresh_folder("ckpt_state");
  save(make_mesh(2, 1, 1, 1), run, 100, 1);
  const RunState got = find_checkpoint(run)->state, want = state_at(100);
  EXPECT_EQ(got.step, want.step);
  EXPECT_EQ(got.updates, want.updates);
  EXPECT_EQ(got.samples, want.samples);
  EXPECT_EQ(got.seed, want.seed);
  EXPECT_EQ(got.data_fingerprint, want.data_fingerprint);
  EXPECT_EQ(got.optimizer, want.optimizer);
  EXPECT_EQ(got.balance_counts, want.balance_counts);
  EXPECT_EQ(got.config, want.config);
  EXPECT_EQ(got.model, want.model);
}

TEST(Checkpoint, ReplicasWriteOnce) {
  const std::string run = fresh_folder("ckpt_hsdp");
  save(make_mesh(4, 1, 1, 1, 2), run, 1, 1);
  EXPECT_EQ(
      names_in(run + "/step-00000001"), (std::vector<std::string>{"manifest.json",
                                            "rank-00000.safetensors", "rank-00001.safetensors"}));
}

// The optimiser changes each unit as soon as it may; what is saved is the state at begin().
TEST(Checkpoint, TrainingGoesOnWhileItIsWritten) {
  const std::string run = fresh_folder("ckpt_background");
  const Mesh mesh = make_mesh(6, 1, 1, 2, 3);
  run_ranks(mesh, Device::CPU, quick(), [&](Rank& rank) {
    const Parameters p = parameters_of(rank);
    fill(p, 0);
    CheckpointSaver saver(rank, p, {run, 0});
    for (int step = 1; step <= 8; step++) {
      saver.begin(rank, state_at(step));
      EXPECT_TRUE(saver.under_way());
      if (step % 2) saver.poll(rank);
      for (int u = 0; u < static_cast<int>(p.units.size()); u++) {
        saver.wait_unit(u);
        fill(p, step, u);
      }
      EXPECT_GE(saver.take_stall(), 0);
      EXPECT_EQ(saver.take_stall(), 0);
    }
    EXPECT_TRUE(saver.finish(rank));
    EXPECT_FALSE(saver.under_way());
  });
  for (int step = 1; step <= 8; step++) {
    const Checkpoint c = open_checkpoint(run + "/" + text("step-%08d", step));
    verify(c);
    expect_loads(make_mesh(1, 1, 1, 1), c, step - 1);
  }
}

// Nobody calls finish(): polling once a step is enough to seal.
TEST(Checkpoint, PollingSeals) {
  const std::string run = fresh_folder("ckpt_poll");
  run_ranks(make_mesh(3, 1, 1, 1), Device::CPU, quick(), [&](Rank& rank) {
    const Parameters p = parameters_of(rank);
    fill(p, 1);
    CheckpointSaver saver(rank, p, {run, 0});
    saver.begin(rank, state_at(7));
    for (int i = 0; i < 20000 && saver.under_way(); i++) {
      saver.poll(rank);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    EXPECT_FALSE(saver.under_way());
  });
  expect_loads(make_mesh(2, 1, 1, 1), *find_checkpoint(run), 1);
}

TEST(Checkpoint, KeepsTheNewestAndLeavesNothingElse) {
  const std::string run = fresh_folder("ckpt_keep");
  for (const int step : {10, 20, 30, 40}) save(make_mesh(2, 1, 1, 1), run, step, step, 2);
  EXPECT_EQ(names_in(run), (std::vector<std::string>{"step-00000030", "step-00000040"}));
  // Gone back to 30 and on: 40 is no longer this run's, and is not taken by a later resume.
  save(make_mesh(2, 1, 1, 1), run, 35, 35, 2);
  EXPECT_EQ(names_in(run), (std::vector<std::string>{"step-00000030", "step-00000035"}));
  EXPECT_EQ(find_checkpoint(run)->state.step, 35);
  // The same step again replaces it.
  save(make_mesh(1, 1, 1, 1), run, 35, 99, 2);
  expect_loads(make_mesh(1, 1, 1, 1), *find_checkpoint(run), 99);
  EXPECT_EQ(names_in(run).size(), 2u);
  fs::create_directories(run + "/step-00000050.tmp/x");
  fs::create_directories(run + "/step-00000007.old.tmp");
  save(make_mesh(1, 1, 1, 1), run, 60, 1, 1);
  EXPECT_EQ(names_in(run), std::vector<std::string>{"step-00000060"});
}

// ---- damage ----

void cut(const std::string& path, int64_t bytes) { fs::resize_file(path, bytes); }

void flip(const std::string& path, int64_t at, int bit = 3) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(at);
  const int byte = file.get();
  file.seekp(at);
  file.put(static_cast<char>(byte ^ (1 << bit)));
}

TEST(Checkpoint, DamageIsNamedAndTheOneBeforeUsed) {
  const struct {
    const char* error;
    void (*damage)(const std::string& folder);
  } cases[] = {
      {"rank-00001.safetensors: is cut short",
          [](const std::string& f) { cut(f + "/rank-00001.safetensors", 5000); }},
      {"rank-00000.safetensors: is cut short",
          [](const std::string& f) { cut(f + "/rank-00000.safetensors", 0); }},
      {"rank-00001.safetensors: is missing",
          [](const std::string& f) { fs::remove(f + "/rank-00001.safetensors"); }},
      {"is damaged (checksum",
          [](const std::string& f) {
            flip(f + "/rank-00001.safetensors",
                static_cast<int64_t>(fs::file_size(f + "/rank-00001.safetensors")) - 1);
          }},
      {"rank-00000.safetensors",
          [](const std::string& f) { flip(f + "/rank-00000.safetensors", 20); }},
      {"manifest.json: is damaged or cut short",
          [](const std::string& f) { cut(f + "/manifest.json", 2000); }},
      {"manifest.json: is damaged or cut short",
          [](const std::string& f) { flip(f + "/manifest.json", 60); }},
      {"manifest.json: is damaged or cut short",
          [](const std::string& f) { cut(f + "/manifest.json", 0); }},
      {"is no finished checkpoint (it has no manifest.json)",
          [](const std::string& f) { fs::remove(f + "/manifest.json"); }},
      {"is no finished checkpoint",
          [](const std::string& f) {
            fs::remove_all(f);
            fs::create_directory(f);
          }},
  };
  for (const auto& c : cases) {
    const std::string run = fresh_folder("ckpt_damage");
    save(make_mesh(2, 1, 1, 1), run, 1, 1);
    save(make_mesh(2, 1, 1, 1), run, 2, 2);
    c.damage(run + "/step-00000002");
    expect_part(
        error_of(kExitBadInput, [&] { verify(open_checkpoint(run + "/step-00000002")); }), c.error);
    log_to_file(run + "/log.txt");
    expect_loads(make_mesh(1, 1, 1, 1), *find_checkpoint(run), 1);
    log_to_file("");
    std::ifstream log(run + "/log.txt");
    const std::string logged{std::istreambuf_iterator<char>(log), {}};
    expect_part(logged, "checkpoint " + run + "/step-00000002 is left aside: ");
    expect_part(logged, c.error);
    c.damage(run + "/step-00000001");
    expect_part(error_of(kExitBadInput, [&] { find_checkpoint(run); }),
        run + ": none of its checkpoints is good (got 2 bad ones, named above)");
  }
  const std::string empty = fresh_folder("ckpt_none");
  EXPECT_FALSE(find_checkpoint(empty));
  EXPECT_FALSE(find_checkpoint(empty + "/not_there"));
  fs::create_directories(empty + "/step-00000009.tmp");
  EXPECT_FALSE(find_checkpoint(empty));
  expect_part(error_of(kExitBadInput, [&] { open_checkpoint(empty + "/step-00000009"); }),
      "there is no such checkpoint");
}

TEST(Checkpoint, EveryFlippedBitIsFound) {
  const std::string run = fresh_folder("ckpt_flip");
  save(make_mesh(2, 1, 1, 1), run, 1, 1);
  const std::string folder = run + "/step-00000001";
  int flips = 0;
  for (const std::string& name : names_in(folder)) {
    const std::string path = folder + "/" + name;
    const int64_t size = static_cast<int64_t>(fs::file_size(path));
    for (int64_t at = 0; at < size; at += std::max<int64_t>(1, size / 150), flips++) {
      flip(path, at, flips % 8);
      EXPECT_NE(error_of(kExitBadInput, [&] { verify(open_checkpoint(folder)); }), "no error")
          << name << " byte " << at << " bit " << flips % 8;
      flip(path, at, flips % 8);
    }
  }
  verify(open_checkpoint(folder));
}

// ---- failing saves ----

// A full disk, where `name` is written: rank 1's shard, what it leaves for sealing, the manifest.
TEST(Checkpoint, FullDiskTakesTheSaveBack) {
  if (access("/dev/full", W_OK) != 0) GTEST_SKIP() << "no /dev/full here";
  for (const char* name : {"rank-00001.safetensors", "rank-00001.json", "manifest.json"}) {
    const std::string run = fresh_folder("ckpt_full");
    save(make_mesh(3, 1, 1, 1), run, 1, 1);
    log_to_file(run + "/log.txt");
    run_ranks(make_mesh(3, 1, 1, 1), Device::CPU, quick(), [&](Rank& rank) {
      const Parameters p = parameters_of(rank);
      fill(p, 2);
      CheckpointSaver saver(rank, p, {run, 1});
      if (rank.id == 0) {
        fs::create_directories(run + "/step-00000002.tmp");
        fs::create_symlink("/dev/full", run + "/step-00000002.tmp/" + name + ".tmp");
      }
      barrier(rank, Group::World, "test");
      saver.begin(rank, state_at(2));
      for (size_t u = 0; u < p.units.size(); u++) saver.wait_unit(static_cast<int>(u));
      EXPECT_FALSE(saver.finish(rank));
      if (rank.id == 0) {
        EXPECT_EQ(names_in(run), (std::vector<std::string>{"log.txt", "step-00000001"}));
        EXPECT_EQ(find_checkpoint(run)->state.step, 1);
      }
      barrier(rank, Group::World, "test");
      saver.begin(rank, state_at(3));
      EXPECT_TRUE(saver.finish(rank));
    });
    log_to_file("");
    std::ifstream log(run + "/log.txt");
    const std::string logged{std::istreambuf_iterator<char>(log), {}};
    expect_part(logged, "No space left on device");
    expect_part(logged, "step-00000002 was not saved");
    EXPECT_EQ(logged.find("given up"), std::string::npos);
    expect_loads(make_mesh(2, 1, 1, 1), *find_checkpoint(run), 2);
    EXPECT_EQ(names_in(run), (std::vector<std::string>{"log.txt", "step-00000003"}));
  }
}

// Any other errno: the files may not grow beyond a limit.
TEST(Checkpoint, FailingWritesTakeTheSaveBack) {
  const std::string run = fresh_folder("ckpt_limit");
  save(make_mesh(2, 1, 1, 1), run, 1, 1);
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  auto* handler = signal(SIGXFSZ, SIG_IGN);
  run_ranks(make_mesh(2, 1, 1, 1), Device::CPU, quick(), [&](Rank& rank) {
    const Parameters p = parameters_of(rank);
    fill(p, 2);
    CheckpointSaver saver(rank, p, {run, 0});
    for (const rlim_t limit : {rlim_t{10}, rlim_t{3000}, rlim_t{30000}}) {
      rlimit small{limit, before.rlim_max};
      if (rank.id == 0) setrlimit(RLIMIT_FSIZE, &small);
      barrier(rank, Group::World, "test");
      saver.begin(rank, state_at(2));
      EXPECT_FALSE(saver.finish(rank));
      EXPECT_EQ(names_in(run), std::vector<std::string>{"step-00000001"});
      barrier(rank, Group::World, "test");
    }
    if (rank.id == 0) setrlimit(RLIMIT_FSIZE, &before);
    barrier(rank, Group::World, "test");
    saver.begin(rank, state_at(2));
    EXPECT_TRUE(saver.finish(rank));
  });
  signal(SIGXFSZ, handler);
  EXPECT_EQ(find_checkpoint(run)->state.step, 2);
}

// A rank that throws while its shards are being written ends the run, not the process.
// Rank 2 never writes its part, so nothing is sealed however fast the others are.
TEST(Checkpoint, AFailingRankJoinsItsSaver) {
  const std::string run = fresh_folder("ckpt_throw");
  expect_part(error_of(kExitFailed,
                  [&] {
                    run_ranks(make_mesh(3, 1, 1, 1), Device::CPU, quick(), [&](Rank& rank) {
                      const Parameters p = parameters_of(rank);
                      CheckpointSaver saver(rank, p, {run, 0});
                      if (rank.id == 2) barrier(rank, Group::World, "until another fails");
                      saver.begin(rank, state_at(1));
                      if (rank.id == 1) failed("test", "on purpose");
                      saver.finish(rank);
                    });
                  }),
      "on purpose");
  EXPECT_FALSE(find_checkpoint(run));
}

// A child saves without end and is killed at some moment; what it leaves is whole, and a new run
// cleans up and goes on from it.
TEST(SlowCheckpoint, SurvivesKills) {
  const std::string run = fresh_folder("ckpt_kill");
  const Mesh mesh = make_mesh(3, 1, 1, 1);
  int64_t last = 0;
  for (int round = 0; round < 40; round++) {
    const pid_t child = fork();
    if (child == 0) {
      run_ranks(mesh, Device::CPU, quick(), [&](Rank& rank) {
        Parameters p = parameters_of(rank);
        CheckpointSaver saver(rank, p, {run, 2});
        for (int64_t step = last + 1;; step++) {
          saver.begin(rank, state_at(step));
          for (size_t u = 0; u < p.units.size(); u++) {
            saver.wait_unit(static_cast<int>(u));
            fill(p, static_cast<int>(step), static_cast<int>(u));
          }
          saver.poll(rank);
        }
      });
      _exit(0);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20 + 7 * round));
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
    const std::optional<Checkpoint> c = find_checkpoint(run);
    if (!c) continue;
    EXPECT_GE(c->state.step, last);
    last = c->state.step;
    EXPECT_LE(list_checkpoints(run).size(), 3u);  // before pruning there may be one more
    if (last > 1)
      run_ranks(mesh, Device::CPU, quick(), [&](Rank& rank) {
        Parameters p = parameters_of(rank);
        load_state(rank, p, *c);
        const int64_t fresh = differing(p, static_cast<int>(last - 1));
        int64_t zeros = 0;  // the first save of a child is of zeros
        for (const FlatUnit& unit : p.units)
          for (int64_t i = 0; i < unit.shard_count; i++) zeros += unit.master.f32()[i] == 0;
        EXPECT_TRUE(fresh == 0 || zeros > 0) << "round " << round << ", step " << last;
      });
  }
  EXPECT_GT(last, 1);
}

// ---- resuming ----

TEST(Checkpoint, RefusesToGoOnAsAnotherRun) {
  Checkpoint c;
  c.folder = "runs/a/step-00000100";
  c.state = state_at(100);
  const RunState same = c.state;
  check_resumable(c, same);
  const struct {
    const char* error;
    void (*change)(RunState& now);
  } cases[] = {
      {"runs/a/step-00000100: the model's hidden_size differs from the saved run's (got 64, need "
       "33)",
          [](RunState& now) { now.model = R"({"model_type": "test", "hidden_size": 64})"; }},
      {"the model's top_k differs from the saved run's (got 2, need nothing)",
          [](RunState& now) {
            now.model = R"({"model_type": "test", "hidden_size": 33, "top_k": 2})";
          }},
      {"data.seed differs", [](RunState& now) { now.seed++; }},
      {"the data set (its fingerprint) differs", [](RunState& now) { now.data_fingerprint++; }},
      {"the optimiser differs", [](RunState& now) { now.optimizer = "muon"; }},
      {"data.sequence_length differs from the saved run's (got 64, need 32)",
          [](RunState& now) {
            now.config = "[train]\nsteps = 10\n\n[data]\nsequence_length = 64\n";
          }},
      {"no error",
          [](RunState& now) {
            now.config = "[train]\nsteps = 99\n\n[data]\nsequence_length = 32\n";
          }},
      {"no error",
          [](RunState& now) { now.model = R"({"hidden_size":33,  "model_type":"test"})"; }},
  };
  for (const auto& one : cases) {
    RunState now = same;
    one.change(now);
    expect_part(error_of(kExitBadInput, [&] { check_resumable(c, now); }), one.error);
  }
  c.state.optimizer = "none";
  expect_part(error_of(kExitBadInput, [&] { check_resumable(c, same); }), "holds weights alone");
}

TEST(Checkpoint, LoadNamesTensorsThatDoNotFit) {
  const std::string run = fresh_folder("ckpt_fit");
  save(make_mesh(1, 1, 1, 1), run, 1, 1);
  const Checkpoint c = *find_checkpoint(run);
  const struct {
    Piece piece;
    const char* error;
  } cases[] = {{{"other", {33}, {}}, "step-00000001: other: is missing"},
      {{"norm", {11, 3}, {}}, "step-00000001: norm: has another shape"}};
  for (const auto& one : cases)
    expect_part(error_of(kExitBadInput,
                    [&] {
                      run_ranks(Mesh{}, Device::CPU, quick(), [&](Rank& rank) {
                        Parameters p =
                            make_parameters({{{nullptr, {33}, UnitKind::Head, -1, {one.piece}}}},
                                false, mesh_of(rank), rank.id, &rank);
                        load_state(rank, p, c);
                      });
                    }),
        one.error);
}

// ---- weights alone ----

ParameterTable whole() { return table_of(coord_of(make_mesh(1, 1, 1, 1), 0)); }

// The model of fill(salt) as a Hugging Face folder; tensors in reverse.
void write_hugging_face(const std::string& folder, int salt, auto&& change) {
  std::vector<TensorDecl> tensors;
  std::vector<std::vector<float>> values;
  for (const Parameter& parameter : whole())
    for (const Piece& piece : parameter.pieces) {
      tensors.push_back(
          {piece.name, FileDType::F32, {piece.dims.size, piece.dims.size + piece.dims.rank}});
      values.emplace_back();
      for (int64_t i = 0; i < piece.dims.numel(); i++)
        values.back().push_back(value_of(piece.name, 0, i, salt));
    }
  change(tensors, values);
  size_t next = 0;
  write_model_files(folder, tensors, 4000, [&](const TensorDecl&) { return values[next++]; });
  write_file_durably(folder + "/config.json", R"({"model_type": "test"})");
}

using Decls = std::vector<TensorDecl>;
using Values = std::vector<std::vector<float>>;

TEST(Weights, LoadFromEitherKindUnderAnyLayout) {
  const std::string run = fresh_folder("weights_run"), hf = fresh_folder("weights_hf");
  save(make_mesh(6, 1, 3, 2), run, 1, 5);
  write_hugging_face(hf, 5, [](Decls&, Values&) {});
  for (const std::string& folder : {run, run + "/step-00000001", hf}) {
    const Checkpoint source = open_weights(folder);
    check_weights(source, whole());
    expect_part(source.state.model, R"("model_type": "test")");
    for (const Mesh& mesh : {make_mesh(1, 1, 1, 1), make_mesh(8, 2, 1, 2), make_mesh(5, 1, 1, 1)})
      run_ranks(mesh, Device::CPU, quick(), [&](Rank& rank) {
        Parameters p = parameters_of(rank);
        load_state(rank, p, source, false);
        EXPECT_EQ(differing(p, 5, 1), 0);
        for (const FlatUnit& unit : p.units)
          for (int64_t i = 0; i < unit.shard_count; i++)
            ASSERT_TRUE(unit.m.f32()[i] == 0 && unit.v.f32()[i] == 0);
      });
  }
}

TEST(Weights, FaultsAreListedByName) {
  const struct {
    std::vector<const char*> parts;
    void (*change)(Decls& tensors, Values& values);
  } cases[] = {
      {{"2 missing: embed, layers.0.norm"},
          [](Decls& t, Values& v) {
            t.erase(t.begin(), t.begin() + 2);
            v.erase(v.begin(), v.begin() + 2);
          }},
      {{"1 not of this model: lm_head.bias [3] F32"},
          [](Decls& t, Values& v) {
            t.push_back({"lm_head.bias", FileDType::F32, {3}});
            v.push_back({1, 2, 3});
          }},
      {{"1 of another shape or type: embed (got [33,7] F32, need [7,33] F32)"},
          [](Decls& t, Values&) {
            t[0].shape = {33, 7};
          }},
      {{"embed (got [7,33] I32, need [7,33] F32)"},
          [](Decls& t, Values&) { t[0].dtype = FileDType::I32; }},
      {{"1 missing: embed", "1 not of this model: embedding [7,33] F32"},
          [](Decls& t, Values&) { t[0].name = "embedding"; }},
      {{"2 tensors with NaN or Inf: embed (1 of 231 values), layers.0.norm (2 of 33 values)"},
          [](Decls&, Values& v) {
            v[0][230] = NAN;
            v[1][0] = INFINITY;
            v[1][32] = -INFINITY;
          }},
  };
  for (const auto& one : cases) {
    const std::string folder = fresh_folder("weights_bad");
    write_hugging_face(folder, 1, one.change);
    const std::string error =
        error_of(kExitBadInput, [&] { check_weights(open_weights(folder), whole()); });
    expect_part(error, folder + ": ");
    for (const char* part : one.parts) expect_part(error, part);
  }
}

// ---- lock ----

TEST(RunLock, RefusesASecondRun) {
  const std::string run = fresh_folder("lock") + "/made/too";
  {
    const RunLock lock(run);
    expect_part(
        error_of(kExitBadInput, [&] { RunLock second(run); }), run + ": another run writes there");
  }
  const RunLock again(run);
  // A killed holder leaves nothing behind.
  const std::string other = fresh_folder("lock_killed");
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  const pid_t child = fork();
  if (child == 0) {
    const RunLock lock(other);
    if (write(ready[1], "x", 1) != 1) _exit(1);
    pause();
  }
  char byte = 0;
  ASSERT_EQ(read(ready[0], &byte, 1), 1);
  expect_part(error_of(kExitBadInput, [&] { RunLock lock(other); }), "another run writes there");
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  const RunLock lock(other);
}

}  // namespace
}  // namespace pith
