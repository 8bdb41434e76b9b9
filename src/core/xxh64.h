// XXH64 with seed 0 (Yann Collet, https://github.com/Cyan4973/xxHash, doc/xxhash_spec.md): 64 bits
// of any bytes at the speed of memory. It finds damage and tells models apart; it is no defence
// against somebody who wants two inputs to look the same.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace krait {

class Xxh64 {
 public:
  Xxh64();

  // Bytes in any pieces give what they give at once.
  void update(const void* data, size_t bytes);
  void update(std::string_view text) { update(text.data(), text.size()); }
  uint64_t value() const;

 private:
  std::array<uint64_t, 4> lanes_;
  std::array<unsigned char, 32> rest_ = {};  // what does not fill a block of 32 bytes yet
  uint64_t bytes_ = 0;
};

std::string hex_digits(uint64_t value);  // 16 of them

}  // namespace krait
