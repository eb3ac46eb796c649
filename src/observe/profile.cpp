#include "observe/profile.h"

#include <cxxabi.h>

#include <algorithm>

#include "core/json.h"
#include "core/log.h"
#include "data/durable.h"

namespace pith {

int kind_of_kernel(string_view name) {
  auto has = [&](auto... parts) { return ((name.find(parts) != name.npos) || ...); };
  if (has("nccl", "p2p")) return 3;
  if (has("fmha", "flash", "sdpa", "cudnn", "attention")) return 1;
  return has("nvjet", "gemm", "gemv", "cutlass", "xmma", "splitK") ? 0 : 2;
}

string kernel_name(const string& symbol) {
  char* demangled = symbol.starts_with("_Z")
                        ? abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, nullptr)
                        : nullptr;
  string name = demangled ? demangled : symbol;
  free(demangled);
  for (const string noise : {"(anonymous namespace)::", "pith::"})
    for (size_t at; (at = name.find(noise)) != string::npos;) name.erase(at, noise.size());
  // A lambda's kernel has the function around it in its type: __nv_dl_tag<TYPE, &NAME, NUMBER>.
  if (name.find("__nv_dl_tag<") != string::npos) name.erase(0, name.find(", &") + 3);
  if (name[0] == '(') name.erase(0, 1);
  size_t begin = 0, end = 0;  // without result and parameters
  for (int deep = 0; end < name.size() && (deep || !strchr("(,", name[end])); end++) {
    deep += (name[end] == '<') - (name[end] == '>');
    if (!deep && name[end] == ' ') begin = end + 1;
  }
  name = name.substr(begin, end - begin);
  constexpr size_t kMost = 72;
  if (name.size() <= kMost) return name;
  return name.substr(0, kMost) + text("...%04zx", std::hash<string>()(symbol) & 0xffff);
}

vector<double> profile_shares(const Profile& p) {
  vector<double> shares = {0, 0, 0, 0, 100};
  double end = 0;
  for (const Launch& l : p.launches) {
    const double until = max(l.begin_us + l.us, end);
    const double share = 100 * (until - max(l.begin_us, end)) / p.us;
    shares[kind_of_kernel(l.kernel)] += share;
    shares.back() -= share;
    end = until;
  }
  return shares;
}

string profile_table(const Profile& p) {
  std::map<string, std::pair<double, i64>> of;  // microseconds and calls
  for (const Launch& l : p.launches) {
    of[l.kernel].first += l.us;
    of[l.kernel].second++;
  }
  vector<std::pair<double, string>> most;
  for (const auto& [kernel, sum] : of) most.emplace_back(-sum.first, kernel);
  std::ranges::sort(most);
  if (most.size() > 10) most.resize(10);
  string table = text("step %ld: %.3f ms, %zu launches\n        ms  share  calls  kernel\n", p.step,
                      p.us / 1e3, p.launches.size());
  for (const auto& [us, kernel] : most)
    table += text("%10.3f %5.1f%% %6ld  %s\n", -us / 1e3, -100 * us / p.us, of[kernel].second,
                  kernel.c_str());
  const vector<double> shares = profile_shares(p);
  for (size_t i = 0; i < shares.size(); i++)
    table += text("%s%s %.1f%%", i ? ", " : "", kKernelKinds[i], shares[i]);
  return table;
}

void write_profile(const string& folder, Profile& p) {
  if (p.launches.empty())
    return log_warning("profile: nothing recorded: another tool, such as nsys, holds CUPTI");
  std::ranges::stable_sort(p.launches, {}, &Launch::begin_us);
  string rows = "start_us\tduration_us\tstream\tstage\tlayer\tmicro_batch\tkernel\n";
  JsonWriter w;
  w.object().key("traceEvents").array();
  auto bar = [&](const string& track, const string& name, double begin, double end,
                 const Stage& s) {
    w.object()
        .members("ph", "X", "pid", "GPU", "tid", track, "name", name, "ts", begin, "dur",
                 end - begin)
        .key("args")
        .object()
        .members("stage", s.name, "layer", s.layer, "micro_batch", s.micro_batch)
        .end()
        .end();
  };
  bar("stages", text("step %ld", p.step), 0, p.us, {"step"});
  const Launch* first = p.launches.data();
  for (Launch& l : p.launches) {
    const Stage& s = p.stages[l.stage];
    const double end = l.begin_us + l.us;
    l.kernel = kernel_name(l.kernel);
    rows += text("%.3f\t%.3f\t%d\t%s\t%d\t%d\t%s\n", l.begin_us, l.us, l.stream, s.name.c_str(),
                 s.layer, s.micro_batch, l.kernel.c_str());
    bar(text("stream %d", l.stream), l.kernel, l.begin_us, end, s);
    if (&l < &p.launches.back() && (&l)[1].stage == l.stage) continue;
    bar("stages", s.name, first->begin_us, end, s);
    first = &l + 1;
  }
  const string path = folder + text("/profile-step-%06ld", p.step);
  write_file_durably(path + ".tsv", rows);
  write_file_durably(path + ".json", w.end().end().str());
  log_info("profile of %s\n%s.json, for ui.perfetto.dev, and .tsv", profile_table(p).c_str(),
           path.c_str());
}

}
