#include "core/error.h"

namespace krait {
namespace {

std::string compose(const std::string& what, const std::string& where, const std::string& expected,
                    const std::string& got) {
  std::string line = where.empty() ? what : where + ": " + what;
  if (!expected.empty()) line += "; expected " + expected;
  if (!got.empty()) line += (expected.empty() ? "; got " : ", got ") + got;
  return line;
}

}  // namespace

Error::Error(const std::string& what, const std::string& where, const std::string& expected,
             const std::string& got)
    : std::runtime_error(compose(what, where, expected, got)),
      where_(where),
      expected_(expected),
      got_(got) {}

void check_failed(const char* condition, const char* file, int line, const std::string& message) {
  throw CheckFailure(std::string(file) + ":" + std::to_string(line) + ": check failed: " +
                     condition + (message.empty() ? "" : " (" + message + ")"));
}

std::string in_quotes(std::string_view text, size_t limit) {
  static constexpr char kHex[] = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : text.substr(0, limit)) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (byte >= 0x20 && byte < 0x7f) {
      out += c;
    } else {
      out += "\\x";
      out += kHex[byte >> 4];
      out += kHex[byte & 15];
    }
  }
  return out + (text.size() > limit ? "...\"" : "\"");
}

}  // namespace krait
