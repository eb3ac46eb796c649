#include "app/model_folder.h"

#include <filesystem>

#include "app/held_out.h"

namespace pith {
namespace fs = std::filesystem;

Json model_config(const Checkpoint& weights) {
  if (weights.state.model.empty())
    bad_input(weights.folder, "has no config.json", "putting the model's config.json there");
  return Json::parse(weights.state.model, weights.folder + "/config.json");
}

std::optional<RunConfig> run_config_of(const string& folder) {
  const fs::path here = fs::absolute(folder);
  for (const fs::path& at : {here, here.parent_path()})
    if (fs::exists(at / "config.toml") && fs::exists(at / "metrics.jsonl"))
      return load_run_config(at / "config.toml", {});
  return {};
}

string tokenizer_of(const string& folder, const string& given) {
  string path = given.empty() ? folder : given;
  if (fs::is_directory(path)) path += "/tokenizer.json";
  if (fs::exists(path)) return path;
  if (given.empty())
    if (const std::optional<RunConfig> run = run_config_of(folder))
      if (path = find_tokenizer(run->data.path); !path.empty()) return path;
  bad_input(given.empty() ? folder : given, "has no tokenizer.json", "--tokenizer PATH");
}

}  // namespace pith
