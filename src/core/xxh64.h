// XXH64 with seed 0, by the library xxHash: 64 bits of any bytes at the speed of memory. It finds
// damage and tells models apart; it is no defence against somebody who wants two inputs to look the
// same.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

struct XXH64_state_s;

namespace krait {

class Xxh64 {
 public:
  Xxh64();

  // Bytes in any pieces give what they give at once.
  void update(const void* data, size_t bytes);
  void update(std::string_view text) { update(text.data(), text.size()); }
  uint64_t value() const;

 private:
  struct Free {
    void operator()(XXH64_state_s* state) const;
  };
  std::unique_ptr<XXH64_state_s, Free> state_;
};

std::string hex_digits(uint64_t value);  // 16 of them

}  // namespace krait
