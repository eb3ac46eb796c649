#include "core/json.h"
#include "helpers.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

namespace pith {

static void expect_error(const char* json, const char* part, auto&& action) {
  const std::string got = error_of([&] { action(Json::parse(json, "config.json")); });
  EXPECT_NE(got.find(part), std::string::npos)
      << json << "\n  got:  " << got << "\n  need: " << part;
}

TEST(Json, ReadsValues) {
  const Json j = Json::parse(
      R"({"a": 3, "b": 2.5, "c": "x", "d": true, "e": null, "f": [1, 2, 3], "g": {"h": 1e6},
            "i": 10000.0, "big": 9223372036854775807})",
      "p");
  EXPECT_EQ(j["a"].as_int(), 3);
  EXPECT_EQ(j["a"].as_double(), 3.0);
  EXPECT_EQ(j["b"].as_double(), 2.5);
  EXPECT_EQ(j["c"].as_string(), "x");
  EXPECT_TRUE(j["d"].as_bool());
  EXPECT_TRUE(j["e"].is_null());
  EXPECT_EQ(j["f"].as_ints(), (std::vector<int64_t>{1, 2, 3}));
  EXPECT_EQ(j["f"][0].as_int(), 1);
  EXPECT_EQ(j["g"]["h"].as_int(), 1000000);
  EXPECT_EQ(j["i"].as_int(), 10000);
  EXPECT_EQ(j["i"].dump(), "10000.0");
  EXPECT_EQ(j["big"].as_int(), INT64_MAX);
  EXPECT_EQ(j.keys().size(), 9u);
  EXPECT_EQ(j.int_or("e", 7), 7);  // null is as good as absent
  EXPECT_EQ(j.int_or("none", 7), 7);
  EXPECT_EQ(j.int_or("a", 7), 3);
  EXPECT_EQ(j.double_or("a", 7), 3.0);
  EXPECT_EQ(j.string_or("none", "z"), "z");
  EXPECT_FALSE(j.bool_or("none", false));
  EXPECT_TRUE(Json().is_null());
}

TEST(Json, ValuesOutliveTheirParents) {
  Json child;
  {
    const Json j = Json::parse(R"({"a": {"b": [10, 20]}})", "p");
    child = j["a"]["b"];
  }
  EXPECT_EQ(child[1].as_int(), 20);
  EXPECT_EQ(child.place(), "p: a.b");
}

TEST(Json, ErrorsNameFileAndKey) {
  struct {
    const char* json;
    void (*action)(const Json&);
    const char* error;
  } cases[] = {
      {R"({"rope_scaling": {"factor": "x"}})",
          [](const Json& j) { j["rope_scaling"]["factor"].as_double(); },
          "config.json: rope_scaling.factor: is a string (got \"x\", need a number). Try: "},
      {R"({"a": [1, {"b": 1.5}]})", [](const Json& j) { j["a"][1]["b"].as_int(); },
          "config.json: a[1].b: is a number (got 1.5, need a whole number)"},
      {R"({"a": {}})", [](const Json& j) { j["a"]["b"]; }, "config.json: a.b: is missing"},
      {R"({"a": [1]})", [](const Json& j) { j["a"][1]; },
          "config.json: a: has too few elements (got 1, need element 1)"},
      {R"({"a": 1})", [](const Json& j) { j["a"]["b"]; },
          "config.json: a: is a number (got 1, need an object)"},
      {R"({"a": 0})", [](const Json& j) { j["a"].as_int(1, 8); },
          "config.json: a: is out of range (got 0, need at least 1 and at most 8)"},
      {R"({"a": -1})", [](const Json& j) { j["a"].as_int(0); },
          "config.json: a: is out of range (got -1, need at least 0)"},
      {R"({"a": 18446744073709551615})", [](const Json& j) { j["a"].as_int(); },
          "need a whole number below 2^63"},
      {R"({"a": "yes"})", [](const Json& j) { j.bool_or("a", false); },
          "config.json: a: is a string (got \"yes\", need true or false)"},
      {R"({"a": null})", [](const Json& j) { j["a"].as_string(); },
          "config.json: a: is null (got null, need a string)"},
      {R"([])", [](const Json& j) { j.keys(); },
          "config.json: is an array (got [], need an object)"},
  };
  for (const auto& c : cases) expect_error(c.json, c.error, c.action);
}

TEST(Json, MalformedTextIsLocated) {
  struct {
    const char* json;
    const char* error;
  } cases[] = {
      {"", "config.json: is empty"},
      {" \n", "config.json: is empty"},
      {"{\n \"a\": 1,\n \"b\": }", "is not valid JSON: parse error at line 3, column 7: "},
      {"{\"a\": [1, 2",
          "line 1, column 12: syntax error while parsing array - unexpected end of input"},
      {"{\"a\": 1} x", "is not valid JSON: parse error at line 1, column 10"},
      {"{\"a\": 1e999}", "is not valid JSON"},
      {"{\"a\": \"\xff\"}", "is not valid JSON: parse error at line 1"},
      {"{\"a\": NaN}", "is not valid JSON: parse error at line 1, column"},
  };
  for (const auto& c : cases) expect_error(c.json, c.error, [](const Json&) {});
  EXPECT_EQ(Json::parse(R"([{"a": 1}, {"a": 2}])", "p").size(), 2);  // no duplicate
  EXPECT_NE(error_of([] { Json::parse_file("/no/such.json"); }).find("/no/such.json: cannot be"),
      std::string::npos);
  EXPECT_NE(error_of([] { Json::parse_file("/tmp"); }).find("/tmp: cannot be"), std::string::npos);
}

TEST(JsonWriter, WritesInOrder) {
  JsonWriter w;
  w.object().members("z", 1).key("a").array().value(1.5).value("q\"\n").value(true).end();
  w.key("e").object().end().members("l", std::vector<int>{1, 2}, "n", size_t{18}).end();
  EXPECT_EQ(w.str(), R"({"z": 1, "a": [1.5, "q\"\n", true], "e": {}, "l": [1, 2], "n": 18})");
}

TEST(JsonWriter, NumbersKeepTheirBits) {
  for (const double number : {0.1, 1.0, -0.0, 1e300, 5e-324, 1.0 / 3, 123456789.0, 1e22, 3e-4}) {
    const std::string json = JsonWriter().value(number).str();
    const double back = Json::parse(json, "p").as_double();
    EXPECT_EQ(memcmp(&back, &number, 8), 0) << json;
    EXPECT_NE(json.find_first_of(".e"), std::string::npos) << json;
  }
  EXPECT_EQ(JsonWriter().value(0.1).str(), "0.1");
  EXPECT_EQ(JsonWriter().value(static_cast<double>(NAN)).str(), "null");
  EXPECT_EQ(JsonWriter().value(static_cast<double>(INFINITY)).str(), "null");
  EXPECT_EQ(JsonWriter().value(int64_t{INT64_MIN}).str(), "-9223372036854775808");
}

TEST(Json, DumpsWhatItRead) {
  const std::string once = Json::parse(R"({"b": [1, 2.5, "x"], "a": null})", "p").dump();
  EXPECT_EQ(once, R"({"a":null,"b":[1,2.5,"x"]})");
  EXPECT_EQ(Json::parse(once, "p").dump(), once);
}

}  // namespace pith
