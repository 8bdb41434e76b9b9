// Passes over tensors that run in order with the other ops. All tensors are contiguous.
#pragma once

#include "ops/context.h"

namespace krait {

void fill_zero(Context&, const Tensor& x);                            // any type
void copy_elements(Context&, const Tensor& from, const Tensor& to);   // same type and size
void round_elements(Context&, const Tensor& from, const Tensor& to);  // f32 to bf16, to nearest

// A = -exp(A_log); f32 (f64 on the reference engine).
void negative_exp(Context&, const Tensor& A_log, const Tensor& A);

// sum += x y; f32 (f64 on the reference engine).
void add_product(Context&, const Tensor& x, const Tensor& y, const Tensor& sum);

}  // namespace krait
