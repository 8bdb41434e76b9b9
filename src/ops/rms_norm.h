// RMSNorm with the residual addition before it (Zhang & Sennrich, arXiv 1910.07467):
//   r = residual_in + x_0 + x_1 ..,   rstd = 1 / sqrt(mean(r^2) + eps),   y = r rstd weight
// Every sum is rounded to R, so that r has the bits of a stream that was kept in between.
#pragma once

#include <array>

#include "ops/context.h"
#include "ops/cost.h"

namespace krait {

inline constexpr int kMaxAddends = 4;

struct RmsNorm {
  // (tokens, d_model)  T, added one after the other; none: neither it nor any behind it
  std::array<Tensor, kMaxAddends> x;
  Tensor residual_in;   // (tokens, d_model)  R: f32 or T
  Tensor residual_out;  // (tokens, d_model)  R; may be residual_in itself; none: not kept
  Tensor weight;        // (d_model)          f32
  Tensor y;             // (tokens, d_model)  T
  Tensor rstd;          // (tokens)           f32, kept for _bwd; none: not kept
  float eps = 1e-5f;
};

// The number of x.
int addends(const RmsNorm&);

// _bwd reads op.rstd, op.weight, and r: op.residual_out, or where that is none what r is the sum
// of, so that nobody need keep it.
struct RmsNormGrad {
  Tensor dy;         // (tokens, d_model)  T
  Tensor dresidual;  // (tokens, d_model)  R; in: gradient of r from elsewhere; out: gradient of
                     // residual_in (= of x)
  Tensor dx;         // (tokens, d_model)  T; a copy of the outgoing dresidual; may be one of op.x
                     // itself; none: not wanted
  Tensor dweight;    // (d_model)          f32, added to
  Tensor y = {};     // (tokens, d_model)  T; what _fwd gave, once more; may be dy itself; none: not
                     // wanted
};

Cost rms_norm_cost(const RmsNorm&);
void rms_norm_fwd(Context&, const RmsNorm&);
void rms_norm_bwd(Context&, const RmsNorm&, const RmsNormGrad&);

}  // namespace krait
