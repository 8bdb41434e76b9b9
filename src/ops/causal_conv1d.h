// Causal depthwise convolution with SiLU (Mamba, section 3.4), over packed sequences:
//   s_t = bias + sum_k weight[k] x_{t - (d_conv - 1) + k},   y_t = silu(s_t)        (k = d_conv - 1
//   is the current token)
// Inputs before a sequence's start come from its state, or are zero.
#pragma once

#include "ops/context.h"
#include "ops/cost.h"

namespace krait {

struct CausalConv1d {
  Tensor x;          // (tokens, d_inner)               T; rows may be strided
  Tensor weight;     // (d_inner, d_conv)               f32; d_conv in [2, 4]
  Tensor bias;       // (d_inner)                       f32; none: no bias
  Tensor seq_start;  // (num_seqs + 1)                  i32, from 0 to tokens, not decreasing
  Tensor state;  // (slots, d_conv - 1, d_inner)    f32 or bf16 (rounded to nearest even), oldest
                 // first; in: the inputs before, out: the last inputs; none: zero, not kept
  Tensor slot;   // (num_seqs)                      i32, distinct; none: sequence i uses slot i
  Tensor y;      // (tokens, d_inner)               T; rows may be strided
  bool silu = true;
  // In _step: weight, bias, slot and state are not written by the op queued right before, so that
  // an engine may read them before that one is done.
  bool settled = false;
};

// _bwd reads op.x, op.weight, op.bias and op.state, which holds the INITIAL state (as it was before
// _fwd), in f32.
struct CausalConv1dGrad {
  Tensor dy;       // (tokens, d_inner)             T
  Tensor dx;       // (tokens, d_inner)             T; rows may be strided
  Tensor dweight;  // (d_inner, d_conv)             f32, added to
  Tensor dbias;    // (d_inner)                     f32, added to; none when there is no bias
  Tensor dstate;  // (slots, d_conv - 1, d_inner)  f32; in: gradient of the final state, out: of the
                  // initial one; none: zero, not wanted
};

Cost causal_conv1d_cost(const CausalConv1d&);
void causal_conv1d_fwd(Context&, const CausalConv1d&);
void causal_conv1d_bwd(Context&, const CausalConv1d&, const CausalConv1dGrad&);
// One token for each sequence: tokens = num_seqs, seq_start is none, state is needed.
void causal_conv1d_step(Context&, const CausalConv1d&);

}  // namespace krait
