// Linear: y = x weight^T + bias.  Gradients: dx = dy weight,  dweight += dy^T x,  dbias += sum_t
// dy_t. The rows of x, y, dy and dx may be strided; weight is contiguous.
#pragma once

#include "ops/context.h"
#include "ops/cost.h"

namespace krait {

struct Linear {
  Tensor x;       // (tokens, in_features)        T
  Tensor weight;  // (out_features, in_features)  T, or i8 with weight_scale
  Tensor bias;    // (out_features)               f32; none: no bias
  Tensor y;       // (tokens, out_features)       T or f32
  // (out_features) f32: row o of the matrix is weight_scale[o] times weight's; with i8 only. The
  // sums are of weight's integers and are scaled once: y = weight_scale (x weight^T) + bias.
  Tensor weight_scale = {};
  // weight is not written by the op queued right before, so that an engine may read it before that
  // one is done.
  bool settled = false;
};

struct LinearGrad {
  Tensor dy;                // (tokens, out_features)       T
  Tensor dx;                // (tokens, in_features)        T; none: not wanted
  Tensor dweight;           // (out_features, in_features)  f32, added to; none: not wanted
  Tensor dbias;             // (out_features)               f32, added to; none: not wanted
  bool add_dx = false;      // dx is added to (the sum rounded once to T), instead of written
  bool add_dweight = true;  // else dweight is written, whatever it held
};

Cost linear_cost(const Linear&);
void linear_fwd(Context&, const Linear&);
// A weight as linear_fwd takes it: contiguous, of x's type, or i8 with its scales.
void check_weight(const Tensor& weight, const Tensor& weight_scale, const Tensor& x);
// Reads op.x and op.weight; not with i8.
void linear_bwd(Context&, const Linear&, const LinearGrad&);

}  // namespace krait
