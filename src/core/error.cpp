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

}  // namespace krait
