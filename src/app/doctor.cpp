#include "app/doctor.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "app/arguments.h"
#include "app/commands.h"
#include "core/cuda.h"
#include "core/json.h"
#include "core/log.h"

extern "C" char* openblas_get_config();

namespace pith {

namespace fs = std::filesystem;

// What follows `key` in the first line that begins with it; empty if there is none.
static string value_of(const fs::path& path, const string& key) {
  std::ifstream in(path);
  for (string line; std::getline(in, line);)
    if (line.starts_with(key))
      return line.substr(min(line.find_first_not_of(" \t:", key.size()), line.size()));
  return "";
}

// Of this process's cgroup, or the root's in a container that sees the host's path.
static string cgroup_value(const string& root, const string& file, const string& key = "") {
  const string mount = root + "/sys/fs/cgroup/", own = value_of(root + "/proc/self/cgroup", "0::");
  const string value = value_of(mount + own + "/" + file, key);
  return value.empty() ? value_of(mount + file, key) : value;
}

static Finding examine_disk(const string& folder) {
  string path = folder + "/.pith-doctor-XXXXXX";
  const int fd = mkstemp(path.data());
  if (fd < 0) return {false, "disk", folder + ": cannot be written (" + strerror(errno) + ")"};
  close(fd);
  unlink(path.c_str());
  return {true, "disk", folder + ": " + bytes_text(double(fs::space(folder).available)) + " free"};
}

vector<Finding> examine_machine(const string& root, const string& folder) {
  const bool fast = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const string cpu = value_of(root + "/proc/cpuinfo", "model name");
  cpu_set_t set;
  sched_getaffinity(0, sizeof set, &set);
  string cores = text("%d usable", CPU_COUNT(&set));
  double quota = 0, period = 1;  // "max 100000" without a limit
  if (sscanf(cgroup_value(root, "cpu.max").c_str(), "%lf %lf", &quota, &period) == 2)
    cores += text(", limited to %.1f by the cgroup", quota / period);
  const auto bytes_of = [&](const char* key) {
    return 1024 * atof(value_of(root + "/proc/meminfo", key).c_str());
  };
  double usable = bytes_of("MemAvailable");
  string memory = " available of " + bytes_text(bytes_of("MemTotal"));
  if (const double limit = atof(cgroup_value(root, "memory.max").c_str())) {  // 0 for "max"
    const double used = atof(cgroup_value(root, "memory.current").c_str());
    const double cached = atof(cgroup_value(root, "memory.stat", "inactive_file").c_str());
    usable = min(usable, limit - used + cached);
    memory += ", limited to " + bytes_text(limit) + " by the cgroup";
  }
  string gpus, why;
  const vector<string> usable_gpus = kCuda ? cuda_devices(why) : vector<string>();
  for (const string& gpu : usable_gpus) gpus += gpu + "; ";
  std::error_code error;
  if (usable_gpus.empty())
    for (const auto& gpu : fs::directory_iterator(root + "/proc/driver/nvidia/gpus", error))
      gpus += value_of(gpu.path() / "information", "Model") + "; ";
  if (kCuda && usable_gpus.empty()) gpus += "CUDA: " + why + "; ";
  string driver = value_of(root + "/proc/driver/nvidia/version", "NVRM version");
  if (!driver.empty()) driver += "; ";
  return {{true, "program", "compiled by " __VERSION__},
          {true, "blas", openblas_get_config()},
          {fast, "cpu", cpu + (fast ? "; AVX2, FMA" : "; without AVX2 or FMA")},
          {true, "cores", cores},
          {usable > 256 << 20, "memory", bytes_text(usable) + memory},
          examine_disk(folder),
          {true, "gpu", gpus + driver + "this version trains on the CPU"}};
}

int run_doctor(int argc, char** argv) {
  string folder = ".";
  bool json = false, works = true;
  Arguments args("pith doctor",
                 "Says what this machine offers. Exit code 0 if training on the CPU will work, "
                 "else 1.");
  args.option("--folder", folder, "where runs will be kept");
  args.flag("--json", json, "print JSON");
  if (!args.parse(argc, argv)) return kExitDone;
  JsonWriter w(2);
  w.object().key("findings").array();
  for (const Finding& f : examine_machine("", folder)) {
    const char* verdict = f.good ? "PASS" : "FAIL";
    works = works && f.good;
    w.object().key("verdict").value(verdict).key("name").value(f.name);
    w.key("value").value(f.value).end();
    if (!json) printf("%s  %-10s %s\n", verdict, f.name.c_str(), f.value.c_str());
  }
  if (json) printf("%s\n", w.end().key("works").value(works).end().str().c_str());
  return works ? kExitDone : kExitFailed;
}

}
