#include "model/pass.h"

#include <string>

namespace krait {

void check_input(const Context& ctx, const Weights& w, const Tensor& tokens) {
  if (ctx.memory().on_host())
    check_tokens({tokens.ptr<int32_t>(), static_cast<size_t>(tokens.shape[0])},
                 w.config.vocab_size);
}

void check_state(const Weights& w, const DecodeState& state) {
  KRAIT_CHECK(state.dtype() == full_precision(w) || state.dtype() == DType::bf16,
              std::string("the state is ") + name_of(state.dtype()));
  KRAIT_CHECK(state.matches(w.config), "the state belongs to another model");
}

BlockArguments block_of(const Weights& w, int64_t layer, const PackedTokens& input,
                        const DecodeState* state) {
  return {.config = w.config,
          .parameters = w.parameters.layers[static_cast<size_t>(layer)],
          .A = w.A.slice(0, layer, layer + 1).reshape({w.config.d_inner, w.config.d_state}),
          .seq_start = input.seq_start,
          .slot = input.slot,
          .conv = state ? state->conv(layer) : Tensor(),
          .ssm = state ? state->ssm(layer) : Tensor()};
}

}  // namespace krait
