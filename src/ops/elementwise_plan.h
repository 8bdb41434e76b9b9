// How CUDA passes over tensors are laid out.
#pragma once

#include <cstdint>

namespace krait::cuda {

inline constexpr int kElementwiseThreads = 256;
inline constexpr int kElementwiseVector = 8;  // elements of a thread where alignment allows

inline int64_t elementwise_blocks(int64_t count, int vector) {
  const int64_t elements = int64_t{kElementwiseThreads} * vector;
  return (count + elements - 1) / elements;
}

}  // namespace krait::cuda
