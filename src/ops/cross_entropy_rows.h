// The row kernels of the CUDA cross entropy: from a chunk's logits to losses and gradients.
#pragma once

#include "ops/cross_entropy_plan.h"
#include "ops/cuda/state.h"

namespace krait::cuda {

struct LogitRows {
  float* logits;  // (count, pitch)
  const int32_t* targets;
  float* loss;
  int64_t count, pitch;
  int vocab_size;
  float scale;  // of the gradient
};

// A target beyond the vocabulary, which the host cannot see, gives a loss that is not a number.
void launch_losses(Context&, const CrossEntropyPlan&, const LogitRows&);
// The losses; and writes each row's gradient, in T, at the start of the row of logits.
void launch_losses_and_gradients(Context&, const CrossEntropyPlan&, const LogitRows&, DType T);

}  // namespace krait::cuda
