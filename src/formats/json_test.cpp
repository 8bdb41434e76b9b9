#include "formats/json.h"

#include <gtest/gtest.h>

#include "core/mapped_file.h"
#include "formats/test_files.h"

namespace krait {
namespace {

using test::error_of;

TEST(Json, ReadsAFile) {
  test::TemporaryFolder folder;
  write_file_atomic(folder.path / "a.json", R"({"a": [1, 2.5, "x"], "b": {"a": null}})");
  const nlohmann::json j = parse_json_file(folder.path / "a.json");
  EXPECT_EQ(j["a"][1], 2.5);
  EXPECT_TRUE(j["b"]["a"].is_null());
}

TEST(Json, BadTextNamesFileAndByte) {
  const std::pair<std::string, std::string> cases[] = {
      {"", "not valid JSON"},
      {"{", "f.json: byte 2: not valid JSON"},
      {"[1, 2", "f.json: byte 6"},
      {"{\"a\": 1,}", "f.json: byte 9"},
      {"[NaN]", "f.json: byte 2"},
      {"[1e999]", "not valid JSON: number overflow"},
      {"[1] x", "f.json: byte 5"},
      {"\"\xff\"", "not valid JSON"},
      {"\"\\ud800\"", "not valid JSON"},
      {R"({"a":1,"b":2,"a":3})", "f.json: byte 16: \"a\": key given twice"},
      {R"([{"a":{"b":1,"b":1}}])", "\"b\": key given twice"},
      {R"({"a":1,"\u0061":3})", "\"a\": key given twice"},
      {std::string(65, '['), "f.json: byte 64: JSON nested too deeply; expected at most 64 levels"},
      {std::string(1 << 20, '['), "nested too deeply"},
      {"\"" + std::string(kMaxJsonString + 1, 'x') + "\"", "JSON string too long"},
      {"\"" + std::string(kMaxJsonString + 1, 'x'), "JSON string too long"},
  };
  for (const auto& [text, expected] : cases) {
    const std::string error = error_of([&, &text = text] { parse_json(text, "f.json"); });
    EXPECT_NE(error.find(expected), std::string::npos) << text.substr(0, 80) << "\n" << error;
    EXPECT_LT(error.size(), 300u);
  }
}

TEST(Json, TheDeepestAllowedNestingIsRead) {
  EXPECT_NO_THROW(parse_json(std::string(64, '[') + std::string(64, ']'), "f"));
  EXPECT_NO_THROW(parse_json("[\"" + std::string(100, '[') + "\\\"[[[\"]", "f"));  // not nesting
}

TEST(Json, KeysMayRepeatInDifferentObjects) {
  EXPECT_NO_THROW(parse_json(R"([{"a":{"a":1}},{"a":2}])", "f"));
}

TEST(Json, GettersNameFileFieldAndFinding) {
  const nlohmann::json j = parse_json(
      R"({"i": -3, "f": 2.5, "w": 3.0, "b": true, "s": "x\n", "n": null, "big": 18446744073709551615,
          "o": {}, "a": [], "huge": 1e300})",
      "f.json");
  EXPECT_EQ(get_int(j, "i", "f.json"), -3);
  EXPECT_EQ(get_number(j, "f", "f.json"), 2.5);
  EXPECT_EQ(get_number(j, "i", "f.json"), -3.0);
  EXPECT_TRUE(get_bool(j, "b", "f.json"));
  EXPECT_EQ(get_string(j, "s", "f.json"), "x\n");
  EXPECT_TRUE(get_object(j, "o", "f.json").empty());
  EXPECT_TRUE(get_array(j, "a", "f.json").empty());
  EXPECT_FALSE(has_field(j, "n", "f.json"));
  EXPECT_FALSE(has_field(j, "zz", "f.json"));
  EXPECT_TRUE(has_field(j, "i", "f.json"));

  const auto expect = [](const std::string& error, const char* text) { EXPECT_EQ(error, text); };
  expect(error_of([&] { get_int(j, "zz", "f.json"); }), "f.json: zz: field missing");
  expect(error_of([&] { get_int(j, "n", "f.json"); }), "f.json: n: field missing");
  expect(error_of([&] { get_int(j, "w", "f.json"); }),
         "f.json: w: wrong type; expected a whole number, got the number 3.0");
  expect(error_of([&] { get_int(j, "i", "f.json", 0, 9); }),
         "f.json: i: number out of range; expected 0 to 9, got -3");
  expect(error_of([&] { get_int(j, "big", "f.json", 0); }),
         "f.json: big: number out of range; expected 0 to 9223372036854775807, got "
         "18446744073709551615");
  expect(error_of([&] { get_number(j, "b", "f.json"); }),
         "f.json: b: wrong type; expected a finite number, got true");
  expect(error_of([&] { get_bool(j, "i", "f.json"); }),
         "f.json: i: wrong type; expected true or false, got the whole number -3");
  expect(error_of([&] { get_string(j, "o", "f.json"); }),
         "f.json: o: wrong type; expected a string, got an object");
  expect(error_of([&] { get_object(j, "s", "f.json"); }),
         "f.json: s: wrong type; expected an object, got the string \"x\\x0a\"");
  expect(error_of([&] { get_array(j, "f", "f.json"); }),
         "f.json: f: wrong type; expected an array, got the number 2.5");
  expect(error_of([&] { get_int(j["a"], "x", "f.json"); }),
         "f.json: wrong type; expected an object, got an array");
}

TEST(Json, QuotesForeignText) {
  EXPECT_EQ(in_quotes("a\"\x1b[2J\xc3"), "\"a\\\"\\x1b[2J\\xc3\"");
  EXPECT_EQ(in_quotes(std::string(100, 'x'), 3), "\"xxx...\"");
}

}  // namespace
}  // namespace krait
