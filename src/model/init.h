// The initialization of the paper's models, as their published code does it (state-spaces/mamba, Gu
// & Dao, arXiv 2312.00752):
//   embedding   N(0, initializer_range)                 dt_proj       U(+-dt_rank^-1/2 dt_scale)
//   in_proj, x_proj, an untied head  U(+-fan_in^-1/2)   dt_proj.bias  softplus^-1(max(dt, floor)),
//   log dt uniform on [log dt_min, log dt_max] out_proj    U(+-d_inner^-1/2) / sqrt(n_layer) A_log
//   log(1 .. d_state);  D, norms 1;  biases of in_proj, out_proj 0 conv1d weight and bias
//   U(+-d_conv^-1/2)            B_const 1, C_const N(0, 1) (the controls without selection)
#pragma once

#include "model/parameters.h"

namespace krait {

// parameters: f32 or f64; those that are none are left out. Every parameter draws from a random
// stream of its own, so its values do not depend on the others, nor on the number of threads (at
// least 1).
void initialize(const Config& config, const Parameters& parameters, uint64_t seed, int threads = 1);

}  // namespace krait
