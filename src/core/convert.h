// Conversion between element types, in the host's memory.
#pragma once

#include "core/tensor.h"

namespace krait {

// to = from, between any of f32, bf16, f16 and f64; both contiguous and of equal size. The 16-bit
// types convert by way of f32, rounding to nearest even. Work is shared by `threads`.
void convert_on_host(int threads, const Tensor& from, const Tensor& to);

}  // namespace krait
