// convert: pith convert export-hf and import-hf: between checkpoints and Hugging Face folders, a
// piece of a tensor at a time.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>

#include "app/arguments.h"
#include "app/commands.h"
#include "app/model_folder.h"
#include "core/log.h"
#include "core/process.h"
#include "engine/checkpoint_parts.h"
#include "engine/instance.h"

namespace pith {
namespace fs = std::filesystem;

namespace {

constexpr int64_t kPiece = 1 << 20;  // elements in memory at once

// What goes along with weights, where it is there.
const char* const kCompanions[] = {"tokenizer.json",
                                   "tokenizer_config.json",
                                   "special_tokens_map.json",
                                   "added_tokens.json",
                                   "vocab.json",
                                   "merges.txt",
                                   "tokenizer.model",
                                   "chat_template.jinja",
                                   "chat_template.json",
                                   "generation_config.json"};

struct ConvertArguments {
  string action, from, to, tokenizer, dtype = "bf16", max_shard_size = "5GB";
  bool json = false;
};

// "5GB", "500MB": decimal, as Hugging Face counts.
int64_t shard_bytes(const string& size) {
  size_t used = 0;
  double value = 0;
  try {
    value = std::stod(size, &used);
  } catch (const std::exception&) {
  }
  const string unit = size.substr(used);
  const double scale = unit == "GB" ? 1e9 : unit == "MB" ? 1e6 : unit == "KB" ? 1e3 : 0;
  if (!(value * scale >= 1))
    bad_input("--max-shard-size", "is no size (got \"" + size + "\", need one such as 5GB)", "5GB");
  return int64_t(value * scale);
}

// The result grows under OUT.tmp and is renamed at the end, so that OUT is whole or absent.
class OutputFolder {
 public:
  explicit OutputFolder(const string& path) : path_(path), temporary_(path + ".tmp") {
    std::error_code error;
    if (fs::exists(path_) && !(fs::is_directory(path_) && fs::is_empty(path_, error)))
      bad_input(path_, "is there already and is not an empty folder", "a new folder");
    if (fs::exists(temporary_))
      bad_input(temporary_, "was left by a conversion that was killed", "remove it");
    make_folders(temporary_);
  }
  OutputFolder(const OutputFolder&) = delete;
  OutputFolder& operator=(const OutputFolder&) = delete;
  ~OutputFolder() {
    if (!done_) remove_folder(temporary_);
  }
  const string& folder() const { return temporary_; }
  void put_in_place() {
    sync_folder(temporary_);
    if (rename(temporary_.c_str(), path_.c_str()) != 0)
      failed(path_, "cannot be put in place", "check the permissions of the folder");
    done_ = true;
    sync_folder(folder_of(path_));
  }
  void done() { done_ = true; }

 private:
  string path_, temporary_;
  bool done_ = false;
};

// Copies tokenizer and generation files. Returns how many.
int copy_companions(const string& from, const string& to) {
  int copied = 0;
  for (const char* name : kCompanions) {
    const string path = from + "/" + name;
    if (access(path.c_str(), F_OK) != 0) continue;
    write_file_durably(to + "/" + name, read_text_file(path));
    copied++;
  }
  return copied;
}

// From the folder that was named, or else the one of the weights.
int copy_companions(const ConvertArguments& a, const WeightSource& source, const string& to) {
  string from = a.tokenizer.empty() ? source.folder : a.tokenizer;
  if (fs::is_regular_file(from)) from = folder_of(from);
  const int copied = copy_companions(from, to);
  if (copied == 0 && !a.tokenizer.empty())
    bad_input(a.tokenizer, "has no tokenizer files", "a folder with tokenizer.json");
  return copied;
}

// config.json with the dtype of the weights beside it, which loaders take as their own.
string config_with_dtype(const WeightSource& source, FileDType dtype) {
  const Json config = model_config(source);
  const string name = dtype == FileDType::BF16 ? "bfloat16" : "float32";
  const string key = config.has("dtype") ? "dtype" : "torch_dtype";
  if (config.string_or(key, "") == name) return source.config;
  JsonWriter w(2);
  w.object();
  for (const string& k : config.keys())
    if (k != key) w.key(k).raw(config[k].dump());
  return w.key(key).value(name).end().str() + "\n";
}

struct Converted {
  int64_t tensors = 0, elements = 0;
  int files = 0, companions = 0;
};

vector<const Piece*> pieces_of(const ParameterTable& table) {
  vector<const Piece*> list;
  for (const Parameter& parameter : table)
    for (const Piece& piece : parameter.pieces) list.push_back(&piece);
  return list;
}

vector<int64_t> shape_of(const Piece& piece) {
  return {piece.dims.size, piece.dims.size + piece.dims.rank};
}

// Calls write(bytes, size) with all of a weight in `dtype`, in pieces.
template <class Write>
void stream_weight(const WeightSource& source, const Piece& piece, FileDType dtype, Write&& write) {
  vector<float> values(size_t(std::min(kPiece, piece.dims.numel())));
  vector<char> bytes(values.size() * size_t(size_of(dtype)));
  for (int64_t at = 0; at < piece.dims.numel(); at += kPiece) {
    if (stop_requested()) failed("pith convert", "stopped by a signal; nothing was written");
    const int64_t count = std::min(kPiece, piece.dims.numel() - at);
    read_weight(source, piece.name, at, count, values.data());
    from_f32(dtype, values.data(), bytes.data(), count);
    write(bytes.data(), count * size_of(dtype));
  }
}

Converted export_hf(const ConvertArguments& a, const WeightSource& source,
                    const ParameterTable& table) {
  const FileDType dtype = a.dtype == "fp32" ? FileDType::F32 : FileDType::BF16;
  const vector<const Piece*> pieces = pieces_of(table);
  vector<TensorDecl> tensors;
  Converted done{.tensors = int64_t(pieces.size()), .elements = total_numel(table)};
  for (const Piece* piece : pieces) tensors.push_back({piece->name, dtype, shape_of(*piece)});
  OutputFolder out(a.to);
  SafetensorsWriter writer(out.folder() + "/model.safetensors", tensors,
                           shard_bytes(a.max_shard_size));
  Progress progress("exporting", double(done.elements), "values");
  int64_t elements = 0;
  for (const Piece* piece : pieces) {
    stream_weight(source, *piece, dtype,
                  [&](const char* bytes, int64_t size) { writer.write(bytes, size); });
    progress.update(double(elements += piece->dims.numel()));
  }
  writer.finish();
  done.files = writer.num_files();
  write_file_durably(out.folder() + "/config.json", config_with_dtype(source, dtype));
  done.companions = copy_companions(a, source, out.folder());
  out.put_in_place();
  return done;
}

// A checkpoint of weights alone. F32 and BF16 stay as they are, others become F32.
Converted import_hf(const ConvertArguments& a, const WeightSource& source,
                    const ParameterTable& table) {
  const vector<const Piece*> pieces = pieces_of(table);
  const int64_t most = shard_bytes(a.max_shard_size);
  Converted done{.tensors = int64_t(pieces.size()), .elements = total_numel(table)};
  OutputFolder out(a.to);
  Checkpoint all;
  all.state.optimizer = "none";
  all.state.model = source.config;
  Progress progress("importing", double(done.elements), "values");
  int64_t elements = 0;
  for (size_t begin = 0, end = 0; begin < pieces.size(); begin = end) {
    vector<FragmentPlan> plan;
    int64_t bytes = 0;
    for (; end < pieces.size(); end++) {
      const Piece& piece = *pieces[end];
      const FileDType dtype = source.hugging_face->at(piece.name).dtype;
      plan.push_back({piece.name, shape_of(piece),
                      dtype == FileDType::BF16 ? dtype : FileDType::F32, 0, piece.dims.numel()});
      bytes += piece.dims.numel() * size_of(plan.back().dtype);
      if (bytes > most && end > begin) {
        plan.pop_back();
        break;
      }
    }
    FragmentWriter writer(out.folder(), text("weights-%05d.safetensors", done.files++), plan);
    for (size_t i = begin; i < end; i++) {
      stream_weight(source, *pieces[i], plan[i - begin].dtype,
                    [&](const char* data, int64_t size) { writer.write(data, size); });
      progress.update(double(elements += pieces[i]->dims.numel()));
    }
    add_fragments(all, writer.finish());
  }
  done.companions = copy_companions(a, source, out.folder());
  seal(all, out.folder(), a.to);
  out.done();
  return done;
}

void report(const ConvertArguments& a, const Converted& done) {
  if (a.json) {
    JsonWriter w;
    w.object().key("output").value(a.to).key("tensors").value(done.tensors);
    w.key("parameters").value(done.elements).key("files").value(done.files);
    w.key("tokenizer_files").value(done.companions).end();
    printf("%s\n", w.str().c_str());
    return;
  }
  log_info("%s: %s parameters in %s tensors and %d files", a.to.c_str(),
           with_commas(done.elements).c_str(), with_commas(done.tensors).c_str(), done.files);
  if (done.companions == 0)
    log_info("no tokenizer files were copied; --tokenizer DIR names their folder");
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
  args.option("--max-shard-size", a.max_shard_size, "largest file of weights: 5GB, 500MB");
  args.option("--tokenizer", a.tokenizer,
              "folder of tokenizer and generation files to copy; default: that of the weights");
  args.flag("--json", a.json, "print the result as JSON");
  if (!args.parse(argc, argv)) return kExitDone;
  while (a.to.size() > 1 && a.to.back() == '/') a.to.pop_back();
  const WeightSource source = open_weights(a.from);
  const bool exporting = a.action == "export-hf";
  if (exporting != source.checkpoint.has_value())
    bad_input(a.from, exporting ? "is no checkpoint or run folder" : "is no Hugging Face folder",
              exporting ? "import-hf" : "export-hf");
  const ParameterTable table = whole_table(model_config(source));
  check_weights(source, table);
  report(a, exporting ? export_hf(a, source, table) : import_hf(a, source, table));
  return kExitDone;
}

}  // namespace pith
