// UTF-8, strictly: no surrogates, no overlong forms, nothing above U+10FFFF (Unicode 15, table
// 3-7).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace krait {

struct Utf8Char {
  int32_t code_point;  // -1: the bytes are no character
  uint32_t size;    // bytes of the character, or of the ill-formed start to step over (its "maximal
                    // subpart")
  bool incomplete;  // no character yet, but more bytes could make it one

  bool valid() const { return code_point >= 0; }
};

// The first character of `text`, which must not be empty.
Utf8Char first_utf8(std::string_view text);

// Bytes at the front of `text` that are well-formed UTF-8.
size_t valid_utf8_prefix(std::string_view text);

void append_utf8(std::string& out, uint32_t code_point);

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";  // U+FFFD

}  // namespace krait
