// What passes through the model have in common. Internal to model/.
#pragma once

#include "model/language_model.h"
#include "model/mamba_block.h"

namespace krait {

inline DType full_precision(const Weights& w) {
  return w.dtype == DType::f64 ? DType::f64 : DType::f32;
}
inline DType residual_dtype(const Weights& w) {
  return w.config.residual_in_fp32 ? full_precision(w) : w.dtype;
}

// Throws Error when a token is outside the vocabulary, where the host can look.
void check_input(const Context& ctx, const Weights& w, const Tensor& tokens);
void check_state(const Weights& w, const DecodeState& state);

BlockArguments block_of(const Weights& w, int64_t layer, const PackedTokens& input,
                        const DecodeState* state);

}  // namespace krait
