#pragma once
#include <concepts>
#include <memory>

#include "core/check.h"

namespace pith {

string read_text_file(const string& path);

// Errors (exit code 2) name the file and the full key.
class Json {
 public:
  Json() = default;
  static Json parse(const string& text, const string& place);
  static Json parse_file(const string& path);

  // "null", "object", "array", "string", "boolean" or "number".
  string_view type() const;
  bool is_null() const { return type() == "null"; }
  bool is_object() const { return type() == "object"; }
  bool is_array() const { return type() == "array"; }
  bool is_number() const { return type() == "number"; }

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
  Json(std::shared_ptr<const void> node, const string& place, const char* separator)
      : node_(std::move(node)), place_(place), separator_(separator) {}
  bool set(const string& key) const { return has(key) && !(*this)[key].is_null(); }
  void need(bool right, const char* what) const;
  std::shared_ptr<const void> node_;
  string place_;
  const char* separator_ = "";
};

// w.object().key("a").value(1).members("b", 2, "c", true).end(); NaN, Inf: null.
class JsonWriter {
 public:
  JsonWriter& object() { return open("{}"); }
  JsonWriter& array() { return open("[]"); }
  JsonWriter& end();
  JsonWriter& key(const string& name);
  JsonWriter& value(double number);
  JsonWriter& value(std::integral auto number) { return raw(std::to_string(number)); }
  JsonWriter& value(bool flag) { return raw(flag ? "true" : "false"); }
  JsonWriter& value(const string& text);
  JsonWriter& value(const char* text) { return value(string(text)); }
  template <class T>
  JsonWriter& value(const vector<T>& list) {
    array();
    for (const T& item : list) value(item);
    return end();
  }
  JsonWriter& members() { return *this; }
  JsonWriter& members(const string& name, const auto& first, const auto&... more) {
    return key(name).value(first).members(more...);
  }
  JsonWriter& raw(const string& json);
  const string& str() const { return out_; }

 private:
  JsonWriter& open(const char* brackets);
  string out_, closers_;
};

}
