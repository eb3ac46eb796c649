#include <sched.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "app/commands.h"
#include "core/cuda.h"
#include "core/json.h"

extern "C" char* openblas_get_config();

namespace pith {

static string value_of(const string& path, const string& key) {
  std::ifstream in(path);
  for (string line; std::getline(in, line);)
    if (line.starts_with(key))
      return line.substr(min(line.find_first_not_of(" \t:", key.size()), line.size()));
  return "";
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
  // FAIL: training will not work.
  auto say = [&](bool good, const char* name, const string& value) {
    const char* verdict = good ? "PASS" : "FAIL";
    works = works && good;
    w.object().members("verdict", verdict, "name", name, "value", value).end();
    if (!json) printf("%s  %-10s %s\n", verdict, name, value.c_str());
  };
  say(true, "blas", openblas_get_config());
  bool fast = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  say(fast, "cpu",
      value_of("/proc/cpuinfo", "model name") + (fast ? "; AVX2, FMA" : "; without AVX2 or FMA"));
  cpu_set_t cores;
  sched_getaffinity(0, sizeof cores, &cores);
  say(true, "cores", text("%d usable", CPU_COUNT(&cores)));
  double memory = 1024 * atof(value_of("/proc/meminfo", "MemAvailable").c_str());
  say(memory > 256 << 20, "memory", bytes_text(memory) + " available");
  std::error_code error;
  auto space = std::filesystem::space(folder, error);
  bool writable = access(folder.c_str(), W_OK) == 0;
  say(writable, "disk",
      folder + ": " +
          (writable ? bytes_text(double(space.available)) + " free"
                    : string("cannot be written (") + strerror(errno) + ")"));
  string why = "this program is built without CUDA";
  vector<string> gpus = kCuda ? cuda_devices(why) : vector<string>();
  for (const string& gpu : gpus) say(true, "gpu", gpu);
  if (gpus.empty()) say(true, "gpu", "none to compute on: " + why);
  if (json) printf("%s\n", w.end().members("works", works).end().str().c_str());
  return works ? kExitDone : kExitFailed;
}

}
