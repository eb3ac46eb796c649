// arguments: the command line of a command; the one user of CLI11.
//
//   Arguments args("pith train", "Trains a model.");
//   args.positional("run", file, "run.toml");
//   args.option("--ranks", ranks, "CPU ranks", 1, 256);
//   if (!args.parse(argc, argv)) return kExitDone;   // --help was printed
// defines: Arguments
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace pith {

// Values are bound by reference and keep what they held where an option is not given; that is shown
// as the default. Lists may be repeated.
class Arguments {
 public:
  Arguments(const std::string& command, const std::string& about);
  ~Arguments();

  void positional(const std::string& name, std::string& value, const std::string& about,
                  bool required = true);
  void option(const std::string& name, std::string& value, const std::string& about);
  void option(const std::string& name, int64_t& value, const std::string& about,
              int64_t min = INT64_MIN, int64_t max = INT64_MAX);
  void option(const std::string& name, double& value, const std::string& about, double min = -1e300,
              double max = 1e300);
  // A value at a time: "--set a=1 --set b=2"; with `separator`, also "a,b".
  void list(const std::string& name, std::vector<std::string>& values, const std::string& about,
            char separator = 0);
  // One or more behind the name: "--input a b".
  void many(const std::string& name, std::vector<std::string>& values, const std::string& about);
  // One of `choices`. A name without dashes is a required positional.
  void choice(const std::string& name, std::string& value, const std::vector<std::string>& choices,
              const std::string& about);
  void flag(const std::string& name, bool& value, const std::string& about);
  bool given(const std::string& name) const;

  // False when --help was asked for and printed. Exit code 2, naming the command and the
  // argument, for a wrong command line.
  bool parse(int argc, char** argv);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace pith
