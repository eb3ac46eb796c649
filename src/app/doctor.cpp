// doctor: pith doctor.
#include "app/doctor.h"

#include <dlfcn.h>
#include <sched.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>

#include "app/arguments.h"
#include "app/commands.h"
#include "core/json.h"
#include "core/log.h"

namespace pith {

namespace {
using Findings = vector<Finding>;

constexpr double kGiB = 1 << 30;

// A file of /proc or /sys; empty if there is none.
string slurp(const string& path) {
  std::ifstream file(path);
  std::stringstream all;
  all << file.rdbuf();
  return all.str();
}

// The rest of the line that begins with `key` and a colon or blanks; empty if there is none.
string value_of(const string& lines, const string& key) {
  std::istringstream in(lines);
  for (string line; std::getline(in, line);)
    if (line.rfind(key, 0) == 0)
      if (const size_t at = line.find_first_not_of(" \t:", key.size()); at < line.size())
        return line.substr(at);
  return "";
}

// A file of this process's cgroup (version 2). In a container the path named may be the host's:
// then the root of the mount is ours.
string cgroup_file(const string& root, const string& file) {
  const string mount = root + "/sys/fs/cgroup";
  const string path = value_of(slurp(root + "/proc/self/cgroup"), "0::");
  const string own = slurp(mount + path + "/" + file);
  return own.empty() ? slurp(mount + "/" + file) : own;
}

void examine_cpu(const string& root, Findings& out) {
  const string model = value_of(slurp(root + "/proc/cpuinfo"), "model name");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    out.push_back({Verdict::Pass, "cpu", model + "; AVX2, FMA"});
  else
    out.push_back(
        {Verdict::Fail, "cpu", model + "; without AVX2 or FMA", "an x86-64-v3 CPU (Haswell on)"});
  cpu_set_t set;
  const int cores = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  Finding found{Verdict::Pass, "cores", text("%d usable", cores)};
  double quota = 0, period = 1;  // "max 100000" without a limit
  if (sscanf(cgroup_file(root, "cpu.max").c_str(), "%lf %lf", &quota, &period) == 2) {
    found.value += text(", limited to %.1f by the cgroup", quota / period);
    if (quota / period < cores - 0.5 && !getenv("OMP_NUM_THREADS")) {
      found.verdict = Verdict::Warn;
      found.remedy = text("OMP_NUM_THREADS=%.0f", std::max(1.0, quota / period));
    }
  }
  out.push_back(found);
}

void examine_memory(const string& root, Findings& out) {
  const string info = slurp(root + "/proc/meminfo");
  const double total = 1024 * atof(value_of(info, "MemTotal").c_str());
  double usable = 1024 * atof(value_of(info, "MemAvailable").c_str());
  string limited;
  const double limit = atof(cgroup_file(root, "memory.max").c_str());
  if (limit > 0) {  // "max" reads as 0
    const double cached = atof(value_of(cgroup_file(root, "memory.stat"), "inactive_file").c_str());
    const double used = atof(cgroup_file(root, "memory.current").c_str());
    usable = std::min(usable, limit - used + cached);
    limited = ", limited to " + bytes_text(limit) + " by the cgroup";
  }
  Finding found{Verdict::Pass, "memory",
                bytes_text(usable) + " available of " + bytes_text(total) + limited};
  if (usable < 2 * kGiB) {
    found.verdict = usable < 0.25 * kGiB ? Verdict::Fail : Verdict::Warn;
    found.remedy = "a smaller model or batch, or a machine with more memory";
  }
  out.push_back(found);
}

// Writes 64 MiB and flushes them, under no name that could be left behind.
void examine_disk(const string& folder, Findings& out) {
  string path = folder + "/.pith-doctor-XXXXXX";
  const int fd = mkstemp(path.data());
  if (fd >= 0) {
    unlink(path.c_str());
    errno = ENOSPC;  // if a write is short
  }
  const vector<char> block(64 << 20, 'x');
  struct statvfs info = {};
  const double start = now_s();
  const bool good = fd >= 0 && fstatvfs(fd, &info) == 0 &&
                    write(fd, block.data(), block.size()) == ssize_t(block.size()) &&
                    fsync(fd) == 0;
  const double rate = double(block.size()) / (now_s() - start);
  const string reason = strerror(errno);
  if (fd >= 0) close(fd);
  const double free = double(info.f_bavail) * double(info.f_frsize);
  if (!good)
    out.push_back({Verdict::Fail, "disk", folder + ": cannot be written (" + reason + ")",
                   "free space, or --folder with the folder of your runs"});
  else
    out.push_back({free < 5 * kGiB || rate < 50e6 ? Verdict::Warn : Verdict::Pass, "disk",
                   folder + ": " + bytes_text(free) + " free, writes " + bytes_text(rate) + "/s",
                   "another disk for the checkpoints"});
}

// A function of the first of the shared libraries that there is, or null.
template <class F>
F* symbol(std::initializer_list<const char*> libraries, const char* name) {
  for (const char* library : libraries)
    if (void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL))
      return reinterpret_cast<F*>(dlsym(handle, name));
  return nullptr;
}

// Asks the driver's own interface (cuda.h), so that nothing of CUDA need be installed. Names hold
// "MIG" for a slice of a GPU.
void examine_gpu(const string& root, Findings& out) {
  const string driver = value_of(slurp(root + "/proc/driver/nvidia/version"), "NVRM version");
  if (!driver.empty()) out.push_back({Verdict::Pass, "gpu driver", driver});
  const char* visible = getenv("CUDA_VISIBLE_DEVICES");
  if (visible) out.push_back({Verdict::Pass, "CUDA_VISIBLE_DEVICES", text("\"%s\"", visible)});
  const auto cuda = {"libcuda.so.1"};
  const auto init = symbol<int(unsigned)>(cuda, "cuInit");
  const auto count_devices = symbol<int(int*)>(cuda, "cuDeviceGetCount");
  const auto name_device = symbol<int(char*, int, int)>(cuda, "cuDeviceGetName");
  const auto attribute = symbol<int(int*, int, int)>(cuda, "cuDeviceGetAttribute");
  const auto memory = symbol<int(size_t*, int)>(cuda, "cuDeviceTotalMem_v2");
  if (!init || !count_devices || !name_device || !attribute || !memory) {
    const bool none = driver.empty();
    out.push_back({none ? Verdict::Pass : Verdict::Warn, "gpu",
                   none ? "none: training runs on the CPU" : "libcuda.so.1 cannot be used",
                   none ? "" : "the driver's user libraries; in a container, its GPU option"});
    return;
  }
  int count = 0, status = init(0);
  if (status == 0) status = count_devices(&count);
  if (count == 0) {
    out.push_back({Verdict::Warn, "gpu",
                   status ? text("cannot be used (CUDA error %d)", status) : "no device",
                   "CUDA_VISIBLE_DEVICES, and the container's GPU option"});
    return;
  }
  for (int i = 0; i < count; i++) {
    char name[256] = "";
    int major = 0, minor = 0;
    size_t bytes = 0;
    const bool good = !name_device(name, sizeof name, i) && !attribute(&major, 75, i) &&
                      !attribute(&minor, 76, i) && !memory(&bytes, i);
    out.push_back(
        {good ? Verdict::Pass : Verdict::Warn, text("gpu %d", i),
         text("%s, compute capability %d.%d, ", name, major, minor) + bytes_text(double(bytes)),
         "nvidia-smi"});
  }
  int64_t lt = 0, cudnn = 0;
  int nccl = 0;
  if (const auto get =
          symbol<size_t()>({"libcublasLt.so.13", "libcublasLt.so.12"}, "cublasLtGetVersion"))
    lt = int64_t(get());
  if (const auto get = symbol<size_t()>({"libcudnn.so.9"}, "cudnnGetVersion"))
    cudnn = int64_t(get());
  if (const auto get = symbol<int(int*)>({"libnccl.so.2"}, "ncclGetVersion")) get(&nccl);
  for (const auto& [name, version] :
       {std::pair{"cublasLt", lt}, {"cudnn", cudnn}, {"nccl", int64_t{nccl}}})
    out.push_back({version ? Verdict::Pass : Verdict::Warn, name,
                   version ? "version " + std::to_string(version) : "not found",
                   "LD_LIBRARY_PATH with its folder"});
}

const char* word_of(Verdict verdict) {
  return verdict == Verdict::Pass ? "PASS" : verdict == Verdict::Warn ? "WARN" : "FAIL";
}
}  // namespace

vector<Finding> examine_machine(const string& root, const string& folder) {
  Findings out = {{Verdict::Pass, "program", "compiled by " __VERSION__}};
  examine_cpu(root, out);
  examine_memory(root, out);
  if (!folder.empty()) examine_disk(folder, out);
  examine_gpu(root, out);
  for (Finding& f : out)
    if (f.verdict == Verdict::Pass) f.remedy.clear();
  return out;
}

int run_doctor(int argc, char** argv) {
  string folder = ".";
  bool json = false;
  Arguments args("pith doctor",
                 "Says what this machine offers. Exit code 0 if training on the CPU "
                 "will work, else 1.");
  args.option("--folder", folder, "where runs will be kept: space and speed are measured there");
  args.flag("--json", json, "print JSON");
  if (!args.parse(argc, argv)) return kExitDone;
  const Findings findings = examine_machine("", folder);
  const bool works = std::none_of(findings.begin(), findings.end(),
                                  [](const Finding& f) { return f.verdict == Verdict::Fail; });
  JsonWriter w(2);
  w.object().key("works").value(works).key("findings").array();
  for (const Finding& f : findings) {
    w.object().key("verdict").value(word_of(f.verdict)).key("name").value(f.name);
    w.key("value").value(f.value).key("remedy").value(f.remedy).end();
    if (json) continue;
    printf("%s  %-10s %s\n", word_of(f.verdict), f.name.c_str(), f.value.c_str());
    if (!f.remedy.empty()) printf("                 Try: %s\n", f.remedy.c_str());
  }
  if (json) printf("%s\n", w.end().end().str().c_str());
  return works ? kExitDone : kExitFailed;
}

}  // namespace pith
