#include "app/arguments.h"

#include <CLI/CLI.hpp>

#include "core/check.h"

namespace pith {

struct Arguments::State {
  string command;
  CLI::App app;
};

// An option takes one value; "-" alone, and negative numbers, are values.
Arguments::Arguments(const string& command, const string& about)
    : state_(new State{command, CLI::App(about, command)}) {
  state_->app.get_formatter()->column_width(34);
}
Arguments::~Arguments() = default;

void Arguments::positional(const string& name, string& value, const string& about, bool required) {
  state_->app.add_option(name, value, about)->required(required);
}
void Arguments::option(const string& name, string& value, const string& about) {
  CLI::Option* option = state_->app.add_option(name, value, about);
  if (!value.empty()) option->capture_default_str();
}
void Arguments::option(const string& name, int64_t& value, const string& about, int64_t min,
                       int64_t max) {
  state_->app.add_option(name, value, about)
      ->capture_default_str()
      ->check(CLI::TypeValidator<int64_t>("INT"))
      ->check(CLI::Range(min, max, ""));
}
void Arguments::option(const string& name, double& value, const string& about, double min,
                       double max) {
  state_->app.add_option(name, value, about)
      ->capture_default_str()
      ->check(CLI::Range(min, max, ""));
}
void Arguments::list(const string& name, vector<string>& values, const string& about,
                     char separator) {
  CLI::Option* option = state_->app.add_option(name, values, about)->allow_extra_args(false);
  if (separator) option->delimiter(separator);
}
void Arguments::many(const string& name, vector<string>& values, const string& about) {
  state_->app.add_option(name, values, about);
}
void Arguments::choice(const string& name, string& value, const vector<string>& choices,
                       const string& about) {
  CLI::Option* option = state_->app.add_option(name, value, about);
  option->check(CLI::IsMember(choices));
  if (name[0] == '-')
    option->capture_default_str();
  else
    option->required();
}
void Arguments::flag(const string& name, bool& value, const string& about) {
  state_->app.add_flag(name, value, about);
}
bool Arguments::given(const string& name) const { return state_->app.count(name) > 0; }

bool Arguments::parse(int argc, char** argv) {
  try {
    state_->app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    printf("%s", state_->app.help().c_str());
    return false;
  } catch (const CLI::ParseError& e) {
    string what = e.what();
    for (char& c : what)
      if (c == '\n') c = ' ';
    bad_input(state_->command, what, state_->command + " --help");
  }
  return true;
}

}  // namespace pith
