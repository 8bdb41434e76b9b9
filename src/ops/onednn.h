// Matrix products by oneDNN. Its primitives (compiled code for one shape) are kept in the Context.
#pragma once

#include "ops/context.h"

namespace krait::cpu {

// c = a b + bias, or c += a b + bias. One of the two strides of a, b and c is 1; c's is the second.
struct Matmul {
  Tensor a;     // (m, k)  f32 or bf16
  Tensor b;     // (k, n)  as a
  Tensor bias;  // (n)     f32; none: no bias
  Tensor c;     // (m, n)  f32, or as a
  bool accumulate = false;
};

void matmul(Context&, const Matmul&);

// The view with its two dimensions exchanged.
Tensor transposed(const Tensor&);

// Whether bf16 products run in bf16 (the CPU has AVX512_BF16). Elsewhere they are widened to f32,
// panel by panel: oneDNN's emulation is slower than that, and on AVX2 it has none.
bool native_bf16();
// For tests: widens even where the CPU could do without. Not thread-safe.
void force_widening(bool);

}  // namespace krait::cpu
