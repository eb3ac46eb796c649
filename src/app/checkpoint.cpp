// checkpoint: pith checkpoint verify and list.
#include <cstdio>

#include "app/arguments.h"
#include "app/commands.h"
#include "core/log.h"
#include "engine/checkpoint.h"

namespace pith {

namespace {
struct Examined {
    CheckpointFolder folder;
    std::string error;  // empty: it is good
    int64_t bytes = 0, tensors = 0;
    Mesh mesh;
};

// Opens a checkpoint; reads all of it if `whole`.
Examined examine(const CheckpointFolder& folder, bool whole) {
    Examined e;
    e.folder = folder;
    try {
        const Checkpoint c = open_checkpoint(folder.path);
        e.folder.step = c.state.step;
        e.mesh = c.mesh;
        e.tensors = static_cast<int64_t>(c.tensors.size());
        for (const StoredFile& file : c.files) e.bytes += file.bytes;
        if (whole) verify(c);
    } catch (const Error& error) {
        e.error = error.what();
    }
    return e;
}

void print_json(const std::vector<Examined>& list) {
    JsonWriter w(2);
    w.array();
    for (const Examined& e : list) {
        w.object().key("path").value(e.folder.path).key("step").value(e.folder.step);
        w.key("good").value(e.error.empty()).key("bytes").value(e.bytes);
        w.key("tensors").value(e.tensors);
        if (!e.error.empty()) w.key("error").value(e.error);
        w.end();
    }
    printf("%s\n", w.end().str().c_str());
}

void print_lines(const std::vector<Examined>& list, const char* good) {
    for (const Examined& e : list) {
        if (!e.error.empty())
            printf("BAD   %s\n      %s\n", e.folder.path.c_str(), e.error.c_str());
        else
            printf("%s  %s  step %s, %s in %s tensors, saved under pp %d, dp %d, cp %d, ep %d\n",
                   good, e.folder.path.c_str(), with_commas(e.folder.step).c_str(),
                   bytes_text(static_cast<double>(e.bytes)).c_str(), with_commas(e.tensors).c_str(),
                   e.mesh.pp, e.mesh.dp, e.mesh.cp, e.mesh.ep);
    }
}
}  // namespace

int run_checkpoint(int argc, char** argv) {
    Arguments args("pith checkpoint",
                   "Lists a run's checkpoints, or reads them whole and checks every checksum.");
    std::string action, folder;
    bool json = false;
    args.choice("action", action, {"list", "verify"}, "list: a line each; verify: read everything");
    args.positional("folder", folder, "a checkpoint, or a run folder: all of its checkpoints");
    args.flag("--json", json, "print the result as JSON");
    if (!args.parse(argc, argv)) return kExitDone;
    std::vector<CheckpointFolder> folders = list_checkpoints(folder);
    if (folders.empty()) folders.push_back({0, folder});
    std::vector<Examined> list;
    bool good = true;
    for (const CheckpointFolder& one : folders) {
        list.push_back(examine(one, action == "verify"));
        good = good && list.back().error.empty();
    }
    if (json)
        print_json(list);
    else
        print_lines(list, action == "verify" ? "good" : "    ");
    return good ? kExitDone : kExitBadInput;
}

}  // namespace pith
