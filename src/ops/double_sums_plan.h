// How CUDA sums over whole tensors in double are laid out (global_norm, sum_elements).
#pragma once

#include <cstdint>

namespace krait::cuda {

inline constexpr int kDoubleSumThreads = 256;
inline constexpr int64_t kDoubleSumPiece = 1 << 14;  // elements of one block, whatever the size

inline int64_t double_sum_blocks(int64_t size) {
  return (size + kDoubleSumPiece - 1) / kDoubleSumPiece;
}

}  // namespace krait::cuda
