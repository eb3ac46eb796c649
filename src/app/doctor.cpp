#include "app/doctor.h"

#include <sched.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "app/arguments.h"
#include "app/commands.h"
#include "core/json.h"
#include "core/log.h"

extern "C" char* openblas_get_config();

namespace pith {

namespace fs = std::filesystem;

static constexpr double kLeastBytes = 256 << 20;  // of memory, of disk

// A file of /proc or /sys; empty if there is none.
static string slurp(const string& path) {
  std::stringstream all;
  all << std::ifstream(path).rdbuf();
  return all.str();
}

// The rest of the line that begins with `key` and a colon or blanks; empty if there is none.
static string value_of(const string& lines, const string& key) {
  std::istringstream in(lines);
  for (string line; std::getline(in, line);)
    if (line.starts_with(key))
      if (const size_t at = line.find_first_not_of(" \t:", key.size()); at < line.size())
        return line.substr(at);
  return "";
}

// A file of this process's cgroup (version 2). In a container the path named may be the host's:
// then the root of the mount is ours.
static string cgroup_file(const string& root, const string& file) {
  const string mount = root + "/sys/fs/cgroup";
  const string own = slurp(mount + value_of(slurp(root + "/proc/self/cgroup"), "0::") + "/" + file);
  return own.empty() ? slurp(mount + "/" + file) : own;
}

static Finding examine_cores(const string& root) {
  cpu_set_t set;
  const int cores = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  string value = text("%d usable", cores);
  double quota = 0, period = 1;  // "max 100000" without a limit
  if (sscanf(cgroup_file(root, "cpu.max").c_str(), "%lf %lf", &quota, &period) == 2)
    value += text(", limited to %.1f by the cgroup (set OMP_NUM_THREADS)", quota / period);
  return {true, "cores", value};
}

static Finding examine_memory(const string& root) {
  const string info = slurp(root + "/proc/meminfo");
  const double total = 1024 * atof(value_of(info, "MemTotal").c_str());
  double usable = 1024 * atof(value_of(info, "MemAvailable").c_str());
  string limited;
  const double limit = atof(cgroup_file(root, "memory.max").c_str());  // 0 for "max"
  if (limit > 0) {
    const double cached = atof(value_of(cgroup_file(root, "memory.stat"), "inactive_file").c_str());
    const double used = atof(cgroup_file(root, "memory.current").c_str());
    usable = std::min(usable, limit - used + cached);
    limited = ", limited to " + bytes_text(limit) + " by the cgroup";
  }
  return {usable >= kLeastBytes, "memory",
          bytes_text(usable) + " available of " + bytes_text(total) + limited,
          "a machine with more memory"};
}

static Finding examine_disk(const string& folder) {
  string path = folder + "/.pith-doctor-XXXXXX";
  const int fd = mkstemp(path.data());
  if (fd < 0)
    return {false, "disk", folder + ": cannot be written (" + strerror(errno) + ")",
            "--folder with the folder of your runs"};
  unlink(path.c_str());
  struct statvfs info = {};
  fstatvfs(fd, &info);
  close(fd);
  const double free = double(info.f_bavail) * double(info.f_frsize);
  return {free >= kLeastBytes, "disk", folder + ": " + bytes_text(free) + " free", "free space"};
}

static string gpus(const string& root) {
  string models;
  std::error_code error;
  for (const auto& gpu : fs::directory_iterator(root + "/proc/driver/nvidia/gpus", error))
    models += value_of(slurp(gpu.path() / "information"), "Model") + "; ";
  return models.empty() ? "none" : models + "this version trains on the CPU";
}

vector<Finding> examine_machine(const string& root, const string& folder) {
  const string model = value_of(slurp(root + "/proc/cpuinfo"), "model name");
  const string driver = value_of(slurp(root + "/proc/driver/nvidia/version"), "NVRM version");
  const bool fast = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return {{true, "program", "compiled by " __VERSION__},
          {true, "blas", openblas_get_config()},
          {fast, "cpu", model + (fast ? "; AVX2, FMA" : "; without AVX2 or FMA"),
           "an x86-64-v3 CPU (Haswell on)"},
          examine_cores(root),
          examine_memory(root),
          examine_disk(folder),
          {true, "gpu driver", driver.empty() ? "none" : driver},
          {true, "gpu", gpus(root)}};
}

int run_doctor(int argc, char** argv) {
  string folder = ".";
  bool json = false, works = true;
  Arguments args("pith doctor",
                 "Says what this machine offers. Exit code 0 if training on the CPU "
                 "will work, else 1.");
  args.option("--folder", folder, "where runs will be kept: tried, and its space shown");
  args.flag("--json", json, "print JSON");
  if (!args.parse(argc, argv)) return kExitDone;
  JsonWriter w(2);
  w.object().key("findings").array();
  for (const Finding& f : examine_machine("", folder)) {
    const char* verdict = f.good ? "PASS" : "FAIL";
    works = works && f.good;
    w.object().key("verdict").value(verdict).key("name").value(f.name);
    w.key("value").value(f.value).key("remedy").value(f.good ? "" : f.remedy).end();
    if (json) continue;
    printf("%s  %-10s %s\n", verdict, f.name.c_str(), f.value.c_str());
    if (!f.good) printf("                 Try: %s\n", f.remedy.c_str());
  }
  if (json) printf("%s\n", w.end().key("works").value(works).end().str().c_str());
  return works ? kExitDone : kExitFailed;
}

}  // namespace pith
