// Host side of kernels: tensors as their arguments.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/tensor.h"

namespace krait::cuda {

// The memory of an optional argument; none: null.
inline float* f32(const Tensor& t) { return t ? t.ptr<float>() : nullptr; }
inline int32_t* i32(const Tensor& t) { return t ? t.ptr<int32_t>() : nullptr; }
// Elements from row to row; none: 0.
inline int64_t row(const Tensor& t) { return t ? t.stride[0] : 0; }

// Null: true.
inline bool aligned(const void* p, size_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}
inline bool aligned(const Tensor& t) { return aligned(t.data); }

}  // namespace krait::cuda
