#include "observe/memory_report.h"

#include "core/json.h"
#include "core/log.h"

namespace pith {

struct Kind {
  const char* key;
  const char* heading;
  int64_t RankMemory::*bytes;
};
static constexpr Kind kKinds[] = {
    {"weights", "weights", &RankMemory::weights},
    {"compute_copy", "compute copy", &RankMemory::compute_copy},
    {"gradients", "gradients", &RankMemory::gradients},
    {"optimizer", "optimizer", &RankMemory::optimizer},
    {"activations", "activations*", &RankMemory::activations},
    {"workspace", "workspace*", &RankMemory::workspace},
};

string memory_table(const vector<RankMemory>& ranks, int64_t available) {
  const auto cell = [](const string& words) { return text(" %12s", words.c_str()); };
  string out = text("%-9s", "ranks");
  for (const Kind& kind : kKinds) out += cell(kind.heading);
  out += cell("total") + (available > 0 ? "  of available\n" : "\n");
  for (size_t i = 0, next; i < ranks.size(); i = next) {
    for (next = i + 1; next < ranks.size() && ranks[next] == ranks[i];) next++;
    const string last = next > i + 1 ? text("-%zu", next - 1) : "";
    out += text("%-9s", (std::to_string(i) + last).c_str());
    for (const Kind& kind : kKinds) out += cell(bytes_text(double(ranks[i].*kind.bytes)));
    const double total = double(ranks[i].total());
    out += cell(bytes_text(total));
    if (available > 0) out += text("  %11.0f%%", 100 * total / double(available));
    out += "\n";
  }
  return out + "* estimated\n";
}

string memory_json(const vector<RankMemory>& ranks) {
  JsonWriter w;
  w.array();
  for (size_t i = 0; i < ranks.size(); i++) {
    w.object().key("rank").value(i);
    for (const Kind& kind : kKinds) w.key(kind.key).value(ranks[i].*kind.bytes);
    w.key("total").value(ranks[i].total()).end();
  }
  return w.end().str();
}

}  // namespace pith
