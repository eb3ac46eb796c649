#pragma once
#include <limits>
#include <memory>

#include "core/check.h"

namespace CLI {
class App;
}

namespace pith {

// Each takes argv from its own name on (argv[0] is "tokenize") and returns the exit code.
int run_train(int argc, char** argv);
int run_tokenize(int argc, char** argv);
int run_corpus(int argc, char** argv);
int run_eval(int argc, char** argv);
int run_generate(int argc, char** argv);
int run_convert(int argc, char** argv);
int run_checkpoint(int argc, char** argv);
int run_plan(int argc, char** argv);
int run_doctor(int argc, char** argv);

// The command line of a command. Values are bound by reference; what they hold is the default. A
// name without dashes is a positional, and required.
class Arguments {
 public:
  explicit Arguments(const string& command, const string& about = "");
  ~Arguments();

  void option(const string& name, string& value, const string& about);
  template <class T>  // i64 or double
  void option(const string& name, T& value, const string& about,
              std::type_identity_t<T> min = std::numeric_limits<T>::lowest(),
              std::type_identity_t<T> max = std::numeric_limits<T>::max());
  void choice(const string& name, string& value, const vector<string>& choices,
              const string& about);
  // A value at a time, "--set a=1 --set b=2"; with separator ',' also "a,b", with ' ' also "a b".
  void list(const string& name, vector<string>& values, const string& about, char separator = 0);
  void flag(const string& name, bool& value, const string& about);
  // False when --help was asked for and printed. Exit code 2 for a wrong command line.
  bool parse(int argc, char** argv);

 private:
  std::unique_ptr<CLI::App> app_;
};

}
