#include <filesystem>
#include <numbers>

#include "app/commands.h"
#include "data/tokenizer.h"

namespace pith {
namespace fs = std::filesystem;

vector<TensorDecl> declarations(const ParameterTable& table) {
  vector<TensorDecl> all;
  for (const Parameter& parameter : table)
    for (const Piece& piece : parameter.pieces)
      all.push_back({piece.name, FileDType::F32, shape_of(piece)});
  return all;
}

ModelFolder open_model(const string& folder) {
  ModelFolder m{.weights = open_weights(folder)};
  const string& text = m.weights.state.model;
  if (text.empty())
    bad_input(m.weights.folder, "has no config.json", "putting the model's config.json there");
  m.config = Json::parse(text, m.weights.folder + "/config.json");
  m.shape = make_instance(m.config).shape;
  m.table = whole_table(m.config);
  check_weights(m.weights, m.table);
  const fs::path here = fs::absolute(folder);
  for (const fs::path& at : {here, here.parent_path()})
    if (!m.run && fs::exists(at / "config.toml") && fs::exists(at / "metrics.jsonl"))
      m.run = load_run_config(at / "config.toml", {});
  return m;
}

string tokenizer_file(const string& path) {
  return fs::is_directory(path) ? path + "/tokenizer.json" : path;
}

// In the folder `path` or one above; empty if none.
static string find_tokenizer(const string& path) {
  for (fs::path at = fs::absolute(path);; at = at.parent_path()) {
    if (fs::exists(at / "tokenizer.json")) return at / "tokenizer.json";
    if (at == at.parent_path()) return "";
  }
}

Tokenizer open_tokenizer(const string& named, const vector<string>& places) {
  string path = tokenizer_file(named);
  for (const string& place : places)
    if (path.empty()) path = find_tokenizer(place);
  if (path.empty())
    bad_input(places[0], "has no tokenizer.json in its folder or above", "--tokenizer PATH");
  return Tokenizer::load(path);
}

double bits_a_byte(const Dataset& data, const string& data_path) {
  string path = find_tokenizer(data_path);
  if (path.empty()) return 0;
  const Tokenizer tokenizer = Tokenizer::load(path);
  i64 length = data.options().seq_length;
  vector<int> tokens(length), labels(length);
  vector<u32> ids;
  for (i64 i = 0; i < data.heldout_samples(); i++) {
    data.heldout_sample(i, {tokens.data(), labels.data(), nullptr});
    for (const int label : labels)
      if (label != kIgnoreLabel) ids.push_back(label);
  }
  string text = tokenizer.decode(ids, SpecialTokens::Skip);
  return text.empty() ? 0 : double(ids.size()) / double(text.size()) / std::numbers::ln2;
}

}
