#include "app/commands.h"
#include "core/check.h"
#include "core/process.h"

namespace pith {

static constexpr struct {
  string_view name;
  int (*run)(int argc, char** argv);
  const char* about;
} kCommands[] = {
    {"train", run_train, "trains a model from a run.toml; the same command goes on after a stop"},
    {"tokenize", run_tokenize, "text to token files, and back"},
    {"corpus", run_corpus, "looks into token files"},
    {"eval", run_eval, "loss, perplexity and bits per byte of a checkpoint or exported model"},
    {"generate", run_generate, "continues a text"},
    {"convert", run_convert, "to and from Hugging Face folders"},
    {"checkpoint", run_checkpoint, "lists, verifies and compares checkpoints"},
    {"plan", run_plan, "the timeline of a pipeline schedule"},
    {"doctor", run_doctor, "what this machine offers"},
};

static int usage(FILE* to) {
  fprintf(to,
          "pith: trains Mixture-of-Experts models.\n\n"
          "usage: pith COMMAND [ARGUMENTS]   (pith COMMAND --help says more)\n\n");
  for (const auto& c : kCommands) fprintf(to, "  %-11s %s\n", c.name.data(), c.about);
  fprintf(to,
          "\nexit codes: 0 done; 1 failed while running; 2 bad usage, configuration or input;\n"
          "            3 stopped by a signal, state saved\n");
  return to == stdout ? kExitDone : kExitBadInput;
}

static int run(int argc, char** argv) {
  if (argc < 2) return usage(stderr);
  const string name = argv[1];
  if (name == "--help" || name == "-h" || name == "help") return usage(stdout);
  for (const auto& c : kCommands)
    if (name == c.name) return c.run(argc - 1, argv + 1);
  bad_input("pith", "unknown command (got \"" + name + "\")", "pith --help");
}

}

int main(int argc, char** argv) { return pith::run_program(argc, argv, pith::run); }
