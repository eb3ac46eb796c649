// pith convert: export-hf and import-hf, between checkpoints and Hugging Face folders.
#include <algorithm>
#include <filesystem>

#include "app/arguments.h"
#include "app/commands.h"
#include "app/model_folder.h"
#include "core/log.h"
#include "core/process.h"

namespace pith {
namespace fs = std::filesystem;

namespace {

constexpr i64 kMaxShardBytes = 5'000'000'000;

// What goes along with weights, where it is there.
const char* const kCompanions[] = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
    "merges.txt",     "chat_template.jinja",   "generation_config.json"};

// Between pieces of work.
void go_on(Progress& progress, i64 done) {
  if (stop_requested()) failed("pith convert", "stopped by a signal; nothing was written");
  progress.update(double(done));
}

// Tokenizer and generation files, from the folder that was named, or else beside the weights.
void copy_companions(const string& named, const string& beside, const string& to) {
  const string given = fs::is_regular_file(named) ? folder_of(named) : named;
  int copied = 0;
  for (const char* name : kCompanions) {
    const string path = (named.empty() ? beside : given) + "/" + name;
    if (!fs::exists(path)) continue;
    write_file_durably(to + "/" + name, read_text_file(path));
    copied++;
  }
  if (copied == 0 && !named.empty())
    bad_input(named, "has no tokenizer files", "a folder with tokenizer.json");
  if (copied == 0) log_info("no tokenizer files: --tokenizer DIR names their folder");
  // Else transformers takes the model type's own class, with that one's pre-tokenizer.
  const string config = to + "/tokenizer_config.json";
  if (fs::exists(to + "/tokenizer.json") && !fs::exists(config))
    write_file_durably(config, "{\"tokenizer_class\": \"PreTrainedTokenizerFast\"}\n");
}

// config.json with the dtype of the weights beside it, which loaders take as their own.
string config_with_dtype(const Json& config, FileDType dtype) {
  const string key = config.has("dtype") ? "dtype" : "torch_dtype";
  JsonWriter w(2);
  w.object();
  for (const string& k : config.keys())
    if (k != key) w.key(k).raw(config[k].dump());
  w.key(key).value(dtype == FileDType::BF16 ? "bfloat16" : "float32");
  return w.end().str() + "\n";
}

void export_hf(const Checkpoint& source, const vector<TensorDecl>& decls, const string& to) {
  const FileDType dtype = decls[0].dtype;
  SafetensorsWriter writer(to + "/model.safetensors", decls, kMaxShardBytes);
  Progress progress("exporting", double(decls.size()), "tensors");
  i64 done = 0;
  for (const TensorDecl& decl : decls) {
    const vector<float> values = read_tensor(source, source.tensors.at(decl.name));
    vector<char> bytes(size_t(decl.bytes()));
    from_f32(dtype, values.data(), bytes.data(), i64(values.size()));
    writer.write(bytes.data(), decl.bytes());
    go_on(progress, ++done);
  }
  writer.finish();
  write_file_durably(to + "/config.json", config_with_dtype(model_config(source), dtype));
}

// The files as they are, with a manifest: a checkpoint of weights alone.
void import_hf(const Checkpoint& source, const string& to) {
  Checkpoint c{.folder = to, .state = source.state, .tensors = source.tensors};
  i64 total = 0, done = 0;
  for (const StoredFile& file : source.files) total += file.bytes;
  Progress progress("importing", double(total), "bytes");
  for (const StoredFile& file : source.files) {
    const string name = text("weights-%05zu.safetensors", c.files.size());
    DurableFile copy(to + "/" + name);
    constexpr i64 kPiece = 64 << 20;
    for (i64 at = 0; at < file.bytes; at += kPiece) {
      const i64 count = min(kPiece, file.bytes - at);
      go_on(progress, done += count);
      copy.write(file.map.data() + at, count);
    }
    copy.finish();
    c.files.push_back(stored_file(to, name));
  }
  write_manifest(c, to + "/manifest.json");
}

}

int run_convert(int argc, char** argv) {
  Arguments args("pith convert", "Exports a checkpoint as a Hugging Face folder, or imports one.");
  string action, from, to, tokenizer, dtype = "bf16";
  bool json = false;
  args.choice("action", action, {"export-hf", "import-hf"}, "the direction");
  args.positional("from", from,
                  "a checkpoint, or a run folder for its newest; import-hf: a Hugging Face folder");
  args.positional("to", to, "folder to make");
  args.choice("--dtype", dtype, {"bf16", "fp32"}, "of exported weights");
  args.option("--tokenizer", tokenizer,
              "folder of tokenizer files to copy; default: that of the weights");
  args.flag("--json", json, "print the result as JSON");
  if (!args.parse(argc, argv)) return kExitDone;
  while (to.size() > 1 && to.back() == '/') to.pop_back();
  const Checkpoint source = open_weights(from);
  const bool exporting = action == "export-hf";
  if (exporting != fs::exists(source.folder + "/manifest.json"))
    bad_input(from, exporting ? "is no checkpoint or run folder" : "is no Hugging Face folder",
              exporting ? "import-hf" : "export-hf");
  const ParameterTable table = whole_table(model_config(source));
  check_weights(source, table);
  vector<TensorDecl> decls;
  for (const Parameter& parameter : table)
    for (const Piece& piece : parameter.pieces)
      decls.push_back(
          {piece.name, dtype == "fp32" ? FileDType::F32 : FileDType::BF16, shape_of(piece)});
  // The result grows under another name, so that TO is whole or absent.
  const string temporary = to + ".tmp";
  if (fs::exists(to) && !fs::is_empty(to))
    bad_input(to, "is there already and is not an empty folder", "a new folder");
  if (fs::exists(temporary))
    bad_input(temporary, "was left by a conversion that was killed", "remove it");
  make_folders(temporary);
  try {
    if (exporting)
      export_hf(source, decls, temporary);
    else
      import_hf(source, temporary);
    copy_companions(tokenizer, source.folder, temporary);
    put_in_place(temporary, to);
  } catch (...) {
    fs::remove_all(temporary);
    throw;
  }
  const i64 elements = total_numel(table);
  log_info("%s: %ld parameters in %zu tensors", to.c_str(), elements, decls.size());
  JsonWriter w;
  w.object().key("output").value(to).key("tensors").value(decls.size());
  w.key("parameters").value(elements).end();
  if (json) printf("%s\n", w.str().c_str());
  return kExitDone;
}

}
