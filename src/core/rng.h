// Philox4x32-10 (Salmon et al., SC 2011): random numbers as a pure function of (key, counter). A
// position in the stream is one number, so a checkpoint stores it exactly and any element of a
// sequence can be computed alone.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

namespace krait {

class Rng {
 public:
  constexpr explicit Rng(uint64_t seed, uint64_t stream = 0) : key_(seed), stream_(stream) {}

  constexpr uint32_t next_u32() {
    const uint64_t index = position_++;
    if (index / 4 != block_index_) refill(index / 4);
    return block_[index % 4];
  }
  constexpr uint64_t next_53_bits() {
    const uint64_t high = next_u32(), low = next_u32();
    return (high << 21) ^ (low >> 11);
  }
  // Uniform on [0, 1), 53 bits.
  double uniform() { return static_cast<double>(next_53_bits()) * 0x1p-53; }
  double uniform(double low, double high) { return low + (high - low) * uniform(); }
  // Uniform on {0, .., n - 1}, without bias. n > 0.
  uint64_t below(uint64_t n) {
    const uint64_t limit = UINT64_MAX - UINT64_MAX % n;
    for (;;) {
      const uint64_t high = next_u32(), x = (high << 32) | next_u32();
      if (x < limit) return x % n;
    }
  }
  double normal() {  // Box-Muller
    const double radius = std::sqrt(-2.0 * std::log1p(-uniform()));
    return radius * std::cos(6.283185307179586476925 * uniform());
  }

  uint64_t position() const { return position_; }
  constexpr void seek(uint64_t position) {
    position_ = position;
    block_index_ = UINT64_MAX;
  }

 private:
  constexpr void refill(uint64_t index) {
    block_index_ = index;
    std::array<uint32_t, 4> c = {static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32),
                                 static_cast<uint32_t>(stream_),
                                 static_cast<uint32_t>(stream_ >> 32)};
    uint32_t k0 = static_cast<uint32_t>(key_), k1 = static_cast<uint32_t>(key_ >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = uint64_t{0xD2511F53} * c[0], p1 = uint64_t{0xCD9E8D57} * c[2];
      c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
           static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
    block_ = c;
  }

  uint64_t key_, stream_, position_ = 0, block_index_ = UINT64_MAX;
  std::array<uint32_t, 4> block_{};
};

}  // namespace krait
