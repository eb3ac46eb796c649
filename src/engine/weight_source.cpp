// Weights alone: of Hugging Face folders, checkpoints and run folders.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "core/json.h"
#include "engine/checkpoint_parts.h"

namespace pith {

static bool exists(const string& path) { return access(path.c_str(), F_OK) == 0; }

WeightSource open_weights(const string& folder) {
  WeightSource source;
  source.folder = folder;
  if (exists(folder + "/manifest.json")) {
    source.checkpoint = open_checkpoint(folder);
    verify(*source.checkpoint, true);
  } else if (!list_checkpoints(folder).empty()) {
    source.checkpoint = find_checkpoint(folder);
  } else {
    source.hugging_face.emplace(folder);
    if (exists(folder + "/config.json")) source.config = read_text_file(folder + "/config.json");
  }
  if (source.checkpoint) {
    source.folder = source.checkpoint->folder;
    source.config = source.checkpoint->state.model;
  }
  return source;
}

// A weight of either kind of source.
struct FoundWeight {
  vector<int64_t> shape;
  FileDType dtype = FileDType::F32;
};
static std::map<string, FoundWeight> weights_of(const WeightSource& source) {
  std::map<string, FoundWeight> found;
  if (source.checkpoint) {
    for (const StoredTensor& t : source.checkpoint->tensors)
      if (!is_moment(t.name)) found[t.name] = {t.shape, t.dtype};
  } else {
    for (const TensorEntry& t : source.hugging_face->tensors()) found[t.name] = {t.shape, t.dtype};
  }
  return found;
}

static string describe(const FoundWeight& weight) {
  TensorEntry entry;
  entry.shape = weight.shape;
  entry.dtype = weight.dtype;
  return describe(entry);
}

// "3 missing: a, b, c"; at most ten are named.
static void add_list(string& out, const char* what, const vector<string>& names) {
  if (names.empty()) return;
  out += text("%s%zu %s: ", out.empty() ? "" : "; ", names.size(), what);
  for (size_t i = 0; i < std::min<size_t>(names.size(), 10); i++) out += (i ? ", " : "") + names[i];
  if (names.size() > 10) out += ", ...";
}

static void refuse_nonfinite(const WeightSource& source, const vector<const Piece*>& pieces) {
  vector<int64_t> bad(pieces.size());
  on_threads(int64_t(pieces.size()), [&](int64_t i) {
    const Piece& piece = *pieces[size_t(i)];
    vector<float> values(1 << 18);
    const int64_t n = piece.dims.numel(), most = int64_t(values.size());
    for (int64_t at = 0; at < n; at += most) {
      const int64_t count = std::min(most, n - at);
      read_weight(source, piece.name, at, count, values.data());
      for (int64_t k = 0; k < count; k++) bad[size_t(i)] += !std::isfinite(values[size_t(k)]);
    }
  });
  vector<string> names;
  for (size_t i = 0; i < pieces.size(); i++)
    if (bad[i])
      names.push_back(
          text("%s (%ld of %ld values)", pieces[i]->name.c_str(), bad[i], pieces[i]->dims.numel()));
  string what;
  add_list(what, "tensors with NaN or Inf", names);
  if (!what.empty()) bad_input(source.folder, what, "weights of a run that did not diverge");
}

void check_weights(const WeightSource& source, const ParameterTable& whole) {
  std::map<string, FoundWeight> found = weights_of(source);
  vector<string> missing, extra, misshapen;
  vector<const Piece*> pieces;
  for (const Parameter& parameter : whole)
    for (const Piece& piece : parameter.pieces) {
      const auto at = found.find(piece.name);
      pieces.push_back(&piece);
      if (at == found.end()) {
        missing.push_back(piece.name);
        continue;
      }
      const FoundWeight need{{piece.dims.size, piece.dims.size + piece.dims.rank},
                             is_float(at->second.dtype) ? at->second.dtype : FileDType::F32};
      if (at->second.shape != need.shape || at->second.dtype != need.dtype)
        misshapen.push_back(text("%s (got %s, need %s)", piece.name.c_str(),
                                 describe(at->second).c_str(), describe(need).c_str()));
      found.erase(at);
    }
  for (const auto& [name, weight] : found) extra.push_back(name + " " + describe(weight));
  string what;
  add_list(what, "missing", missing);
  add_list(what, "not of this model", extra);
  add_list(what, "of another shape or type", misshapen);
  if (!what.empty())
    bad_input(source.folder, "the tensors are not those of the model: " + what,
              "the config.json that belongs to these weights");
  refuse_nonfinite(source, pieces);
}

void read_weight(const WeightSource& source, const string& name, int64_t begin, int64_t count,
                 float* out) {
  if (source.checkpoint) {
    const StoredTensor* tensor = source.checkpoint->find(name);
    if (!tensor) bad_input(source.folder + ": " + name, "is missing", "check the folder");
    return read_elements(*source.checkpoint, *tensor, begin, count, out);
  }
  const TensorEntry& tensor = source.hugging_face->at(name);
  to_f32(tensor.dtype, tensor.data + begin * size_of(tensor.dtype), out, count);
}

void load_weights(Rank&, Parameters& p, const WeightSource& source) {
  for (const Fragment& f : fragments(p))
    read_weight(source, f.piece->name, f.begin, f.count,
                p.units[size_t(f.unit)].master.f32() + f.offset);
}

}  // namespace pith
