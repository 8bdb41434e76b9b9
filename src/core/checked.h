// Arithmetic on numbers that come from files: overflow is an Error, never a wrapped value.
#pragma once

#include <cstdint>
#include <string>

#include "core/error.h"

namespace krait {

inline uint64_t checked_add(uint64_t a, uint64_t b, const std::string& where) {
  uint64_t r;
  if (__builtin_add_overflow(a, b, &r)) throw Error("number too large", where);
  return r;
}

inline uint64_t checked_mul(uint64_t a, uint64_t b, const std::string& where) {
  uint64_t r;
  if (__builtin_mul_overflow(a, b, &r)) throw Error("number too large", where);
  return r;
}

}  // namespace krait
