// Products with weights in 8 bits for many rows of x: pieces of the matrix as T, where integers up
// to 127 are exact, by the product that T has; then each output times its row's scale.
#pragma once

#include "ops/linear.h"

namespace krait::cpu {

void linear_fwd_int8(Context&, const Linear&);

}  // namespace krait::cpu
