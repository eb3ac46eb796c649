// pith doctor: what this machine offers.
#include <sched.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "app/commands.h"
#include "core/cuda.h"
#include "core/json.h"

extern "C" char* openblas_get_config();

namespace pith {

// What follows `key` in the first line that begins with it; empty if there is none.
static string value_of(const string& path, const string& key) {
  std::ifstream in(path);
  for (string line; std::getline(in, line);)
    if (line.starts_with(key))
      return line.substr(min(line.find_first_not_of(" \t:", key.size()), line.size()));
  return "";
}

vector<Finding> examine_machine(const string& root, const string& folder) {
  const bool fast = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const auto bytes_of = [&](const char* key) {
    return 1024 * atof(value_of(root + "/proc/meminfo", key).c_str());
  };
  cpu_set_t cores;
  sched_getaffinity(0, sizeof cores, &cores);
  std::error_code error;
  const auto space = std::filesystem::space(folder, error);
  const bool writable = access(folder.c_str(), W_OK) == 0;
  const string disk = writable ? bytes_text(double(space.available)) + " free"
                               : string("cannot be written (") + strerror(errno) + ")";
  const string driver = value_of(root + "/proc/driver/nvidia/version", "NVRM version");
  vector<Finding> all = {
      {true, "program", "compiled by " __VERSION__},
      {true, "blas", openblas_get_config()},
      {fast, "cpu",
       value_of(root + "/proc/cpuinfo", "model name") +
           (fast ? "; AVX2, FMA" : "; without AVX2 or FMA")},
      {true, "cores", text("%d usable", CPU_COUNT(&cores))},
      {bytes_of("MemAvailable") > 256 << 20, "memory",
       bytes_text(bytes_of("MemAvailable")) + " available of " + bytes_text(bytes_of("MemTotal"))},
      {writable, "disk", folder + ": " + disk},
      {true, "gpu driver", driver.empty() ? "none" : driver}};
  string why = "this program is built without CUDA";
  const vector<string> gpus = kCuda ? cuda_devices(why) : vector<string>();
  for (const string& gpu : gpus) all.push_back({true, "gpu", gpu});
  if (gpus.empty()) all.push_back({true, "gpu", "none to compute on: " + why});
  return all;
}

int run_doctor(int argc, char** argv) {
  string folder = ".";
  bool json = false, works = true;
  Arguments args("pith doctor");
  args.option("--folder", folder, "where runs will be kept");
  args.flag("--json", json, "print JSON");
  if (!args.parse(argc, argv)) return kExitDone;
  JsonWriter w;
  w.object().key("findings").array();
  for (const Finding& f : examine_machine("", folder)) {
    const char* verdict = f.good ? "PASS" : "FAIL";
    works = works && f.good;
    w.object().members("verdict", verdict, "name", f.name, "value", f.value).end();
    if (!json) printf("%s  %-10s %s\n", verdict, f.name.c_str(), f.value.c_str());
  }
  if (json) printf("%s\n", w.end().members("works", works).end().str().c_str());
  return works ? kExitDone : kExitFailed;
}

}
