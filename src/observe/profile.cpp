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
  char* demangled = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, nullptr);
  string name = demangled ? demangled : symbol;
  free(demangled);
  // A lambda's kernel has the function around it in its type: __nv_dl_tag<TYPE, &NAME, NUMBER>.
  if (name.find("__nv_dl_tag<") != string::npos) name.erase(0, name.find(", &") + 2);
  for (const string noise : {"&(", "&", "(anonymous namespace)::", "pith::", "void "})
    for (size_t at; (at = name.find(noise)) != string::npos;) name.erase(at, noise.size());
  return name.substr(0, min<size_t>(name.find_first_of("(,"), 72));
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
  vector<std::pair<std::pair<double, i64>, string>> most;
  for (const auto& [kernel, sum] : of) most.emplace_back(sum, kernel);
  std::sort(most.rbegin(), most.rend());
  if (most.size() > 10) most.resize(10);
  string table = text("step %ld: %.3f ms, %zu launches\n        ms  share  calls  kernel\n", p.step,
      p.us / 1e3, p.launches.size());
  for (const auto& [sum, kernel] : most)
    table += text("%10.3f %5.1f%% %6ld  %s\n", sum.first / 1e3, 100 * sum.first / p.us, sum.second,
        kernel.c_str());
  const vector<double> share = profile_shares(p);
  table += text("matrix products %.1f%%, attention %.1f%%, memory-bound kernels %.1f%%, ", share[0],
      share[1], share[2]);
  return table + text("communication %.1f%%, idle %.1f%%", share[3], share[4]);
}

void write_profile(const string& folder, Profile& p) {
  if (p.launches.empty())
    return log_warning("profile: nothing recorded: another tool, such as nsys, holds CUPTI");
  std::ranges::stable_sort(p.launches, {}, &Launch::begin_us);
  string rows = "start_us\tduration_us\tstream\tstage\tlayer\tmicro_batch\tkernel\n";
  JsonWriter w;
  w.object().key("traceEvents").array();
  for (Launch& l : p.launches) {
    const Stage& s = p.stages[l.stage];
    l.kernel = kernel_name(l.kernel);
    rows += text("%.3f\t%.3f\t%d\t%s\t%d\t%d\t%s\n", l.begin_us, l.us, l.stream, s.name.c_str(),
        s.layer, s.micro_batch, l.kernel.c_str());
    w.object().members("ph", "X", "pid", "GPU", "tid", text("stream %d", l.stream), "name",
        l.kernel, "ts", l.begin_us, "dur", l.us);
    w.key("args").object().members("stage", s.name, "layer", s.layer, "micro_batch", s.micro_batch);
    w.end().end();
  }
  const string path = folder + text("/profile-step-%06ld", p.step);
  write_file_durably(path + ".tsv", rows);
  write_file_durably(path + ".json", w.end().end().str());
  log_info("profile of %s\n%s.json, for ui.perfetto.dev, and .tsv", profile_table(p).c_str(),
      path.c_str());
}

}
