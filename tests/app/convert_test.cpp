// pith convert and pith checkpoint, as commands.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "app/commands.h"
#include "core/process.h"
#include "core/rng.h"
#include "engine/checkpoint.h"
#include "engine/instance.h"
#include "helpers.h"

namespace pith {
namespace {

namespace fs = std::filesystem;

int call(int (*command)(int, char**), std::vector<std::string> words) {
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  return command(static_cast<int>(argv.size()), argv.data());
}

int convert(std::vector<std::string> words) {
  words.insert(words.begin(), "convert");
  return call(run_convert, std::move(words));
}

const char* const kConfig = R"({
  "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 24,
  "moe_intermediate_size": 10, "num_hidden_layers": 2, "num_experts": 4,
  "num_experts_per_tok": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8,
  "vocab_size": 50, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "norm_topk_prob": true
})";

ParameterTable table() { return whole_table(Json::parse(kConfig, "config.json")); }

struct Model {
  std::vector<TensorDecl> tensors;
  std::vector<std::vector<float>> values;
};

Model make_model(FileDType dtype) {
  Model m;
  for (const Parameter& parameter : table())
    for (const Piece& piece : parameter.pieces) {
      m.tensors.push_back(
          {piece.name, dtype, {piece.dims.size, piece.dims.size + piece.dims.rank}});
      m.values.emplace_back();
      const uint64_t key = stream_key(1, piece.name);
      for (int64_t i = 0; i < piece.dims.numel(); i++)
        m.values.back().push_back(static_cast<float>(normal_at(key, static_cast<uint64_t>(i))));
    }
  return m;
}

// Shards of at most 6,000 bytes, with companions.
void write_model(const std::string& folder, const Model& m) {
  size_t next = 0;
  write_model_files(folder, m.tensors, 6000, [&](const TensorDecl& tensor) {
    const std::vector<float>& values = m.values[next++];
    std::vector<char> bytes(static_cast<size_t>(tensor.bytes()));
    if (tensor.dtype == FileDType::F64) {
      const std::vector<double> wide(values.begin(), values.end());
      memcpy(bytes.data(), wide.data(), bytes.size());
    } else {
      from_f32(tensor.dtype, values.data(), bytes.data(), static_cast<int64_t>(values.size()));
    }
    return bytes;
  });
  write_file_durably(folder + "/config.json", kConfig);
  write_file_durably(folder + "/tokenizer.json", "{\"a\": 1}");
  write_file_durably(folder + "/generation_config.json", "{}");
}

void expect_same_tensors(const std::string& got_folder, const std::string& want_folder) {
  const Safetensors got = open_safetensors(got_folder), want = open_safetensors(want_folder);
  EXPECT_EQ(got.tensors.size(), want.tensors.size());
  for (const auto& [name, tensor] : want.tensors) {
    const TensorEntry& other = got.tensors.at(name);
    ASSERT_EQ(describe(other), describe(tensor)) << tensor.name;
    EXPECT_EQ(memcmp(other.data, tensor.data, static_cast<size_t>(tensor.bytes())), 0)
        << tensor.name;
  }
}

TEST(Convert, RoundTripIsBitExact) {
  for (const FileDType dtype : {FileDType::F32, FileDType::BF16}) {
    const std::string run = fresh_folder("convert_round"), hf = run + "/hf";
    fs::create_directories(hf);
    write_model(hf, make_model(dtype));
    const std::string name = dtype == FileDType::F32 ? "fp32" : "bf16";
    EXPECT_EQ(convert({"import-hf", hf, run + "/step-00000000"}), kExitDone);
    const Checkpoint c = open_checkpoint(run + "/step-00000000");
    verify(c);
    EXPECT_EQ(c.files.size(), 1u);
    EXPECT_EQ(c.state.optimizer, "none");
    EXPECT_EQ(c.tensors.at("lm_head.weight").dtype, dtype);
    const std::string out = run + "/out";
    EXPECT_EQ(convert({"export-hf", c.folder, out + "/", "--dtype", name}), kExitDone);
    expect_same_tensors(out, hf);
    EXPECT_EQ(read_text_file(out + "/tokenizer.json"), "{\"a\": 1}");
    EXPECT_TRUE(fs::exists(out + "/generation_config.json"));
    EXPECT_EQ(Json::parse_file(out + "/tokenizer_config.json")["tokenizer_class"].as_string(),
        "PreTrainedTokenizerFast");
    const Json config = Json::parse_file(out + "/config.json");
    EXPECT_EQ(config["torch_dtype"].as_string(), name == "fp32" ? "float32" : "bfloat16");
    EXPECT_EQ(config["hidden_size"].as_int(), 24);
    EXPECT_FALSE(fs::exists(out + ".tmp"));
  }
}

TEST(Convert, OtherDtypesAreWidenedAndRounded) {
  const std::string run = fresh_folder("convert_dtypes");
  const Model m = make_model(FileDType::F64);
  fs::create_directories(run + "/f64");
  write_model(run + "/f64", m);
  write_file_durably(run + "/f64/tokenizer_config.json", "{\"own\": 1}");
  fs::create_directories(run + "/f32");
  write_model(run + "/f32", make_model(FileDType::F32));
  fs::create_directories(run + "/bf16");
  write_model(run + "/bf16", make_model(FileDType::BF16));
  EXPECT_EQ(convert({"import-hf", run + "/f64", run + "/checkpoint"}), kExitDone);
  EXPECT_EQ(
      convert({"export-hf", run + "/checkpoint", run + "/out32", "--dtype", "fp32"}), kExitDone);
  EXPECT_EQ(convert({"export-hf", run + "/checkpoint", run + "/out16", "--tokenizer",
                run + "/f64/tokenizer.json"}),
      kExitDone);
  expect_same_tensors(run + "/out32", run + "/f32");
  EXPECT_EQ(read_text_file(run + "/out16/tokenizer_config.json"), "{\"own\": 1}");
  expect_same_tensors(run + "/out16", run + "/bf16");
}

TEST(Convert, FaultsAreNamedAndNothingIsLeft) {
  const struct {
    const char* error;
    void (*change)(Model& m);
  } cases[] = {
      {"1 missing: model.embed_tokens.weight",
          [](Model& m) {
            m.tensors.erase(m.tensors.begin());
            m.values.erase(m.values.begin());
          }},
      {"1 not of this model: model.layers.0.self_attn.q_proj.bias [24] F32",
          [](Model& m) {
            m.tensors.push_back({"model.layers.0.self_attn.q_proj.bias", FileDType::F32, {24}});
            m.values.emplace_back(24, 0.0f);
          }},
      {"1 of another shape or type: model.embed_tokens.weight (got [24,50] F32, need [50,24] "
       "F32)",
          [](Model& m) {
            m.tensors[0].shape = {24, 50};
          }},
      {"1 tensors with NaN or Inf: model.embed_tokens.weight (1 of 1200 values)",
          [](Model& m) { m.values[0][7] = NAN; }},
  };
  for (const auto& one : cases) {
    const std::string run = fresh_folder("convert_bad"), hf = run + "/hf";
    fs::create_directories(hf);
    Model m = make_model(FileDType::F32);
    one.change(m);
    write_model(hf, m);
    expect_part(error_of(kExitBadInput,
                    [&] {
                      convert({"import-hf", hf, run + "/out"});
                    }),
        one.error);
    EXPECT_FALSE(fs::exists(run + "/out") || fs::exists(run + "/out.tmp"));
  }
}

TEST(Convert, RefusesWhatItCannotDo) {
  const std::string run = fresh_folder("convert_refuse"), hf = run + "/hf";
  fs::create_directories(hf);
  fs::create_directories(run + "/full/x");
  fs::create_directories(run + "/odd");
  write_model(hf, make_model(FileDType::F32));
  write_model(run + "/odd", make_model(FileDType::F32));
  write_file_durably(run + "/odd/config.json", R"({"model_type": "llama"})");
  EXPECT_EQ(convert({"import-hf", hf, run + "/good"}), kExitDone);
  const std::string good = run + "/good", out = run + "/out";
  const struct {
    std::vector<std::string> words;
    std::string error;
  } cases[] = {
      {{"import-hf", good, out}, good + ": is no Hugging Face folder"},
      {{"export-hf", hf, out}, hf + ": is no checkpoint or run folder"},
      {{"export-hf", run + "/none", out}, run + "/none"},
      {{"export-hf", good, run + "/full"}, "/full: is there already and is not an empty folder"},
      {{"export-hf", good, hf}, "is there already"},
      {{"export-hf", good, out, "--dtype", "fp8"}, "fp8"},
      {{"export-hf", good, out, "--tokenizer", run + "/full"}, "/full: has no tokenizer files"},
      {{"import-hf", run + "/odd", out}, "model_type: is not implemented (got \"llama\""},
      {{"export-hf", good}, "to"},
      {{"sideways", good, out}, "sideways"},
  };
  for (const auto& one : cases) {
    expect_part(error_of(kExitBadInput, [&] { convert(one.words); }), one.error);
    EXPECT_FALSE(fs::exists(out) || fs::exists(out + ".tmp")) << one.error;
  }
  fs::create_directories(out + ".tmp");
  expect_part(error_of(kExitBadInput,
                  [&] {
                    convert({"export-hf", good, out});
                  }),
      "was left by a conversion that was killed");
}

// In a child, because the stop flag and the limit are the process's.
int exit_code_of_child(auto&& action) {
  const pid_t child = fork();
  if (child == 0) {
    try {
      action();
    } catch (const Error& error) {
      _exit(error.exit_code);
    }
    _exit(99);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST(Convert, FullDisksAndSignalsLeaveNothing) {
  const std::string run = fresh_folder("convert_full"), hf = run + "/hf";
  fs::create_directories(hf);
  write_model(hf, make_model(FileDType::F32));
  EXPECT_EQ(convert({"import-hf", hf, run + "/good"}), kExitDone);
  for (const bool full : {true, false})
    for (const char* action : {"import-hf", "export-hf"}) {
      const std::string from = action[0] == 'i' ? hf : run + "/good";
      EXPECT_EQ(exit_code_of_child([&] {
        const rlimit small{5000, 5000};
        signal(SIGXFSZ, SIG_IGN);
        if (full && setrlimit(RLIMIT_FSIZE, &small) != 0) _exit(98);
        if (!full) request_stop();
        convert({action, from, run + "/out"});
      }),
          kExitFailed);
      EXPECT_FALSE(fs::exists(run + "/out") || fs::exists(run + "/out.tmp")) << action;
    }
}

// ---- pith checkpoint ----

Json output_of(std::vector<std::string> words, int exit_code) {
  words.insert(words.begin(), "checkpoint");
  words.push_back("--json");
  testing::internal::CaptureStdout();
  EXPECT_EQ(call(run_checkpoint, words), exit_code);
  return Json::parse(testing::internal::GetCapturedStdout(), "output");
}

TEST(CheckpointCommand, Verifies) {
  const std::string run = fresh_folder("checkpoint_command"), hf = run + "/hf";
  fs::create_directories(hf);
  write_model(hf, make_model(FileDType::F32));
  for (const char* name : {"/step-00000000", "/step-00000010"})
    EXPECT_EQ(convert({"import-hf", hf, run + name}), kExitDone);
  const std::string second = run + "/step-00000010";
  const Json all = output_of({"verify", run}, kExitDone);
  ASSERT_EQ(all.size(), 2);
  EXPECT_EQ(all[1]["path"].as_string(), second);
  EXPECT_TRUE(all[0]["good"].as_bool() && all[1]["good"].as_bool());
  EXPECT_EQ(output_of({"verify", second}, kExitDone).size(), 1);
  std::fstream file(second + "/model.safetensors", std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(-1, std::ios::end);
  file.put('\x55');
  file.close();
  const Json bad = output_of({"verify", run}, kExitBadInput);
  EXPECT_TRUE(bad[0]["good"].as_bool());
  EXPECT_FALSE(bad[1]["good"].as_bool());
  expect_part(bad[1]["error"].as_string(), "is damaged (checksum");
  fs::remove(second + "/manifest.json");
  expect_part(output_of({"verify", run}, kExitBadInput)[1]["error"].as_string(),
      "is no finished checkpoint");
  expect_part(output_of({"verify", run + "/none"}, kExitBadInput)[0]["error"].as_string(),
      "there is no such checkpoint");
}

TEST(CheckpointCommand, ComparesWeights) {
  const std::string run = fresh_folder("checkpoint_diff"), a = run + "/a", b = run + "/b";
  Model m = make_model(FileDType::F32);
  for (const std::string& folder : {a, b}) {
    fs::create_directories(folder);
    write_model(folder, m);
    for (float& x : m.values[4]) x *= 1.001f;
  }
  const std::string name = m.tensors[4].name;
  EXPECT_EQ(convert({"import-hf", a, run + "/step-00000000"}), kExitDone);
  const Json same = output_of({"diff", a, run, "--limit", "0"}, kExitDone);
  EXPECT_EQ(same.size(), static_cast<int64_t>(m.tensors.size()));
  EXPECT_EQ(same[0]["difference"].as_double(), 0);
  for (const std::string& folder : {a, run, run + "/step-00000000"}) {
    const Json worst = output_of({"diff", folder, b, "--limit", "9e-4"}, kExitFailed);
    EXPECT_EQ(worst[0]["name"].as_string(), name);
    EXPECT_NEAR(worst[0]["difference"].as_double(), 1e-3, 1e-6);
    EXPECT_EQ(worst[1]["difference"].as_double(), 0);
    output_of({"diff", folder, b, "--limit", "1.1e-3"}, kExitDone);
  }
  // Another model is refused, as are words that make no sense.
  m = make_model(FileDType::F32);
  m.tensors.pop_back();
  m.values.pop_back();
  fs::create_directories(run + "/c");
  write_model(run + "/c", m);
  const std::vector<std::pair<std::vector<std::string>, std::string>> rows = {
      {{"checkpoint", "diff", a, run + "/c"}, "1 missing"},
      {{"checkpoint", "diff", a}, "needs two folders"},
      {{"checkpoint", "verify", run, a}, "takes one folder"},
      {{"checkpoint", "verify", run, "--limit", "1"}, "takes one folder"}};
  for (const auto& [words, part] : rows)
    expect_part(error_of(kExitBadInput, [&] { call(run_checkpoint, words); }), part);
}

}  // namespace
}  // namespace pith
