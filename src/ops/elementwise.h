// Passes over tensors that run in order with the other ops. Tensors are contiguous where nothing
// else is said.
#pragma once

#include "ops/context.h"

namespace krait {

void fill_zero(Context&, const Tensor& x);  // any type
// Same type and size, contiguous, or both (rows, width) with rows that may be strided. Each may
// also be in the engine's transfer memory: the host writes `from` before the call and leaves it
// alone, and reads `to`, after a mark behind this one was reached (engine.h).
void copy_elements(Context&, const Tensor& from, const Tensor& to);
void round_elements(Context&, const Tensor& from, const Tensor& to);  // f32 to bf16, to nearest

// A = -exp(A_log); f32 (f64 on the reference engine).
void negative_exp(Context&, const Tensor& A_log, const Tensor& A);

// sum += x y; f32 (f64 on the reference engine).
void add_product(Context&, const Tensor& x, const Tensor& y, const Tensor& sum);

// sum (1) f64 += the sum of all of x (f32), which is taken in double and in a fixed order.
void sum_elements(Context&, const Tensor& x, const Tensor& sum);

// clipped[i] = offsets[i] moved into [begin, end], minus begin; i32: where a batch's sequences lie
// in the tokens from begin to end. Those that are not there are empty.
void clip_offsets(Context&, const Tensor& offsets, int64_t begin, int64_t end,
                  const Tensor& clipped);

}  // namespace krait
