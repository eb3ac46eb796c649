#include <filesystem>

#include "app/commands.h"
#include "core/log.h"
#include "core/process.h"

namespace pith {
namespace fs = std::filesystem;

const char* const kCompanions[] = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
};

// From the folder named, or else beside the weights.
static void copy_companions(const string& named, const string& beside, const string& to) {
  string from = named.empty() ? beside : named;
  if (fs::is_regular_file(from)) from = folder_of(from);
  int copied = 0;
  for (const char* name : kCompanions) {
    string path = from + "/" + name;
    if (!fs::exists(path)) continue;
    write_file_durably(to + "/" + name, read_text_file(path));
    copied++;
  }
  if (copied == 0 && !named.empty())
    bad_input(named, "has no tokenizer files", "a folder with tokenizer.json");
  // Else transformers takes the model type's own class, with that one's pre-tokenizer.
  string config = to + "/tokenizer_config.json";
  if (fs::exists(to + "/tokenizer.json") && !fs::exists(config))
    write_file_durably(config, "{\"tokenizer_class\": \"PreTrainedTokenizerFast\"}\n");
}

static void write_weights(
    const Checkpoint& source, const vector<TensorDecl>& weights, const string& to) {
  const vector<Shard> shards = plan_shards(to, weights, 5'000'000'000);
  Progress progress("converting", double(weights.size()), "tensors");
  double done = 0;
  for (const Shard& shard : shards) {
    DurableFile file(shard.path);
    write_header(file, shard.tensors);
    for (const TensorDecl& weight : shard.tensors) {
      if (stop_requested()) failed("pith convert", "stopped by a signal; nothing was written");
      vector<float> values = read_tensor(source, source.tensors.at(weight.name));
      vector<char> bytes(size_t(weight.bytes()));
      from_f32(weight.dtype, values.data(), bytes.data(), i64(values.size()));
      file.write(bytes);
      progress.update(++done);
    }
    file.finish();
  }
  write_index(to, shards);
}

// With the dtype of the weights, which loaders take as their own.
static void write_config(const Json& config, FileDType dtype, const string& to) {
  JsonWriter w;
  w.object();
  for (const string& k : config.keys())
    if (k != "dtype" && k != "torch_dtype") w.key(k).raw(config[k].dump());
  w.members("torch_dtype", dtype == FileDType::BF16 ? "bfloat16" : "float32").end();
  write_file_durably(to + "/config.json", Json::parse(w.str(), to).dump(2) + "\n");
}

// As a checkpoint of weights alone.
static void seal(const string& folder) {
  Checkpoint c = open_weights(folder);
  for (StoredFile& file : c.files) file = stored_file(folder, fs::path(file.name).filename());
  write_manifest(c, folder + "/manifest.json");
}

int run_convert(int argc, char** argv) {
  Arguments args("pith convert");
  string action, from, to, tokenizer, dtype = "bf16";
  args.choice("action", action, {"export-hf", "import-hf"}, "the direction");
  args.option("from", from, "checkpoint or run folder; import-hf: Hugging Face folder");
  args.option("to", to, "folder to make");
  args.choice("--dtype", dtype, {"bf16", "fp32"}, "of exported weights");
  args.option("--tokenizer", tokenizer, "folder of tokenizer files; default: that of the weights");
  if (!args.parse(argc, argv)) return kExitDone;
  while (to.size() > 1 && to.back() == '/') to.pop_back();
  const ModelFolder source = open_model(from);
  bool exporting = action == "export-hf";
  if (exporting != fs::exists(source.weights.folder + "/manifest.json"))
    bad_input(from, exporting ? "is no checkpoint or run folder" : "is no Hugging Face folder",
        exporting ? "import-hf" : "export-hf");
  vector<TensorDecl> weights = declarations(source.table);
  for (TensorDecl& weight : weights) {
    const FileDType stored = source.weights.tensors.at(weight.name).dtype;
    bool narrow = exporting ? dtype == "bf16" : stored == FileDType::BF16;
    weight.dtype = narrow ? FileDType::BF16 : FileDType::F32;
  }
  // TO is whole or absent.
  string temporary = to + ".tmp";
  if (fs::exists(to) && !fs::is_empty(to))
    bad_input(to, "is there already and is not an empty folder", "a new folder");
  if (fs::exists(temporary))
    bad_input(temporary, "was left by a conversion that was killed", "remove it");
  make_folders(temporary);
  try {
    write_weights(source.weights, weights, temporary);
    write_config(source.config, weights[0].dtype, temporary);
    if (!exporting) seal(temporary);
    copy_companions(tokenizer, source.weights.folder, temporary);
    put_in_place(temporary, to);
  } catch (...) {
    fs::remove_all(temporary);
    throw;
  }
  log_info("%s: %zu tensors", to.c_str(), weights.size());
  return kExitDone;
}

}
