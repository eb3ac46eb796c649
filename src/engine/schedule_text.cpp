// Actions as text, one a line, and back.
#include "engine/schedule.h"

namespace pith {

string to_text(const Action& a) {
  const char* plus = a.defer ? "+" : "";
  switch (a.what) {
    case Do::F: return text("F%d.%d", a.chunk, a.mb);
    case Do::B: return text("B%d.%d%s", a.chunk, a.mb, plus);
    case Do::W:
      return text("W%d.%d", a.chunk, a.mb) + (a.count == 1 ? "" : text("-%d", a.mb + a.count - 1));
    case Do::FB: return text("F%d.%d|B%d.%d%s", a.chunk, a.mb, a.chunk2, a.mb2, plus);
    case Do::Gather: return text("gather %d", a.chunk);
    case Do::Reduce: return text("reduce %d", a.chunk);
    default:
      return text("%s %c%d.%d %c %d", a.what == Do::Send ? "send" : "recv",
                  a.payload == Payload::Activation ? 'F' : 'B', a.chunk, a.mb,
                  a.what == Do::Send ? '>' : '<', a.peer);
  }
}

// Reads generously, and takes only what prints as the same line.
Action parse_action(const string& line, const string& place) {
  const char* s = line.c_str();
  Action a{.defer = line.ends_with('+')};
  char payload = 'F';
  int last = 0;
  if (sscanf(s, "send %c%d.%d > %d", &payload, &a.chunk, &a.mb, &a.peer) == 4) {
    a.what = Do::Send;
  } else if (sscanf(s, "recv %c%d.%d < %d", &payload, &a.chunk, &a.mb, &a.peer) == 4) {
    a.what = Do::Recv;
  } else if (sscanf(s, "gather %d", &a.chunk) == 1) {
    a.what = Do::Gather;
  } else if (sscanf(s, "reduce %d", &a.chunk) == 1) {
    a.what = Do::Reduce;
  } else if (sscanf(s, "F%d.%d|B%d.%d", &a.chunk, &a.mb, &a.chunk2, &a.mb2) == 4) {
    a.what = Do::FB;
  } else if (sscanf(s, "B%d.%d", &a.chunk, &a.mb) == 2) {
    a.what = Do::B;
  } else if (const int n = sscanf(s, "W%d.%d-%d", &a.chunk, &a.mb, &last); n >= 2) {
    a.what = Do::W;
    a.count = n == 3 ? int(int64_t{last} - a.mb + 1) : 1;
  } else {
    sscanf(s, "F%d.%d", &a.chunk, &a.mb);
  }
  if (payload != 'F') a.payload = Payload::Gradient;
  const auto in = [](int number, int end) { return number >= 0 && number < end; };
  const bool sane = in(a.chunk, 2) && in(a.chunk2, 2) && in(a.mb, 1000000) && in(a.mb2, 1000000) &&
                    in(a.count - 1, 1000000);
  if (!sane || to_text(a) != line)
    bad_input(place,
              text("is not an action (got \"%s\", need one such as F0.3, B1.2 or B1.2+, "
                   "W1.2 or W1.2-4, F0.5|B1.3, send F0.3 > 1, recv B1.2 < 1, gather 0, "
                   "reduce 1)",
                   s),
              "the form that pith plan --schedule --lists prints");
  return a;
}

}  // namespace pith
