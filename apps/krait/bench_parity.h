// Whether a model gives on an engine what it gives on the CPU, on the very shapes that are then
// timed: all sequences on the engine, the first and the last of them on the CPU.
#pragma once

#include <optional>

#include "bench_model.h"

namespace krait {

// Largest relative RMS errors (op_parity.h); none: not asked for. On an engine whose memory the
// host can read they are from the reference's results.
struct ModelParity {
  std::optional<double> prompt;     // logits behind some of the first 512 tokens
  std::optional<double> decode;     // logits behind four steps
  std::optional<double> loss;       // of the first 128 tokens, in training
  std::optional<double> gradients;  // of these tokens' loss, the largest of any parameter
};

// What bench times of the model. Throws Error for an error that no rounding explains.
ModelParity model_parity(Context& ctx, const ModelBench& bench);

}  // namespace krait
