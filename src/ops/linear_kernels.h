// What the linear layer needs besides matrix products. Used by linear_cuda.cpp only.
#pragma once

#include "ops/cuda/state.h"

namespace krait::cuda {

// y = x weight^T + bias; a row's bits do not depend on the number of rows.
void launch_matvec(Context&, const Linear&);

// to (rows, width) f32 or bf16 = from (rows, width) f32 + bias (width); from and to may be the
// same.
void launch_add_bias(Context&, const Tensor& from, const Tensor& bias, const Tensor& to);

// dbias (width) += the sum of dy's rows (f32 or bf16), in an order that their number decides.
void launch_dbias(Context&, const Tensor& dy, const Tensor& dbias);

}  // namespace krait::cuda
