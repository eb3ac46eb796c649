// Each takes argv from its own name on (argv[0] is "tokenize") and returns the exit code; errors
// are thrown as Error.
#pragma once

namespace pith {

int run_train(int argc, char** argv);
int run_tokenize(int argc, char** argv);
int run_corpus(int argc, char** argv);
int run_eval(int argc, char** argv);
int run_generate(int argc, char** argv);
int run_convert(int argc, char** argv);
int run_checkpoint(int argc, char** argv);
int run_plan(int argc, char** argv);
int run_doctor(int argc, char** argv);

}
