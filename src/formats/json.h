// JSON from outside, read strictly: depth and string length are limited, a key given twice is an
// error, and every error names the file, the field or byte, and what was expected.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "core/error.h"

namespace krait {

inline constexpr int kMaxJsonDepth = 64;
inline constexpr size_t kMaxJsonString = size_t{16} << 20;  // bytes of one string, as written
inline constexpr size_t kMaxJsonFile = size_t{128} << 20;   // of a file read into a tree

// where: the file (or field) that the text came from, for messages. Throws Error.
nlohmann::json parse_json(std::string_view text, const std::string& where);
nlohmann::json parse_json_file(const std::filesystem::path& path);

// A member of an object. Missing, null, or of the wrong type or range: Error at "where: key". A
// whole number must be written as one (3, not 3.0). A number must be finite.
const nlohmann::json& get_field(const nlohmann::json& object, const std::string& key,
                                const std::string& where);
int64_t get_int(const nlohmann::json& object, const std::string& key, const std::string& where,
                int64_t min = std::numeric_limits<int64_t>::min(),
                int64_t max = std::numeric_limits<int64_t>::max());
double get_number(const nlohmann::json& object, const std::string& key, const std::string& where);
bool get_bool(const nlohmann::json& object, const std::string& key, const std::string& where);
std::string get_string(const nlohmann::json& object, const std::string& key,
                       const std::string& where);
const nlohmann::json& get_object(const nlohmann::json& object, const std::string& key,
                                 const std::string& where);
const nlohmann::json& get_array(const nlohmann::json& object, const std::string& key,
                                const std::string& where);
// Whether the key is there with a value other than null: for members that may be left out.
bool has_field(const nlohmann::json& object, const std::string& key, const std::string& where);

// Events of a JSON text that is read without building a tree (memory then stays in proportion to
// what the handler keeps). Every event that a handler does not override is refused.
class JsonEvents : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit JsonEvents(std::string where) : where_(std::move(where)) {}
  const std::string& where() const { return where_; }

  bool null() override { unexpected("null"); }
  bool boolean(bool value) override { unexpected(value ? "true" : "false"); }
  bool number_integer(int64_t value) override { unexpected(std::to_string(value)); }
  bool number_unsigned(uint64_t value) override { unexpected(std::to_string(value)); }
  bool number_float(double, const std::string& text) override { unexpected(text.substr(0, 40)); }
  bool string(std::string& value) override { unexpected(in_quotes(value)); }
  bool binary(nlohmann::json::binary_t&) override { unexpected("bytes"); }
  bool start_object(size_t) override { unexpected("an object"); }
  bool key(std::string& name) override { unexpected("key " + in_quotes(name)); }
  bool end_object() override { unexpected("}"); }
  bool start_array(size_t) override { unexpected("an array"); }
  bool end_array() override { unexpected("]"); }
  bool parse_error(size_t position, const std::string& token,
                   const nlohmann::detail::exception& error) final;

 protected:
  virtual std::string field()
      const = 0;  // where in the document the reader stands: `tensor "x": shape`
  virtual std::string expected() const = 0;  // what may come next
  [[noreturn]] void unexpected(const std::string& got) const;
  std::string at_field() const;

 private:
  std::string where_;
};

void parse_json_events(std::string_view text, JsonEvents& events);

}  // namespace krait
