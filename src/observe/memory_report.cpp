#include "observe/memory_report.h"

#include "core/json.h"
#include "core/log.h"

namespace pith {

struct Kind {
  const char *key, *heading;
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

string memory_table(const vector<RankMemory>& ranks) {
  string out = "rank";
  for (const Kind& kind : kKinds) out += text(" %12s", kind.heading);
  out += text(" %12s\n", "total");
  for (size_t i = 0; i < ranks.size(); i++) {
    out += text("%4zu", i);
    for (const Kind& kind : kKinds)
      out += text(" %12s", bytes_text(double(ranks[i].*kind.bytes)).c_str());
    out += text(" %12s\n", bytes_text(double(ranks[i].total())).c_str());
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
