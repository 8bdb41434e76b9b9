// Matrix products on the GPU: cuBLASLt, and an own kernel for what it refuses.
#pragma once

#include <utility>

#include "ops/cuda/state.h"

namespace krait::cuda {

// c = a b, or c += a b with the sum rounded once. One of the two strides of a and of b is 1; c's is
// the second. m, n and k are at least 1. Products and sums in f32, true f32 for f32 inputs.
struct Gemm {
  Tensor a;  // (m, k)  f32 or bf16
  Tensor b;  // (k, n)  as a
  Tensor c;  // (m, n)  f32, or as a
  bool accumulate = false;
};

void gemm(Context&, const Gemm&);

// Any strides and alignments. An element's bits depend on its row of a, its column of b and k only.
void gemm_tiled(Context&, const Gemm&);

// The view with its two dimensions exchanged.
inline Tensor transposed(Tensor t) {
  std::swap(t.shape[0], t.shape[1]);
  std::swap(t.stride[0], t.stride[1]);
  return t;
}

}  // namespace krait::cuda
