// Errors. `Error` is for the world outside (files, flags, requests): one line that says what went
// wrong, where, what was expected and what was found. `KRAIT_CHECK` guards our own invariants; it
// is on in release builds.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

#include "krait/error.h"

namespace krait {

// A broken invariant of the library: a bug, not bad input.
class CheckFailure : public std::logic_error {
  using std::logic_error::logic_error;
};

[[noreturn]] void check_failed(const char* condition, const char* file, int line,
                               const std::string& message = {});

// Foreign text as it may stand in a message: in double quotes, control bytes and non-ASCII escaped,
// cut after `limit` bytes.
std::string in_quotes(std::string_view text, size_t limit = 80);

}  // namespace krait

#define KRAIT_CHECK(condition, ...)                                                     \
  do {                                                                                  \
    if (!(condition)) [[unlikely]]                                                      \
      ::krait::check_failed(#condition, __FILE__, __LINE__ __VA_OPT__(, ) __VA_ARGS__); \
  } while (0)
