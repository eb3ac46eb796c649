// Actions as text, one a line, and back.
#include <cstring>

#include "engine/schedule.h"

namespace pith {

std::string to_text(const Action& a) {
    const char* plus = a.defer ? "+" : "";
    switch (a.what) {
        case Do::F: return text("F%d.%d", a.chunk, a.mb);
        case Do::B: return text("B%d.%d%s", a.chunk, a.mb, plus);
        case Do::W:
            return a.count == 1 ? text("W%d.%d", a.chunk, a.mb)
                                : text("W%d.%d-%d", a.chunk, a.mb, a.mb + a.count - 1);
        case Do::FB: return text("F%d.%d|B%d.%d%s", a.chunk, a.mb, a.chunk2, a.mb2, plus);
        case Do::Gather: return text("gather %d", a.chunk);
        case Do::Reduce: return text("reduce %d", a.chunk);
        default:
            return text("%s %c%d.%d %c %d", a.what == Do::Send ? "send" : "recv",
                        a.payload == Payload::Activation ? 'F' : 'B', a.chunk, a.mb,
                        a.what == Do::Send ? '>' : '<', a.peer);
    }
}

namespace {

struct Reader {
    const char* at;
    bool ok = true;

    bool skip(const char* word) {
        const size_t n = std::strlen(word);
        if (std::strncmp(at, word, n) != 0) return false;
        at += n;
        return true;
    }
    void expect(const char* word) { ok = skip(word) && ok; }
    int number() {
        if (*at < '0' || *at > '9') ok = false;
        int value = 0;
        for (; *at >= '0' && *at <= '9' && value < 1000000; at++) value = 10 * value + (*at - '0');
        return value;
    }
    void pair(int& chunk, int& mb) {
        chunk = number();
        ok = ok && chunk <= 1;
        expect(".");
        mb = number();
    }
};

Action read_transfer(Reader& r, Do what) {
    Action a{.what = what};
    a.payload = r.skip("F") ? Payload::Activation : Payload::Gradient;
    if (a.payload == Payload::Gradient) r.expect("B");
    r.pair(a.chunk, a.mb);
    r.expect(what == Do::Send ? " > " : " < ");
    a.peer = r.number();
    return a;
}

Action read_action(Reader& r) {
    Action a;
    if (r.skip("send ")) return read_transfer(r, Do::Send);
    if (r.skip("recv ")) return read_transfer(r, Do::Recv);
    if (const bool gather = r.skip("gather "); gather || r.skip("reduce ")) {
        a.what = gather ? Do::Gather : Do::Reduce;
        a.chunk = r.number();
        r.ok = r.ok && a.chunk <= 1;
    } else if (r.skip("F")) {
        r.pair(a.chunk, a.mb);
        if (!r.skip("|B")) return a;
        a.what = Do::FB;
        r.pair(a.chunk2, a.mb2);
        a.defer = r.skip("+");
    } else if (r.skip("B")) {
        a.what = Do::B;
        r.pair(a.chunk, a.mb);
        a.defer = r.skip("+");
    } else {
        r.expect("W");
        a.what = Do::W;
        r.pair(a.chunk, a.mb);
        if (r.skip("-")) a.count = r.number() - a.mb + 1;
        r.ok = r.ok && a.count >= 1;
    }
    return a;
}

}  // namespace

Action parse_action(const std::string& line, const std::string& place) {
    Reader r{line.c_str()};
    const Action a = read_action(r);
    if (!r.ok || *r.at != 0)
        bad_input(place,
                  text("is not an action (got \"%s\", need one such as F0.3, B1.2 or B1.2+, "
                       "W1.2 or W1.2-4, F0.5|B1.3, send F0.3 > 1, recv B1.2 < 1, gather 0, "
                       "reduce 1)",
                       line.c_str()),
                  "the form that pith plan --schedule --lists prints");
    return a;
}

}  // namespace pith
