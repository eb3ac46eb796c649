#include "core/json.h"

#include <cerrno>
#include <nlohmann/json.hpp>

namespace pith {

using Value = nlohmann::json;

static const Value& value_of(const std::shared_ptr<const void>& node) {
  static const Value null;
  return node ? *static_cast<const Value*>(node.get()) : null;
}

static string dumped(const Value& value, int indent = -1) {
  return value.dump(indent, ' ', false, Value::error_handler_t::replace);
}

string read_text_file(const string& path) {
  string all, block(65536, '\0');
  FILE* file = fopen(path.c_str(), "rb");
  for (size_t n = 1; file && n > 0; all.append(block, 0, n))
    n = fread(block.data(), 1, block.size(), file);
  bool good = file && !ferror(file);
  int error = errno;
  if (file) fclose(file);
  if (!good)
    bad_input(path, text("cannot be %s (%s)", file ? "read" : "opened", strerror(error)),
        "check the path and its permissions");
  return all;
}

Json Json::parse(const string& text_in, const string& place) {
  if (text_in.find_first_not_of(" \t\r\n") == string::npos)
    bad_input(place, "is empty (need JSON)", "fetch the file again");
  try {
    return {std::make_shared<const Value>(Value::parse(text_in)), place, ": "};
  } catch (const Value::exception& error) {
    string why = error.what();
    bad_input(place, "is not valid JSON: " + why.substr(why.find("] ") + 2),
        "correct it there, or fetch the file again");
  }
}

Json Json::parse_file(const string& path) { return parse(read_text_file(path), path); }

string_view Json::type() const { return value_of(node_).type_name(); }

void Json::need(bool right, const char* what) const {
  if (right) return;
  string got = dump();
  if (got.size() > 60) got = got.substr(0, 57) + "...";
  const char* article = is_array() || is_object() ? "an " : is_null() ? "" : "a ";
  bad_input(place_, text("is %s%s (got %s, need %s)", article, type().data(), got.c_str(), what),
      "correct the value");
}

bool Json::has(const string& key) const { return is_object() && value_of(node_).contains(key); }

Json Json::operator[](const string& key) const {
  need(is_object(), "an object");
  string place = place_ + separator_ + key;
  if (!has(key)) bad_input(place, "is missing", "add the key");
  return {{node_, &value_of(node_)[key]}, place, "."};
}

Json Json::operator[](i64 index) const {
  need(is_array(), "an array");
  if (index < 0 || index >= size())
    bad_input(place_, text("has too few elements (got %ld, need element %ld)", size(), index),
        "add the element");
  return {{node_, &value_of(node_)[size_t(index)]}, place_ + text("[%ld]", index), "."};
}

i64 Json::size() const {
  need(is_array() || is_object(), "an array or an object");
  return i64(value_of(node_).size());
}

vector<string> Json::keys() const {
  need(is_object(), "an object");
  vector<string> names;
  for (const auto& item : value_of(node_).items()) names.push_back(item.key());
  return names;
}

i64 Json::as_int(i64 min, i64 max) const {
  const Value& v = value_of(node_);
  need(!v.is_number_unsigned() || v.get<u64>() <= u64(INT64_MAX), "a whole number below 2^63");
  double exact = is_number() ? v.get<double>() : NAN;
  need(v.is_number_integer() || (std::fabs(exact) <= 0x1p53 && exact == std::floor(exact)),
      "a whole number");
  i64 number = v.get<i64>();
  if (number < min || number > max)
    bad_input(place_,
        text("is out of range (got %ld, need at least %ld", number, min) +
            (max < INT64_MAX ? text(" and at most %ld)", max) : ")"),
        "correct the value");
  return number;
}

double Json::as_double() const {
  need(is_number(), "a number");
  return value_of(node_).get<double>();
}

string Json::as_string() const {
  need(type() == "string", "a string");
  return value_of(node_).get<string>();
}

bool Json::as_bool() const {
  need(type() == "boolean", "true or false");
  return value_of(node_).get<bool>();
}

vector<i64> Json::as_ints() const {
  vector<i64> all;
  for (i64 i = 0; i < size(); i++) all.push_back((*this)[i].as_int());
  return all;
}

string Json::dump(int indent) const { return dumped(value_of(node_), indent); }

JsonWriter& JsonWriter::open(const char* brackets) {
  closers_ += brackets[1];
  return raw(string(brackets, 1));
}

JsonWriter& JsonWriter::end() {
  out_ += closers_.back();
  closers_.pop_back();
  return *this;
}

JsonWriter& JsonWriter::key(const string& name) {
  value(name);
  out_ += ": ";
  return *this;
}

JsonWriter& JsonWriter::value(double number) { return raw(dumped(number)); }
JsonWriter& JsonWriter::value(const string& text_in) { return raw(dumped(text_in)); }

JsonWriter& JsonWriter::raw(const string& json) {
  if (!out_.empty() && !strchr("{[ ", out_.back())) out_ += ", ";
  out_ += json;
  return *this;
}

}
