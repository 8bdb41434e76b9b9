// How CUDA's AdamW is laid out.
#pragma once

#include <cstdint>

namespace krait::cuda {

inline constexpr int kAdamwThreads = 256, kAdamwVector = 4;  // elements of a thread

inline int64_t adamw_blocks(int64_t size) {
  const int64_t elements = int64_t{kAdamwThreads} * kAdamwVector;
  return (size + elements - 1) / elements;
}

}  // namespace krait::cuda
