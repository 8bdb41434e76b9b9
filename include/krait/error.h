#pragma once

#include <stdexcept>
#include <string>

namespace krait {

// What goes wrong because of the world outside: files, options, requests. what() is one line that
// says where it happened, what failed, what was expected and what was found.
class Error : public std::runtime_error {
 public:
  // what: the failure in a few words. where: the file, field or option it concerns. expected, got:
  // may be empty.
  explicit Error(const std::string& what, const std::string& where = {},
                 const std::string& expected = {}, const std::string& got = {});

  const std::string& where() const { return where_; }
  const std::string& expected() const { return expected_; }
  const std::string& got() const { return got_; }

 private:
  std::string where_, expected_, got_;
};

}  // namespace krait
