// pith convert: export-hf and import-hf, between checkpoints and Hugging Face folders.
#include <algorithm>
#include <cstdio>
#include <filesystem>

#include "app/arguments.h"
#include "app/commands.h"
#include "app/model_folder.h"
#include "core/log.h"
#include "core/process.h"

namespace pith {
namespace fs = std::filesystem;

namespace {

constexpr int64_t kPiece = 1 << 20;  // elements or bytes in memory at once

// What goes along with weights, where it is there.
const char* const kCompanions[] = {"tokenizer.json",
                                   "tokenizer_config.json",
                                   "special_tokens_map.json",
                                   "added_tokens.json",
                                   "vocab.json",
                                   "merges.txt",
                                   "tokenizer.model",
                                   "chat_template.jinja",
                                   "generation_config.json"};

struct ConvertArguments {
  string action, from, to, tokenizer, dtype = "bf16";
  int64_t max_shard_bytes = 5'000'000'000;
  bool json = false;
};

// The result grows under OUT.tmp, so that OUT is whole or absent.
struct OutputFolder {
  explicit OutputFolder(const string& to) : path(to), temporary(to + ".tmp") {
    if (fs::exists(path) && !(fs::is_directory(path) && fs::is_empty(path)))
      bad_input(path, "is there already and is not an empty folder", "a new folder");
    if (fs::exists(temporary))
      bad_input(temporary, "was left by a conversion that was killed", "remove it");
    make_folders(temporary);
  }
  OutputFolder(const OutputFolder&) = delete;
  OutputFolder& operator=(const OutputFolder&) = delete;
  ~OutputFolder() {  // nothing is left of it once it is in place
    std::error_code error;
    fs::remove_all(temporary, error);
  }
  string path, temporary;
};

// Between pieces of work.
void go_on(Progress& progress, int64_t done) {
  if (stop_requested()) failed("pith convert", "stopped by a signal; nothing was written");
  progress.update(double(done));
}

// Tokenizer and generation files: of the folder that was named, or else beside the weights.
void copy_companions(const ConvertArguments& a, const Checkpoint& source, const string& to) {
  string from = a.tokenizer.empty() ? source.folder : a.tokenizer;
  if (fs::is_regular_file(from)) from = folder_of(from);
  int copied = 0;
  for (const char* name : kCompanions) {
    const string path = from + "/" + name;
    if (!fs::exists(path)) continue;
    write_file_durably(to + "/" + name, read_text_file(path));
    copied++;
  }
  if (copied == 0 && !a.tokenizer.empty())
    bad_input(a.tokenizer, "has no tokenizer files", "a folder with tokenizer.json");
  if (copied == 0) log_info("no tokenizer files were copied; --tokenizer DIR names their folder");
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

void export_hf(const ConvertArguments& a, const Checkpoint& source, const ParameterTable& table,
               const string& to) {
  const FileDType dtype = a.dtype == "fp32" ? FileDType::F32 : FileDType::BF16;
  vector<TensorDecl> decls;
  for (const Parameter& parameter : table)
    for (const Piece& piece : parameter.pieces)
      decls.push_back({piece.name, dtype, shape_of(piece)});
  ShardedWriter writer(to, decls, a.max_shard_bytes);
  Progress progress("exporting", double(total_numel(table)), "values");
  vector<float> values(kPiece);
  vector<char> bytes(kPiece * size_t(size_of(dtype)));
  int64_t done = 0;
  for (const TensorDecl& decl : decls) {
    const StoredTensor& tensor = source.tensors.at(decl.name);
    for (int64_t at = 0, n = tensor.numel(); at < n; at += kPiece) {
      const int64_t count = std::min(kPiece, n - at);
      go_on(progress, done += count);
      read_elements(source, tensor, at, count, values.data());
      from_f32(dtype, values.data(), bytes.data(), count);
      writer.write(bytes.data(), count * size_of(dtype));
    }
  }
  writer.finish();
  write_file_durably(to + "/config.json", config_with_dtype(model_config(source), dtype));
}

// The files as they are, with a manifest: a checkpoint of weights alone.
void import_hf(const Checkpoint& source, const string& to) {
  Checkpoint c{.folder = to, .state = source.state, .tensors = source.tensors};
  int64_t total = 0, done = 0;
  for (const StoredFile& file : source.files) total += file.bytes;
  Progress progress("importing", double(total), "bytes");
  for (const StoredFile& file : source.files) {
    const string name = text("weights-%05zu.safetensors", c.files.size());
    DurableFile copy(to + "/" + name);
    for (int64_t at = 0; at < file.bytes; at += kPiece) {
      const int64_t count = std::min(kPiece, file.bytes - at);
      go_on(progress, done += count);
      copy.write(file.map.data() + at, count);
    }
    copy.finish();
    c.files.push_back(stored_file(to, name));
  }
  for (auto& [name, tensor] : c.tensors) {
    StoredFragment& f = tensor.fragments[0];
    f.checksum = checksum_of(source.files[size_t(f.file)].map.data() + f.offset,
                             f.count * size_of(tensor.dtype));
  }
  write_manifest(c, to + "/manifest.json");
}

}  // namespace

int run_convert(int argc, char** argv) {
  Arguments args("pith convert",
                 "Exports a checkpoint as a Hugging Face folder, or imports such a folder as a "
                 "checkpoint.");
  ConvertArguments a;
  args.choice("action", a.action, {"export-hf", "import-hf"}, "the direction");
  args.positional("from", a.from,
                  "export: a checkpoint, or a run folder for its newest; import: a folder with "
                  "config.json and safetensors");
  args.positional("to", a.to, "folder to make");
  args.choice("--dtype", a.dtype, {"bf16", "fp32"}, "of exported weights");
  args.option("--max-shard-bytes", a.max_shard_bytes, "data in an exported file of weights", 1);
  args.option("--tokenizer", a.tokenizer,
              "folder of tokenizer and generation files to copy; default: that of the weights");
  args.flag("--json", a.json, "print the result as JSON");
  if (!args.parse(argc, argv)) return kExitDone;
  while (a.to.size() > 1 && a.to.back() == '/') a.to.pop_back();
  const Checkpoint source = open_weights(a.from);
  const bool exporting = a.action == "export-hf";
  if (exporting != fs::exists(source.folder + "/manifest.json"))
    bad_input(a.from, exporting ? "is no checkpoint or run folder" : "is no Hugging Face folder",
              exporting ? "import-hf" : "export-hf");
  const ParameterTable table = whole_table(model_config(source));
  check_weights(source, table);
  const OutputFolder out(a.to);
  exporting ? export_hf(a, source, table, out.temporary) : import_hf(source, out.temporary);
  copy_companions(a, source, out.temporary);
  put_in_place(out.temporary, out.path);
  int64_t tensors = 0;
  for (const Parameter& parameter : table) tensors += int64_t(parameter.pieces.size());
  if (a.json) {
    JsonWriter w;
    w.object().key("output").value(a.to).key("tensors").value(tensors);
    printf("%s\n", w.key("parameters").value(total_numel(table)).end().str().c_str());
  } else {
    log_info("%s: %s parameters in %ld tensors", a.to.c_str(),
             with_commas(total_numel(table)).c_str(), tensors);
  }
  return kExitDone;
}

}  // namespace pith
