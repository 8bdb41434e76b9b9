// The matrix product of decoding: few rows of x, each weight read once, at memory speed. A row's
// bits do not depend on how many rows there are, nor on the number of threads.
#pragma once

#include "ops/linear.h"

namespace krait::cpu {

void linear_fwd_matvec(Context&, const Linear&);

}  // namespace krait::cpu
