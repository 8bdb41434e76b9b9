// AdamW (Loshchilov & Hutter, arXiv 1711.05101), with gradient clipping by global norm in front:
//   g = grad min(1, max_norm / (norm + 1e-6)),   m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 -
//   beta2) g^2 param -= lr weight_decay param + lr (m / (1 - beta1^step)) / (sqrt(v / (1 -
//   beta2^step)) + eps)
#pragma once

#include <span>

#include "ops/context.h"
#include "ops/cost.h"

namespace krait {

struct AdamW {
  Tensor param, grad, m, v;  // (size)  f32 (f64 on the reference engine); any shape, contiguous
  Tensor rounded = {};  // (size)  bf16: param to nearest; left alone with param; none: not wanted
  Tensor norm;          // (1)     f32, from global_norm; not finite: nothing is changed; none: no
                        // clipping
  float max_norm = 0;
  float lr = 0, beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f, weight_decay = 0;
  int64_t step = 1;  // counts from 1
};

Cost adamw_cost(const AdamW&);
void adamw(Context&, const AdamW&);

// norm = sqrt(sum of squares over all grads), summed in double in a fixed order.
struct GlobalNorm {
  std::span<const Tensor> grads;  // each contiguous  f32
  Tensor norm;                    // (1)              f32
};

void global_norm(Context&, const GlobalNorm&);

}  // namespace krait
