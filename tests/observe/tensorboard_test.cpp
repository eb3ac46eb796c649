#include "observe/metrics.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>

#include "core/json.h"

namespace pith {

namespace fs = std::filesystem;

static std::string fresh_folder(const char* name) {
  const std::string path = testing::TempDir() + "pith_" + name + "_" + std::to_string(getpid());
  fs::remove_all(path);
  return path;
}

static std::string from_hex(const std::string& hex) {
  std::string out;
  for (size_t i = 0; i < hex.size(); i += 2)
    out += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  return out;
}

// RFC 3720 B.4, and the check value of the CRC catalogues.
TEST(TensorBoard, Crc32c) {
  std::string rising;
  for (int i = 0; i < 32; i++) rising += static_cast<char>(i);
  struct {
    std::string bytes;
    uint32_t crc;
  } cases[] = {{"", 0}, {"123456789", 0xe3069283}, {std::string(32, 0), 0x8a9136aa},
      {std::string(32, '\xff'), 0x62a8ab43}, {rising, 0x46dd794e},
      {std::string(rising.rbegin(), rising.rend()), 0x113fdb5c}};
  for (const auto& c : cases) EXPECT_EQ(crc32c(c.bytes), c.crc);
}

// Made with the protocol buffers and the CRC of the tensorboard package (2.20): the version, the
// restart at step 300, two scalars.
TEST(TensorBoard, BytesOfTheReference) {
  const std::string version =
      "1800000000000000a37f4b220900002040fc54d9411a0d627261696e2e4576656e"
      "743a322b353110";
  const std::string restart = "100000000000000095fbfe180900002040fc54d94110ac023a020801b94512a3";
  const std::string scalars =
      "2400000000000000422b804d0900005040fc54d94110ac022a160a0a0a03612f62"
      "15000020400a080a0163156f1283ba2bd43914";
  struct {
    int64_t first_step;
    std::string want;
  } cases[] = {{1, version + scalars}, {300, version + restart + scalars}};
  for (const auto& c : cases) {
    const std::string folder = fresh_folder("tensorboard");
    const std::string path = begin_events(folder, c.first_step, 1700000000.5);
    append_scalars(path, 300, 1700000001.25, {{"a/b", 2.5}, {"c", -1e-3}});
    EXPECT_EQ(read_text_file(path), from_hex(c.want));
    EXPECT_EQ(path.find(folder + "/events.out.tfevents.1700000000."), 0u);
  }
}

// Cuts a file into its frames with a CRC-32C of its own: by table, from the most significant bit.
static std::vector<std::string> frames_of(const std::string& bytes) {
  const auto reversed = [](uint32_t v, int bits) {
    uint32_t out = 0;
    for (int i = 0; i < bits; i++) out |= (v >> i & 1) << (bits - 1 - i);
    return out;
  };
  const auto masked = [&](const std::string& data) {
    uint32_t table[256];
    for (uint32_t i = 0; i < 256; i++) {
      table[i] = i << 24;
      for (int bit = 0; bit < 8; bit++)
        table[i] = table[i] << 1 ^ (table[i] >> 31 ? 0x1edc6f41u : 0);
    }
    uint32_t crc = 0xffffffff;
    for (const char c : data)
      crc = crc << 8 ^ table[crc >> 24 ^ reversed(static_cast<uint8_t>(c), 8)];
    crc = reversed(~crc, 32);
    return ((crc >> 15) | (crc << 17)) + 0xa282ead8u;
  };
  const auto u32 = [&](size_t at) {
    uint32_t v = 0;
    memcpy(&v, bytes.data() + at, 4);
    return v;
  };
  std::vector<std::string> frames;
  for (size_t at = 0; at < bytes.size();) {
    const size_t length = u32(at);
    EXPECT_EQ(u32(at + 8), masked(bytes.substr(at, 8)));
    frames.push_back(bytes.substr(at + 12, length));
    EXPECT_EQ(u32(at + 12 + length), masked(frames.back()));
    at += length + 16;
  }
  return frames;
}

TEST(TensorBoard, StepWritesEveryNumber) {
  StepMetrics m;
  m.step = 7;
  m.loss = 2;
  m.seconds = 0.5;
  m.tokens = 100;
  std::vector<const char*> tags = {"step/cross_entropy_loss", "step/learning_rate",
      "step/gradient_norm", "step/step_time", "step/tokens_per_second", "step/peak_memory"};
  std::vector<const char*> more = {"step/load_balance_loss", "step/mfu", "step/eval_loss",
      "expert_load_max/layer-001", "expert_load_dead/layer-000", "expert_load_entropy/layer-001"};
  const std::string path = begin_events(fresh_folder("tensorboard_step"), 1, 1700000000);
  append_step(path + ".jsonl", path, m, 1700000001);
  m.balance_loss = {1};
  m.mfu = 0.5;
  m.eval_loss = 2.5;
  m.load = {{1, 1}, {0, 0}, {1, 1}};
  append_step(path + ".jsonl", path, m, 1700000002);
  const std::vector<std::string> frames = frames_of(read_text_file(path));
  ASSERT_EQ(frames.size(), 3u);
  const auto has = [](const std::string& frame, const char* tag) {
    return frame.find(std::string("\x0a") + static_cast<char>(strlen(tag)) + tag + "\x15") !=
           std::string::npos;
  };
  for (const char* tag : tags) EXPECT_TRUE(has(frames[1], tag) && has(frames[2], tag)) << tag;
  for (const char* tag : more) EXPECT_TRUE(!has(frames[1], tag) && has(frames[2], tag)) << tag;
}

TEST(TensorBoard, FolderThatCannotBe) { EXPECT_THROW(begin_events("/proc/no/such", 1, 0), Error); }

}  // namespace pith
