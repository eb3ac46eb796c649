// json: reading JSON, and writing it in a given order.
#pragma once
#include <concepts>
#include <memory>

#include "core/check.h"

namespace pith {

string read_text_file(const string& path);

// A value of a parsed document. Errors (exit code 2) name the file and the full key.
class Json {
 public:
  static Json parse(const string& text, const string& place);
  static Json parse_file(const string& path);

  bool is_null() const;
  bool is_object() const;
  bool is_array() const;
  bool is_int() const;  // written as an integer

  bool has(const string& key) const;
  Json operator[](const string& key) const;
  Json operator[](i64 index) const;
  i64 size() const;
  vector<string> keys() const;  // sorted

  i64 as_int(i64 min = INT64_MIN, i64 max = INT64_MAX) const;
  double as_double() const;
  string as_string() const;
  bool as_bool() const;
  vector<i64> as_ints() const;

  // `v` where it is absent or null.
  i64 int_or(const string& key, i64 v) const { return set(key) ? (*this)[key].as_int() : v; }
  double double_or(const string& key, double v) const {
    return set(key) ? (*this)[key].as_double() : v;
  }
  string string_or(const string& key, const string& v) const {
    return set(key) ? (*this)[key].as_string() : v;
  }
  bool bool_or(const string& key, bool v) const { return set(key) ? (*this)[key].as_bool() : v; }

  string dump(int indent = -1) const;
  const string& place() const { return place_; }

 private:
  bool set(const string& key) const { return has(key) && !(*this)[key].is_null(); }
  Json child(const void* node, const string& place) const;
  [[noreturn]] void wrong_type(const char* need) const;
  std::shared_ptr<const void> node_;
  string place_;
  const char* separator_ = ": ";
};

// w.object().key("step").value(3).key("loss").value(2.5).end(); NaN and Inf are null.
class JsonWriter {
 public:
  explicit JsonWriter(int indent = -1) : indent_(indent) {}
  JsonWriter& object() { return open('{', '}'); }
  JsonWriter& array() { return open('[', ']'); }
  JsonWriter& end();
  JsonWriter& key(const string& name);
  JsonWriter& value(double number);
  JsonWriter& value(std::integral auto number) { return raw(std::to_string(number)); }
  JsonWriter& value(bool flag) { return raw(flag ? "true" : "false"); }
  JsonWriter& value(const string& text);
  JsonWriter& value(const char* text) { return value(string(text)); }
  JsonWriter& null() { return raw("null"); }
  JsonWriter& raw(const string& json);
  const string& str() const;

 private:
  JsonWriter& open(char begin, char end);
  bool opened() const { return out_.back() == '{' || out_.back() == '['; }
  void new_line();
  string out_, closers_;
  int indent_;
};

}
