// In place of the header of this name.
#pragma once

#include "cuda_words.h"

namespace krait::cuda {

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t own[6] = {a[0], a[1], a[2], a[3], b0, b1};
  emulated::show(own);
  const auto element = [](uint32_t word, int half) {
    return __uint_as_float(half == 0 ? word << 16 : word & 0xffff0000u);
  };
  const int g = static_cast<int>(threadIdx.x % 32 / 4), q = static_cast<int>(threadIdx.x % 4);
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k) {
      const int column = 2 * q + i % 2, lane = k % 8 / 2;
      d[i] += element(emulated::shown(g * 4 + lane, i / 2 + k / 8 * 2), k % 2) *
              element(emulated::shown(column * 4 + lane, 4 + k / 8), k % 2);
    }
  emulated::meet_in_warp();
}

}  // namespace krait::cuda
