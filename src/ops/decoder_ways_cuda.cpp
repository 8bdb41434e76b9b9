#include "ops/cuda/arguments.h"
#include "ops/cuda/state.h"
#include "ops/decoder_ways.h"

namespace krait::cuda {

DecoderShape shape_of(const DecoderStep& op) {
  const DecoderLayer& l = op.layers[0];
  return {.num_seqs = op.tokens.shape[0],
          .n_layer = static_cast<int64_t>(op.layers.size()),
          .d_model = op.norm_f.shape[0],
          .d_inner = l.D.shape[0],
          .d_state = l.A.shape[1],
          .d_conv = l.conv1d_weight.shape[1],
          .dt_rank = l.dt_proj ? l.dt_proj.shape[1] : 0,
          .vocab_size = op.head.shape[0],
          .int8 = op.head.dtype == DType::i8};
}

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
