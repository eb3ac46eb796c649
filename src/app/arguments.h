// The command line of a command; the one user of CLI11.
//
//   Arguments args("pith train", "Trains a model.");
//   args.positional("run", file, "run.toml");
//   args.option("--ranks", ranks, "CPU ranks", 1, 256);
//   if (!args.parse(argc, argv)) return kExitDone;   // --help was printed
#pragma once
#include <cstdint>
#include <memory>

#include "core/check.h"

namespace CLI {
class App;
}

namespace pith {

// Values are bound by reference and keep what they held, which is shown as the default, where an
// option is not given.
class Arguments {
 public:
  Arguments(const string& command, const string& about);
  ~Arguments();

  void positional(const string& name, string& value, const string& about, bool required = true);
  void option(const string& name, string& value, const string& about);
  void option(const string& name, int64_t& value, const string& about, int64_t min = INT64_MIN,
              int64_t max = INT64_MAX);
  void option(const string& name, double& value, const string& about, double min = -1e300,
              double max = 1e300);
  // A value at a time, "--set a=1 --set b=2"; with separator ',' also "a,b", with ' ' also "a b".
  void list(const string& name, vector<string>& values, const string& about, char separator = 0);
  // One of `choices`. A name without dashes is a required positional.
  void choice(const string& name, string& value, const vector<string>& choices,
              const string& about);
  void flag(const string& name, bool& value, const string& about);
  bool given(const string& name) const;

  // False when --help was asked for and printed. Exit code 2, naming the command and the
  // argument, for a wrong command line.
  bool parse(int argc, char** argv);

 private:
  std::unique_ptr<CLI::App> app_;
};

}  // namespace pith
