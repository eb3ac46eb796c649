#pragma once
#include <limits>

#include "engine/checkpoint.h"
#include "engine/config.h"
#include "engine/evaluate.h"

namespace CLI {
class App;
}

namespace pith {

struct Tokenizer;

// argv[0] is the command's name. Each returns the exit code.
int run_train(int argc, char** argv);
int run_tokenize(int argc, char** argv);
int run_corpus(int argc, char** argv);
int run_eval(int argc, char** argv);
int run_generate(int argc, char** argv);
int run_convert(int argc, char** argv);
int run_checkpoint(int argc, char** argv);
int run_plan(int argc, char** argv);
int run_bench(int argc, char** argv);  // in bench/
int run_doctor(int argc, char** argv);

// Values are bound by reference and hold the defaults. A name without dashes is a required
// positional.
class Arguments {
 public:
  explicit Arguments(const string& command);
  ~Arguments();

  void option(const string& name, string& value, const string& about);
  template <class T>  // i64 or double
  void option(const string& name, T& value, const string& about,
      std::type_identity_t<T> min = std::numeric_limits<T>::lowest(),
      std::type_identity_t<T> max = std::numeric_limits<T>::max());
  void choice(
      const string& name, string& value, const vector<string>& choices, const string& about);
  // "--set a=1 --set b=2"; with separator ',' also "a,b", with ' ' also "a b".
  void list(const string& name, vector<string>& values, const string& about, char separator = 0);
  void flag(const string& name, bool& value, const string& about);
  // False when --help was printed. Exit code 2 for a wrong command line.
  bool parse(int argc, char** argv);

 private:
  std::unique_ptr<CLI::App> app_;
};

// Of JSON; else a member a line, and of a list an entry a line.
void print_result(const string& json, bool as_json);

// F32, by Hugging Face name.
vector<TensorDecl> declarations(const ParameterTable& table);

struct ModelFolder {
  Checkpoint weights;
  Json config;
  ParameterTable table;
  ModelShape shape;
  std::optional<RunConfig> run;  // that the model comes from, if known
};
// A run folder, a checkpoint or a Hugging Face folder; checks weights. Exit code 2.
ModelFolder open_model(const string& folder);

// `path`, or tokenizer.json in it.
string tokenizer_file(const string& path);
// Of the file or folder `named`, else of the first of `places` in or above which there is one.
Tokenizer open_tokenizer(const string& named, const vector<string>& places);

// Bits a byte of held-out text for each nat a label; 0 without a tokenizer.
double bits_a_byte(const Dataset& data, const string& data_path);

}
