// doctor: pith doctor.
#include "app/doctor.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <gnu/libc-version.h>
#include <sched.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <sstream>

#include "app/arguments.h"
#include "app/commands.h"
#include "core/json.h"
#include "core/log.h"

extern "C" char* openblas_get_corename();

namespace pith {

namespace {
using Findings = std::vector<Finding>;

constexpr double kGiB = 1 << 30;

// A file of /proc or /sys; empty if there is none.
std::string slurp(const std::string& path) {
    std::ifstream file(path);
    std::stringstream all;
    all << file.rdbuf();
    return all.str();
}

// What follows `key` and its colon or blanks on a line of "key : value" lines; empty if there is
// none.
std::string value_of(const std::string& lines, const std::string& key) {
    std::istringstream in(lines);
    for (std::string line; std::getline(in, line);)
        if (line.rfind(key, 0) == 0)
            if (const size_t at = line.find_first_not_of(" \t:", key.size()); at < line.size())
                return line.substr(at);
    return "";
}

// This process's folder in a cgroup hierarchy: version 2 ("0::/path"), or a controller's of version
// 1
// ("4:memory:/path"). In a container the path may be the host's: then the root of the mount is
// ours.
std::string cgroup_file(const std::string& root, const std::string& v2,
                        const std::string& controller, const std::string& v1) {
    std::istringstream in(slurp(root + "/proc/self/cgroup"));
    const std::string base = root + "/sys/fs/cgroup";
    for (std::string line; std::getline(in, line);) {
        const size_t a = line.find(':'), b = line.find(':', a + 1);
        if (b == std::string::npos) continue;
        const std::string names = line.substr(a + 1, b - a - 1), path = line.substr(b + 1);
        const bool two = names.empty();
        if (!two && ("," + names + ",").find("," + controller + ",") == std::string::npos) continue;
        const std::string mount = two ? base : base + "/" + controller, file = two ? v2 : v1;
        for (const std::string& folder : {mount + path, mount})
            if (const std::string found = slurp(folder + "/" + file); !found.empty()) return found;
    }
    return "";
}

void examine_build(Findings& out) {
    std::string kind = "CPU";
#ifdef PITH_CUDA
    kind += " and CUDA";
#endif
#ifdef __SANITIZE_ADDRESS__
    kind += ", address sanitizer";
#endif
#ifndef NDEBUG
    kind += ", debug";
#endif
    out.push_back({Verdict::Pass, "program", kind + "; compiled by " __VERSION__});
    const std::string built = text("%d.%d", __GLIBC__, __GLIBC_MINOR__);
    out.push_back({Verdict::Pass, "glibc",
                   std::string(gnu_get_libc_version()) + " (built with " + built + ")"});
}

void examine_cpu(const std::string& root, Findings& out) {
    const std::string model = value_of(slurp(root + "/proc/cpuinfo"), "model name");
    std::string missing;
    if (!__builtin_cpu_supports("avx2")) missing += " AVX2";
    if (!__builtin_cpu_supports("fma")) missing += " FMA";
    if (!__builtin_cpu_supports("bmi2")) missing += " BMI2";
    Finding cpu{Verdict::Pass, "cpu", model.empty() ? "of unknown model" : model};
    cpu.value += missing.empty() ? "; AVX2, FMA" : "; without" + missing;
    if (!missing.empty())
        cpu = {Verdict::Fail, cpu.name, cpu.value, "an x86-64-v3 CPU (Haswell on)"};
    out.push_back(cpu);

    cpu_set_t set;
    const int cores = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    double quota = 0, period = 0;
    std::istringstream two(cgroup_file(root, "cpu.max", "cpu", "cpu.cfs_quota_us"));
    two >> quota;
    if (!(two >> period))
        std::istringstream(cgroup_file(root, "", "cpu", "cpu.cfs_period_us")) >> period;
    Finding found{Verdict::Pass, "cores", text("%d usable", cores)};
    if (quota > 0 && period > 0)
        found.value += text(", limited to %.1f by the cgroup", quota / period);
    if (quota > 0 && period > 0 && quota / period < cores - 0.5 && !getenv("OMP_NUM_THREADS")) {
        found.verdict = Verdict::Warn;
        found.remedy = text("OMP_NUM_THREADS=%.0f", std::max(1.0, std::floor(quota / period)));
    }
    out.push_back(found);

    const char* kernels = openblas_get_corename();
    Finding blas{Verdict::Pass, "openblas", std::string("kernels for ") + kernels};
    for (const char* slow : {"Prescott", "Core2", "Nehalem", "Sandybridge", "Generic"})
        if (missing.empty() && !strcasecmp(kernels, slow))
            blas = {Verdict::Warn, blas.name, blas.value, "OPENBLAS_CORETYPE=Haswell"};
    out.push_back(blas);
}

void examine_memory(const std::string& root, Findings& out) {
    const std::string info = slurp(root + "/proc/meminfo");
    const double total = 1024 * atof(value_of(info, "MemTotal").c_str());
    double usable = 1024 * atof(value_of(info, "MemAvailable").c_str());
    std::string limited;
    const double limit =
        atof(cgroup_file(root, "memory.max", "memory", "memory.limit_in_bytes").c_str());
    if (limit > 0 && limit < total) {  // "max" reads as 0, and version 1 has a huge number for none
        const std::string stat = cgroup_file(root, "memory.stat", "memory", "memory.stat");
        const double cached = atof(value_of(stat, "inactive_file").c_str()) +
                              atof(value_of(stat, "active_file").c_str());
        const double used =
            atof(cgroup_file(root, "memory.current", "memory", "memory.usage_in_bytes").c_str());
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
void examine_disk(const std::string& folder, Findings& out) {
    Finding found{Verdict::Pass, "disk"};
    const std::string path = folder + text("/.pith-doctor-%d", static_cast<int>(getpid()));
    struct statvfs info;
    const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0 || statvfs(folder.c_str(), &info) != 0) {
        out.push_back({Verdict::Fail, "disk",
                       folder + ": cannot be written (" + strerror(errno) + ")",
                       "--folder with the folder of your runs"});
        if (fd >= 0) close(fd);
        return;
    }
    unlink(path.c_str());
    const double free = static_cast<double>(info.f_bavail) * static_cast<double>(info.f_frsize);
    const std::vector<char> block(4 << 20, 'x');
    const double start = now_s();
    bool good = true;
    for (int i = 0; i < 16 && good; i++)
        good = write(fd, block.data(), block.size()) == static_cast<ssize_t>(block.size());
    good = good && fsync(fd) == 0;
    const double rate = 16.0 * static_cast<double>(block.size()) / (now_s() - start);
    const double flush = now_s();
    good = good && pwrite(fd, "y", 1, 0) == 1 && fsync(fd) == 0;
    found.value = folder + ": " + bytes_text(free) + " free";
    if (!good) {
        found = {Verdict::Fail, "disk",
                 found.value + text(", cannot be written (%s)", strerror(errno)),
                 "free space, or --folder with another folder"};
    } else {
        found.value +=
            ", writes " + bytes_text(rate) + text("/s, fsync %.1f ms", 1e3 * (now_s() - flush));
        if (free < 5 * kGiB || rate < 50e6)
            found = {Verdict::Warn, "disk", found.value, "another disk for the checkpoints"};
    }
    close(fd);
    out.push_back(found);
}

// A function of a shared library, or null.
template <class F>
F* symbol(void* library, const char* name) {
    return reinterpret_cast<F*>(library ? dlsym(library, name) : nullptr);
}

void* open_library(std::initializer_list<const char*> names) {
    for (const char* name : names)
        if (void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return library;
    return nullptr;
}

// The driver's own interface (cuda.h), so that nothing of CUDA need be installed. Names hold "MIG"
// for a slice of a GPU.
int examine_devices(void* cuda, Findings& out) {
    const auto init = symbol<int(unsigned)>(cuda, "cuInit");
    const auto count_of = symbol<int(int*)>(cuda, "cuDeviceGetCount");
    const auto get = symbol<int(int*, int)>(cuda, "cuDeviceGet");
    const auto name_of_device = symbol<int(char*, int, int)>(cuda, "cuDeviceGetName");
    const auto attribute = symbol<int(int*, int, int)>(cuda, "cuDeviceGetAttribute");
    const auto memory = symbol<int(size_t*, int)>(cuda, "cuDeviceTotalMem_v2");
    const auto error_name = symbol<int(int, const char**)>(cuda, "cuGetErrorName");
    if (!init || !count_of || !get || !name_of_device || !attribute || !memory || !error_name) {
        out.push_back({Verdict::Warn, "gpu", "libcuda.so.1 lacks functions", "a newer driver"});
        return 0;
    }
    int count = 0, status = init(0);
    if (status == 0) status = count_of(&count);
    if (status != 0 || count == 0) {
        const char* why = "no device";
        if (status != 0) error_name(status, &why);
        out.push_back({Verdict::Warn, "gpu", std::string("cannot be used: ") + why,
                       "CUDA_VISIBLE_DEVICES, and the container's GPU option"});
        return 0;
    }
    for (int i = 0; i < count; i++) {
        char name[256] = "";
        int device = 0, major = 0, minor = 0;
        size_t bytes = 0;
        if (get(&device, i) || name_of_device(name, sizeof name, device) ||
            attribute(&major, 75, device) || attribute(&minor, 76, device) ||
            memory(&bytes, device)) {
            out.push_back({Verdict::Warn, text("gpu %d", i), "does not answer", "nvidia-smi"});
            continue;
        }
        out.push_back({Verdict::Pass, text("gpu %d", i),
                       text("%s, compute capability %d.%d, ", name, major, minor) +
                           bytes_text(static_cast<double>(bytes)) +
                           (strstr(name, "MIG") ? ", a MIG slice" : "")});
    }
    return count;
}

// Libraries are looked for as a CUDA program would; versions in the makers' own numbering.
void examine_cuda_libraries(bool needed, Findings& out) {
    const auto add = [&](const char* name, int64_t version) {
        if (version > 0)
            out.push_back(
                {Verdict::Pass, name, text("version %lld", static_cast<long long>(version))});
        else if (needed)
            out.push_back({Verdict::Warn, name, "not found", "LD_LIBRARY_PATH with its folder"});
    };
    const auto lt = open_library({"libcublasLt.so.13", "libcublasLt.so.12"});
    const auto cudnn = open_library({"libcudnn.so.9"}), nccl = open_library({"libnccl.so.2"});
    const auto lt_version = symbol<size_t()>(lt, "cublasLtGetVersion");
    const auto cudnn_version = symbol<size_t()>(cudnn, "cudnnGetVersion");
    const auto nccl_version = symbol<int(int*)>(nccl, "ncclGetVersion");
    add("cublasLt", lt_version ? static_cast<int64_t>(lt_version()) : 0);
    add("cudnn", cudnn_version ? static_cast<int64_t>(cudnn_version()) : 0);
    int version = 0;
    add("nccl", nccl_version && nccl_version(&version) == 0 ? version : 0);
}

void examine_gpu(const std::string& root, Findings& out) {
    const std::string driver =
        value_of(slurp(root + "/proc/driver/nvidia/version"), "NVRM version");
    void* cuda = open_library({"libcuda.so.1"});
    int devices = 0;
    if (!driver.empty()) out.push_back({Verdict::Pass, "gpu driver", driver});
    if (cuda)
        devices = examine_devices(cuda, out);
    else if (!driver.empty())
        out.push_back({Verdict::Warn, "gpu", "libcuda.so.1 is missing",
                       "the driver's user libraries; in a container, its GPU option"});
    else
        out.push_back({Verdict::Pass, "gpu", "none: training runs on the CPU"});
    examine_cuda_libraries(devices > 0, out);
    if (const char* visible = getenv("CUDA_VISIBLE_DEVICES"))
        out.push_back({Verdict::Pass, "CUDA_VISIBLE_DEVICES", text("\"%s\"", visible)});
}

const char* word_of(Verdict verdict) {
    return verdict == Verdict::Pass ? "PASS" : verdict == Verdict::Warn ? "WARN" : "FAIL";
}
}  // namespace

std::vector<Finding> examine_machine(const std::string& root, const std::string& folder) {
    Findings out;
    examine_build(out);
    examine_cpu(root, out);
    examine_memory(root, out);
    if (!folder.empty()) examine_disk(folder, out);
    examine_gpu(root, out);
    return out;
}

int run_doctor(int argc, char** argv) {
    std::string folder = ".";
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
