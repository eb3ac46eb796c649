#include "app/model_folder.h"

#include <filesystem>
#include <numbers>

#include "data/tokenizer.h"

namespace pith {
namespace fs = std::filesystem;

Json model_config(const WeightSource& weights) {
  if (weights.config.empty())
    bad_input(weights.folder, "has no config.json", "putting the model's config.json there");
  return Json::parse(weights.config, weights.folder + "/config.json");
}

ModelFolder open_model(const string& folder) {
  ModelFolder m{.weights = open_weights(folder)};
  m.config = model_config(m.weights);
  m.shape = model_shape(m.config);
  check_weights(m.weights, whole_table(m.config));
  const fs::path here = fs::absolute(folder);
  for (const fs::path& at : {here, here.parent_path()})
    if (!m.run && fs::exists(at / "config.toml") && fs::exists(at / "metrics.jsonl"))
      m.run = load_run_config(at / "config.toml", {});
  m.length = m.run ? m.run->data.sequence_length : std::min<int64_t>(m.shape.max_positions, 2048);
  return m;
}

string find_tokenizer(const string& path) {
  for (fs::path at = fs::absolute(path);; at = at.parent_path()) {
    if (fs::exists(at / "tokenizer.json")) return at / "tokenizer.json";
    if (at == at.parent_path()) return "";
  }
}

double bytes_per_label(const Dataset& data, const string& data_path) {
  const string path = find_tokenizer(data_path);
  if (path.empty()) return 0;
  const Tokenizer tokenizer = Tokenizer::load(path);
  vector<int32_t> bytes(data.options().vocab_size, 0);  // of each token
  for (uint32_t id = 0; id < std::min<size_t>(tokenizer.vocab_size(), bytes.size()); id++) {
    if (tokenizer.is_special(id)) continue;
    // A byte-level vocabulary writes a byte as one character.
    for (const char c : tokenizer.token_text(id)) bytes[id] += (c & 0xC0) != 0x80;
  }
  const int64_t length = data.options().seq_length;
  vector<int32_t> tokens(length), labels(length);
  double all = 0, count = 0;
  for (int64_t i = 0; i < data.heldout_samples(); i++) {
    data.heldout_sample(i, {tokens.data(), labels.data(), nullptr});
    for (const int32_t label : labels) {
      if (label == kIgnoreLabel) continue;
      count++;
      all += bytes[label];
    }
  }
  return count > 0 ? all / count : 0;
}

double bits_per_byte(double nats, double bytes_per_label) {
  return bytes_per_label > 0 ? nats / std::numbers::ln2 / bytes_per_label : 0;
}

}  // namespace pith
