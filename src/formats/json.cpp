#include "formats/json.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <set>
#include <vector>

#include "core/mapped_file.h"

namespace krait {
namespace {

using nlohmann::json;

std::string at_byte(const std::string& where, size_t byte) {
  return where + ": byte " + std::to_string(byte);
}

// Limits that must hold before the parser proper sees the text. Up to the first syntax error this
// reads brackets and quotes exactly as the parser does; beyond it the parser never comes.
void check_limits(std::string_view text, const std::string& where) {
  int depth = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '[' || c == '{') {
      if (++depth > kMaxJsonDepth)
        throw Error("JSON nested too deeply", at_byte(where, i),
                    "at most " + std::to_string(kMaxJsonDepth) + " levels");
    } else if (c == ']' || c == '}') {
      --depth;
    } else if (c == '"') {
      const size_t begin = i;
      for (++i; i < text.size() && text[i] != '"'; ++i)
        if (text[i] == '\\') ++i;
      if (std::min(i, text.size()) - begin > kMaxJsonString)
        throw Error("JSON string too long", at_byte(where, begin),
                    "at most " + std::to_string(kMaxJsonString) + " bytes");
    }
  }
}

// The parser's own words without its prefix "[json.exception...] ", cut short: they may quote the
// file.
std::string reason(const char* message) {
  std::string_view text = message;
  const size_t prefix = text.find("] ");
  if (prefix != std::string_view::npos) text.remove_prefix(prefix + 2);
  const bool cut = text.size() > 160;
  std::string clean;
  for (const char c : text.substr(0, 160)) clean += c >= 0x20 && c < 0x7f ? c : '?';
  return clean + (cut ? "..." : "");
}

// Walks the text and tells how far the parser has come.
struct CountingIterator {
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = const char&;

  const char* position;
  const char** furthest;

  reference operator*() const { return *position; }
  CountingIterator& operator++() {
    *furthest = ++position;
    return *this;
  }
  CountingIterator operator++(int) {
    const CountingIterator old = *this;
    ++*this;
    return old;
  }
  friend bool operator==(const CountingIterator& a, const CountingIterator& b) {
    return a.position == b.position;
  }
  friend bool operator!=(const CountingIterator& a, const CountingIterator& b) { return !(a == b); }
};

std::string type_of(const json& value) {
  if (value.is_number_integer()) return "the whole number " + value.dump();
  if (value.is_number()) return "the number " + value.dump();
  if (value.is_boolean()) return value.get<bool>() ? "true" : "false";
  if (value.is_string()) return "the string " + in_quotes(value.get_ref<const std::string&>());
  return value.is_null() ? "null" : value.is_array() ? "an array" : "an object";
}

std::string member(const std::string& where, const std::string& key) { return where + ": " + key; }

}  // namespace

json parse_json(std::string_view text, const std::string& where) {
  if (text.size() > kMaxJsonFile)
    throw Error("JSON too large", where, "at most " + std::to_string(kMaxJsonFile) + " bytes",
                std::to_string(text.size()));
  check_limits(text, where);
  const char* furthest = text.data();
  std::vector<std::set<std::string>> keys;  // of the objects that are open
  const auto refuse_duplicates = [&](int, json::parse_event_t event, json& value) {
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key &&
        !keys.back().insert(value.get_ref<const std::string&>()).second)
      throw Error("key given twice", at_byte(where, static_cast<size_t>(furthest - text.data())) +
                                         ": " + in_quotes(value.get_ref<const std::string&>()));
    return true;
  };
  const char* const end = text.data() + text.size();
  try {
    return json::parse(CountingIterator{text.data(), &furthest}, CountingIterator{end, &furthest},
                       refuse_duplicates);
  } catch (const json::parse_error& e) {
    throw Error("not valid JSON: " + reason(e.what()), at_byte(where, e.byte));
  } catch (const json::exception& e) {  // a number beyond double
    throw Error("not valid JSON: " + reason(e.what()),
                at_byte(where, static_cast<size_t>(furthest - text.data())));
  }
}

json parse_json_file(const std::filesystem::path& path) {
  const MappedFile file(path);
  return parse_json(file.text(), path.string());
}

bool has_field(const json& object, const std::string& key, const std::string& where) {
  if (!object.is_object()) throw Error("wrong type", where, "an object", type_of(object));
  const auto found = object.find(key);
  return found != object.end() && !found->is_null();
}

const json& get_field(const json& object, const std::string& key, const std::string& where) {
  if (!has_field(object, key, where)) throw Error("field missing", member(where, key));
  return *object.find(key);
}

int64_t get_int(const json& object, const std::string& key, const std::string& where, int64_t min,
                int64_t max) {
  const json& value = get_field(object, key, where);
  if (!value.is_number_integer())
    throw Error("wrong type", member(where, key), "a whole number", type_of(value));
  const bool fits =
      !value.is_number_unsigned() ||
      value.get<uint64_t>() <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  if (!fits || value.get<int64_t>() < min || value.get<int64_t>() > max)
    throw Error("number out of range", member(where, key),
                std::to_string(min) + " to " + std::to_string(max), value.dump());
  return value.get<int64_t>();
}

double get_number(const json& object, const std::string& key, const std::string& where) {
  const json& value = get_field(object, key, where);
  if (!value.is_number() || !std::isfinite(value.get<double>()))
    throw Error("wrong type", member(where, key), "a finite number", type_of(value));
  return value.get<double>();
}

bool get_bool(const json& object, const std::string& key, const std::string& where) {
  const json& value = get_field(object, key, where);
  if (!value.is_boolean())
    throw Error("wrong type", member(where, key), "true or false", type_of(value));
  return value.get<bool>();
}

std::string get_string(const json& object, const std::string& key, const std::string& where) {
  const json& value = get_field(object, key, where);
  if (!value.is_string()) throw Error("wrong type", member(where, key), "a string", type_of(value));
  return value.get<std::string>();
}

const json& get_object(const json& object, const std::string& key, const std::string& where) {
  const json& value = get_field(object, key, where);
  if (!value.is_object())
    throw Error("wrong type", member(where, key), "an object", type_of(value));
  return value;
}

const json& get_array(const json& object, const std::string& key, const std::string& where) {
  const json& value = get_field(object, key, where);
  if (!value.is_array()) throw Error("wrong type", member(where, key), "an array", type_of(value));
  return value;
}

bool JsonEvents::parse_error(size_t position, const std::string&,
                             const nlohmann::detail::exception& error) {
  throw Error("not valid JSON: " + reason(error.what()), at_byte(where_, position));
}

std::string JsonEvents::at_field() const {
  const std::string name = field();
  return name.empty() ? where_ : where_ + ": " + name;
}

void JsonEvents::unexpected(const std::string& got) const {
  throw Error("unexpected content", at_field(), expected(), got);
}

void parse_json_events(std::string_view text, JsonEvents& events) {
  check_limits(text, events.where());
  json::sax_parse(text.begin(), text.end(), &events);
}

}  // namespace krait
