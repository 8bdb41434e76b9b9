#include "ops/cuda/arguments.h"
#include "ops/cuda/state.h"
#include "ops/decoder_many.h"

namespace krait::cuda {

bool many_possible(Context& ctx, const DecoderStep& op) {
#ifdef KRAIT_HAS_SM90A
  const State& gpu = state_of(ctx);
  return gpu.compute_major == 9 && gpu.compute_minor == 0 && !op.layers.empty() &&
         op.embedding.dtype == DType::bf16 && op.head.dtype == DType::bf16 &&
         aligned(op.embedding) && op.layers[0].dt_proj;
#else
  static_cast<void>(ctx), static_cast<void>(op);
  return false;
#endif
}

void decoder_logits(Context& ctx, const DecoderStep& op, const Tensor& residual) {
  const Arena::Scope scope(ctx.workspace());
  const Tensor x = ctx.workspace().tensor(DType::bf16, {residual.shape[0], residual.shape[1]});
  krait::rms_norm_fwd(ctx, {.x = {},
                            .residual_in = residual,
                            .residual_out = {},
                            .weight = op.norm_f,
                            .y = x,
                            .rstd = {},
                            .eps = op.norm_eps});
  krait::linear_fwd(ctx, {.x = x, .weight = op.head, .bias = {}, .y = op.logits});
}

}  // namespace krait::cuda
