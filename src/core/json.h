// json: reading JSON with errors that name the file and the key, and writing it in a given order.
#pragma once
#include <concepts>
#include <memory>

#include "core/check.h"

namespace pith {

// The whole file. Exit code 2, naming the path, if it cannot be read.
string read_text_file(const string& path);

// A value inside a parsed document, which lives as long as any copy. A default Json is null. Errors
// (exit code 2) name the file and the full key: "config.json: rope_scaling.factor: is a string
// (got "x", need a number)".
class Json {
 public:
  // `place` is the file's name in errors. Refuses malformed text (with line and column) and a key
  // that occurs twice in one object.
  static Json parse(const string& text, const string& place);
  static Json parse_file(const string& path);

  bool is_null() const;
  bool is_object() const;
  bool is_array() const;
  bool is_int() const;  // written as an integer

  // Object members and array elements. A missing one is an error; has() asks first.
  bool has(const string& key) const;
  Json operator[](const string& key) const;
  Json operator[](int64_t index) const;
  int64_t size() const;         // of an array or object
  vector<string> keys() const;  // of an object, sorted

  // A number with a whole value in [min, max].
  int64_t as_int(int64_t min = INT64_MIN, int64_t max = INT64_MAX) const;
  double as_double() const;
  string as_string() const;
  bool as_bool() const;
  vector<int64_t> as_ints() const;

  // The member `key` of an object, or `value` where it is absent or null.
  int64_t int_or(const string& key, int64_t value) const;
  double double_or(const string& key, double value) const;
  string string_or(const string& key, const string& value) const;
  bool bool_or(const string& key, bool value) const;

  // The value as JSON text with sorted keys; indent -1 is one line.
  string dump(int indent = -1) const;
  // "config.json: rope_scaling.factor": the `place` for an error about this value.
  const string& place() const { return place_; }

 private:
  Json member(const string& key) const;  // or null
  [[noreturn]] void wrong_type(const char* need) const;
  std::shared_ptr<const void> node_;  // in the JSON library's form; keeps the document
  string place_;
  const char* separator_ = ": ";  // between place_ and a member's key
};

// Writes JSON text piece by piece, keys in the order given:
//   JsonWriter w(2);
//   w.object().key("step").value(3).key("loss").value(2.5).end();
// Doubles are the shortest text that reads back to the same bits; NaN and Inf are written as null.
class JsonWriter {
 public:
  explicit JsonWriter(int indent = -1) : indent_(indent) {}
  JsonWriter& object() { return open('{', '}'); }
  JsonWriter& array() { return open('[', ']'); }
  JsonWriter& end();  // of the innermost object or array
  JsonWriter& key(const string& name);
  JsonWriter& value(double number);
  JsonWriter& value(std::integral auto number) { return raw(std::to_string(number)); }
  JsonWriter& value(bool flag) { return raw(flag ? "true" : "false"); }
  JsonWriter& value(const string& text);
  JsonWriter& value(const char* text) { return value(string(text)); }
  JsonWriter& null() { return raw("null"); }
  JsonWriter& raw(const string& json);  // text that is JSON already
  // The finished text; every object and array must have ended.
  const string& str() const;

 private:
  JsonWriter& open(char begin, char end);
  void new_line();
  string out_, closers_;
  int indent_;
  bool first_ = true, after_key_ = false;
};

}  // namespace pith
