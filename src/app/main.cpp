#include "app/commands.h"
#include "core/process.h"

namespace pith {

static constexpr struct {
  const char* name;
  int (*run)(int argc, char** argv);
  const char* about;
} kCommands[] = {
    {"train", run_train, "trains a model from a run.toml; the same command goes on after a stop"},
    {"tokenize", run_tokenize, "text to token files, and back"},
    {"corpus", run_corpus, "looks into token files"},
    {"eval", run_eval, "loss, perplexity and bits per byte of a checkpoint or exported model"},
    {"generate", run_generate, "continues a text"},
    {"convert", run_convert, "to and from Hugging Face folders"},
    {"checkpoint", run_checkpoint, "verifies and compares checkpoints"},
    {"plan", run_plan, "the timeline of a pipeline schedule"},
    {"bench", run_bench, "how fast it trains on a GPU, and how fast it could"},
    {"doctor", run_doctor, "what this machine offers"},
};

static int run(int argc, char** argv) {
  string name = argc < 2 ? "--help" : argv[1];
  for (const auto& c : kCommands)
    if (name == c.name) return c.run(argc - 1, argv + 1);
  if (name != "--help") bad_input("pith", "unknown command (got \"" + name + "\")", "pith --help");
  printf(
      "pith: trains Mixture-of-Experts models.\n\n"
      "usage: pith COMMAND [ARGUMENTS], or pith COMMAND --help\n\n");
  for (const auto& c : kCommands) printf("  %-11s %s\n", c.name, c.about);
  printf(
      "\nexit codes: 0 done; 1 failed while running; 2 bad usage, configuration or input;\n"
      "            3 stopped by a signal, state saved\n");
  return argc < 2 ? kExitBadInput : kExitDone;
}

}

int main(int argc, char** argv) { return pith::run_program(argc, argv, pith::run); }
