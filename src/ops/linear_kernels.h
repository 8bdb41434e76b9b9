// What the linear layer needs besides cuBLASLt. Used by linear_cuda.cpp, and by
// decoder_batch_cuda.cu for x_proj.
#pragma once

#include "ops/cuda/arguments.h"
#include "ops/cuda/state.h"

namespace krait::cuda {

// y = x weight^T + bias; a row's bits do not depend on the number of rows.
void launch_matvec(Context&, const Linear&);
void launch_matvec_int8(Context&, const Linear&);  // with weights in 8 bits

// The same of few outputs, where skinny_possible says so, which does not look at the number of
// rows; skinny_takes: and it is the fastest way.
bool skinny_possible(const State& gpu, const Linear&);
bool skinny_takes(const State& gpu, const Linear&);
void launch_skinny(Context&, const Linear&);

// The same product by Hopper's tensor cores, where takes_tiles says so, which does not look at the
// number of rows; with weights in 8 bits of what launch_tiles takes once they are widened.
bool takes_tiles(const State& gpu, const Linear&);
void launch_tiles(Context&, const Linear&);  // weight_scale: of any weight, in bf16

// The same product for up to kMaxTokenBlocks * kMaxTokens rows by matrix instructions; a row's bits
// depend on how many rows there are. Only what the plan takes, with x in bf16, and memory that
// takes_int8_tiles says is aligned.
bool takes_int8_tiles(const Linear&);
void launch_int8_tiles(Context&, const Linear&);

// to (rows, width) f32 or bf16 = from (rows, width) i8, exactly; both contiguous.
void launch_widen_int8(Context&, const Tensor& from, const Tensor& to);

// to (rows, width) f32 or bf16 = scale (width) * from (rows, width) f32 + bias (width); scale and
// bias are f32 or none; from and to may be the same.
void launch_scale_and_bias(Context&, const Tensor& from, const Tensor& scale, const Tensor& bias,
                           const Tensor& to);

// dbias (width) += the sum of dy's rows (f32 or bf16), in an order that their number decides.
void launch_dbias(Context&, const Tensor& dy, const Tensor& dbias);

}  // namespace krait::cuda
