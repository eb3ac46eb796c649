// json: reading JSON with errors that name the file and the key, and writing it in a given order.
#pragma once
#include <concepts>
#include <memory>

#include "core/check.h"

namespace pith {

// Exit code 2 if it cannot be read.
string read_text_file(const string& path);

// A value inside a parsed document, which it keeps alive. A default Json is null. Errors (exit code
// 2) name the file and the full key: "config.json: rope_scaling.factor: is a string (got ...".
class Json {
 public:
  // `place` is the file's name in errors. Keys that occur twice in an object are refused.
  static Json parse(const string& text, const string& place);
  static Json parse_file(const string& path);

  bool is_null() const;
  bool is_object() const;
  bool is_array() const;
  bool is_int() const;  // written as an integer

  // A missing member or element is an error; has() asks first.
  bool has(const string& key) const;
  Json operator[](const string& key) const;
  Json operator[](int64_t index) const;
  int64_t size() const;
  vector<string> keys() const;  // sorted

  // A number with a whole value in [min, max].
  int64_t as_int(int64_t min = INT64_MIN, int64_t max = INT64_MAX) const;
  double as_double() const;
  string as_string() const;
  bool as_bool() const;
  vector<int64_t> as_ints() const;

  // The member, or `value` where it is absent or null.
  int64_t int_or(const string& key, int64_t value) const {
    return member(key).is_null() ? value : member(key).as_int();
  }
  double double_or(const string& key, double value) const {
    return member(key).is_null() ? value : member(key).as_double();
  }
  string string_or(const string& key, const string& value) const {
    return member(key).is_null() ? value : member(key).as_string();
  }
  bool bool_or(const string& key, bool value) const {
    return member(key).is_null() ? value : member(key).as_bool();
  }

  string dump(int indent = -1) const;             // keys sorted; -1: one line
  const string& place() const { return place_; }  // "config.json: rope_scaling.factor"

 private:
  Json member(const string& key) const { return has(key) ? (*this)[key] : Json(); }
  Json child(const void* node, const string& place) const;
  [[noreturn]] void wrong_type(const char* need) const;
  std::shared_ptr<const void> node_;  // the JSON library's
  string place_;
  const char* separator_ = ": ";  // between place_ and a member's key
};

// Writes JSON in the order given: w.object().key("step").value(3).key("loss").value(2.5).end().
// Doubles read back to the same bits; NaN and Inf are null.
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
  const string& str() const;            // when all has ended

 private:
  JsonWriter& open(char begin, char end);
  void new_line();
  string out_, closers_;
  int indent_;
  bool first_ = true, after_key_ = false;
};

}  // namespace pith
