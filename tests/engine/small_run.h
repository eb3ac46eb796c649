// small_run: a model and a corpus small enough for tests to train under many layouts.
// defines: SmallModel, small_run
#pragma once
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "core/rng.h"
#include "data/array_files.h"
#include "engine/config.h"

namespace pith {

struct SmallModel {
  int layers = 8, hidden = 32, experts = 8, top_k = 2, vocab = 64;
  int64_t length = 32, global_batch = 64, documents = 900;
};

// Writes config.json and a token file below a folder of this test's own and returns a configuration
// that trains on them, learning rate 1e-3.
inline RunConfig small_run(const SmallModel& m = {}) {
  const auto* test = testing::UnitTest::GetInstance()->current_test_info();
  std::string name = std::string(test->test_suite_name()) + "." + test->name();
  for (char& c : name)
    if (c == '/') c = '-';
  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() / ("pith-" + std::to_string(getpid())) / name;
  std::filesystem::create_directories(folder);
  std::ofstream(folder / "config.json")
      << R"({"model_type": "qwen3_moe", "hidden_size": )" << m.hidden
      << R"(, "num_hidden_layers": )" << m.layers
      << R"(, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,)"
      << R"( "num_experts": )" << m.experts << R"(, "num_experts_per_tok": )" << m.top_k
      << R"(, "norm_topk_prob": true, "moe_intermediate_size": 16, "vocab_size": )" << m.vocab
      << R"(, "max_position_embeddings": 4096, "rope_theta": 10000.0, "rms_norm_eps": 1e-6})";
  // Documents of 5 to 100 tokens from a chain in which two tokens in three follow from the last.
  std::vector<uint16_t> tokens;
  std::vector<uint64_t> ends;
  uint64_t draw = 0;
  const auto below = [&](int n) { return static_cast<int>(uniform_at(7, draw++) * n); };
  for (int64_t d = 0; d < m.documents; d++) {
    int token = below(m.vocab);
    for (int i = below(96) + 4; i > 0; i--) {
      tokens.push_back(static_cast<uint16_t>(token));
      token = below(3) ? (token * 5 + 3) % m.vocab : below(m.vocab);
    }
    tokens.push_back(0);
    ends.push_back(tokens.size());
  }
  const auto array = [](FileDType type, const auto& values) {
    const auto* data = reinterpret_cast<const char*>(values.data());
    return npy_header(type, {static_cast<int64_t>(values.size())})
        .append(data, values.size() * sizeof(values[0]));
  };
  write_file_durably(
      folder / "corpus.bin", array(FileDType::U16, tokens) + array(FileDType::U64, ends));
  RunConfig c;
  c.run.folder = folder / "run";
  c.model.config = folder / "config.json";
  c.model.init_std = 0.1;
  c.data.path = folder / "corpus.bin";
  c.data.sequence_length = m.length;
  c.data.max_epochs = 100;
  c.train.steps = 8;
  c.train.global_batch_size = m.global_batch;
  c.optimizer.lr = 1e-3;
  return c;
}

}  // namespace pith
