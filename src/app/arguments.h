#pragma once
#include <limits>
#include <memory>

#include "core/check.h"

namespace CLI {
class App;
}

namespace pith {

// The command line of a command. Values are bound by reference; what they hold is the default.
class Arguments {
 public:
  Arguments(const string& command, const string& about);
  ~Arguments();

  void positional(const string& name, string& value, const string& about, bool required = true);
  void option(const string& name, string& value, const string& about);
  template <class T>  // i64 or double
  void option(const string& name, T& value, const string& about,
              std::type_identity_t<T> min = std::numeric_limits<T>::lowest(),
              std::type_identity_t<T> max = std::numeric_limits<T>::max());
  // A value at a time, "--set a=1 --set b=2"; with separator ',' also "a,b", with ' ' also "a b".
  void list(const string& name, vector<string>& values, const string& about, char separator = 0);
  // One of `choices`. A name without dashes is a required positional.
  void choice(const string& name, string& value, const vector<string>& choices,
              const string& about);
  void flag(const string& name, bool& value, const string& about);
  bool given(const string& name) const;
  // False when --help was asked for and printed. Exit code 2 for a wrong command line.
  bool parse(int argc, char** argv);

 private:
  std::unique_ptr<CLI::App> app_;
};

}
