// Cross entropy fused with the language model's head: logits = x weight^T exist for a few rows at a
// time only.
//   loss_t = log sum_v exp(logit_tv) - logit_t[target_t]          natural log; 0 where target_t < 0
#pragma once

#include "ops/context.h"
#include "ops/cost.h"

namespace krait {

struct CrossEntropy {
  Tensor x;                  // (tokens, d_model)      T
  Tensor weight;             // (vocab_size, d_model)  T, or i8 with weight_scale
  Tensor targets;            // (tokens)               i32; negative: ignored
  Tensor loss;               // (tokens)               f32
  Tensor weight_scale = {};  // (vocab_size)  f32, as in linear.h; with i8 only
};

struct CrossEntropyGrad {
  float scale = 1;          // gradient of the objective by each loss_t, e.g. 1 / number of targets
  Tensor dx;                // (tokens, d_model)      T; may be op.x itself
  Tensor dweight;           // (vocab_size, d_model)  f32, added to; none: not wanted
  bool add_dweight = true;  // else dweight is written, whatever it held
};

Cost cross_entropy_cost(const CrossEntropy&);
void cross_entropy_fwd(Context&, const CrossEntropy&);
// Writes op.loss as well: a training step calls only this one. Not with i8.
void cross_entropy_bwd(Context&, const CrossEntropy&, const CrossEntropyGrad&);

}  // namespace krait
