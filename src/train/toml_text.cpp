#include "train/toml_text.h"

#include <charconv>

#include "core/error.h"

namespace krait {
namespace {

template <class T>
std::string list_text(const std::vector<T>& list) {
  std::string s = "[";
  for (const T& x : list) s.append(s.size() > 1 ? ", " : "").append(toml_text(x));
  return s + "]";
}

}  // namespace

std::string toml_text(bool x) { return x ? "true" : "false"; }
std::string toml_text(int64_t x) { return std::to_string(x); }

std::string toml_text(double x) {
  char text[32];
  const auto end = std::to_chars(text, text + sizeof text, x).ptr;
  std::string s(text, end);
  if (s.find_first_of(".en") == std::string::npos)
    s += ".0";  // TOML: a float has a point or an exponent
  return s;
}

std::string toml_text(std::string_view text) {
  std::string s = "\"";
  for (const char c : text) {
    const auto u = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      s += {'\\', c};
    } else if (c == '\n') {
      s += "\\n";
    } else if (c == '\t') {
      s += "\\t";
    } else if (u < 0x20 || u == 0x7f) {
      constexpr char kHex[] = "0123456789abcdef";
      s += std::string("\\u00") + kHex[u >> 4] + kHex[u & 15];
    } else {
      s += c;
    }
  }
  return s + "\"";
}

std::string toml_text(const std::vector<std::string>& list) { return list_text(list); }
std::string toml_text(const std::vector<int64_t>& list) { return list_text(list); }

toml::table parse_toml(std::string_view text, const std::string& source) {
  try {
    return toml::parse(text);
  } catch (const toml::parse_error& e) {
    throw Error("not valid TOML: " + std::string(e.description()),
                source + ", line " + std::to_string(e.source().begin.line));
  }
}

}  // namespace krait
