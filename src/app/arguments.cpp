#include <CLI/CLI.hpp>

#include "app/commands.h"

namespace pith {

Arguments::Arguments(const string& command) : app_(std::make_unique<CLI::App>("", command)) {}
Arguments::~Arguments() = default;

void Arguments::option(const string& name, string& value, const string& about) {
  CLI::Option* option = app_->add_option(name, value, about)->required(name[0] != '-');
  if (!value.empty()) option->capture_default_str();
}

template <class T>
void Arguments::option(const string& name, T& value, const string& about,
    std::type_identity_t<T> min, std::type_identity_t<T> max) {
  app_->add_option(name, value, about)->capture_default_str()->check(CLI::Range(min, max, ""));
}
template void Arguments::option(const string&, i64&, const string&, i64, i64);
template void Arguments::option(const string&, double&, const string&, double, double);

void Arguments::choice(
    const string& name, string& value, const vector<string>& choices, const string& about) {
  option(name, value, about);
  app_->get_option(name)->check(CLI::IsMember(choices));
}

void Arguments::list(
    const string& name, vector<string>& values, const string& about, char separator) {
  CLI::Option* option = app_->add_option(name, values, about)->required(name[0] != '-');
  option->allow_extra_args(separator == ' ');
  if (separator == ',') option->delimiter(',');
}

void Arguments::flag(const string& name, bool& value, const string& about) {
  app_->add_flag(name, value, about);
}

bool Arguments::parse(int argc, char** argv) {
  try {
    app_->parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    printf("%s", app_->help().c_str());
    return false;
  } catch (const CLI::ParseError& e) {
    string what = e.what();
    std::replace(what.begin(), what.end(), '\n', ' ');
    bad_input(app_->get_name(), what, app_->get_name() + " --help");
  }
  return true;
}

void print_result(const string& json, bool as_json) {
  if (as_json) return void(puts(json.c_str()));
  auto print_entries = [](const Json& list, const char* indent) {
    for (i64 i = 0; i < list.size(); i++) printf("%s%s\n", indent, list[i].dump().c_str());
  };
  const Json result = Json::parse(json, "result");
  if (result.is_array()) return print_entries(result, "");
  for (const string& key : result.keys()) {
    const Json value = result[key];
    printf("%s:%s\n", key.c_str(), value.is_array() ? "" : (" " + value.dump()).c_str());
    if (value.is_array()) print_entries(value, "  ");
  }
}

}
