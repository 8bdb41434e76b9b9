// RMSNorm with the residual addition before it (Zhang & Sennrich, arXiv 1910.07467):
//   r = residual_in + x,   rstd = 1 / sqrt(mean(r^2) + eps),   y = r rstd weight
#pragma once

#include "ops/context.h"
#include "ops/cost.h"

namespace krait {

struct RmsNorm {
  Tensor x;             // (tokens, d_model)  T; none: nothing is added
  Tensor residual_in;   // (tokens, d_model)  R: f32 or T
  Tensor residual_out;  // (tokens, d_model)  R; may be residual_in itself; none: not kept
  Tensor weight;        // (d_model)          f32
  Tensor y;             // (tokens, d_model)  T
  Tensor rstd;          // (tokens)           f32, kept for _bwd; none: not kept
  float eps = 1e-5f;
};

// _bwd reads op.residual_out, op.rstd and op.weight.
struct RmsNormGrad {
  Tensor dy;         // (tokens, d_model)  T
  Tensor dresidual;  // (tokens, d_model)  R; in: gradient of residual_out from elsewhere; out:
                     // gradient of residual_in (= of x)
  Tensor dx;         // (tokens, d_model)  T; a copy of the outgoing dresidual; none: not wanted
  Tensor dweight;    // (d_model)          f32, added to
  Tensor y = {};     // (tokens, d_model)  T; what _fwd gave, once more; none: not wanted
};

Cost rms_norm_cost(const RmsNorm&);
void rms_norm_fwd(Context&, const RmsNorm&);
void rms_norm_bwd(Context&, const RmsNorm&, const RmsNormGrad&);

}  // namespace krait
