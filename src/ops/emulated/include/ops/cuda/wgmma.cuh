// In place of the header of this name: a thread computes its own part of a product at once.
#pragma once

#include "core/dtype.h"
#include "cuda_words.h"

namespace krait::cuda {

inline uint64_t tile_descriptor(uint32_t address) {
  if (address % 1024 != 0) emulated::fail("a tile that is not aligned");
  return (address & 0x3ffff) >> 4;
}
inline uint64_t blocks_descriptor(uint32_t address, int depth_step, int row_step) {
  return static_cast<uint64_t>(row_step / 16) << 32 | static_cast<uint64_t>(depth_step / 16) << 16 |
         (address & 0x3ffff) >> 4;
}
inline uint64_t behind(uint64_t descriptor, uint32_t by) { return descriptor + by; }
inline void begin_products() {}
inline void end_products() {}
template <int kGroups>
void wait_for_products() {}
template <int N>
void settle(float (&)[N]) {}

inline float bf16_at(uint32_t address) {
  return *reinterpret_cast<const bf16*>(emulated::pointer_to(address, sizeof(bf16)));
}

template <int N>
void multiply_tiles(float (&d)[N], uint64_t a, uint64_t b) {
  const auto field = [](uint64_t from, int bit) {
    return static_cast<uint32_t>(from >> bit & 0x3fff) << 4;
  };
  const uint32_t thread = threadIdx.x % 128, g = thread % 32 / 4, q = thread % 4;
  const uint32_t depth_step = field(b, 16), row_step = field(b, 32);
  for (uint32_t i = 0; i < N; ++i) {
    const uint32_t row = thread / 32 * 16 + g + i % 4 / 2 * 8, column = i / 4 * 8 + 2 * q + i % 2;
    for (uint32_t k = 0; k < 16; ++k) {
      const uint32_t at = field(a, 0) + row * 128 + k * 2;
      d[i] += bf16_at(at ^ (at >> 7 & 7) << 4) *
              bf16_at(field(b, 0) + column / 8 * row_step + k / 8 * depth_step + column % 8 * 16 +
                      k % 8 * 2);
    }
  }
}

}  // namespace krait::cuda
