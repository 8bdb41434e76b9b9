// Strategy: the logits of a chunk of tokens at a time, in f32 (rounding them to bf16 would cost the
// probabilities 2 % at a logit of 10). Each row's gradient takes the place of its logits, in T, so
// that a chunk needs memory once; then two products with the chunk give dx and add to dweight.
#include <algorithm>

#include "ops/cross_entropy_rows.h"

namespace krait::cuda {
namespace {

// body(chunk of op, its first token, its logits, the same as the row kernels take them), in order.
template <class F>
void for_each_chunk(Context& ctx, const CrossEntropy& op, const CrossEntropyPlan& plan, F&& body) {
  const int64_t tokens = op.x.shape[0], vocab_size = op.weight.shape[0];
  if (tokens == 0) return;
  const Arena::Scope scope(ctx.workspace());
  const Tensor memory =
      ctx.workspace().tensor(DType::f32, {std::min(tokens, plan.chunk_tokens), plan.pitch});
  // The row kernels load whole vectors: what they read beyond the vocabulary is of no account, but
  // is to be there.
  if (plan.pitch > vocab_size)
    check(cudaMemset2DAsync(memory.ptr<float>() + vocab_size,
                            static_cast<size_t>(plan.pitch) * sizeof(float), 0,
                            static_cast<size_t>(plan.pitch - vocab_size) * sizeof(float),
                            static_cast<size_t>(memory.shape[0]), state_of(ctx).stream),
          "clearing the padding of logits");
  for (int64_t begin = 0; begin < tokens; begin += plan.chunk_tokens) {
    const int64_t end = std::min(tokens, begin + plan.chunk_tokens);
    const CrossEntropy chunk = {.x = op.x.slice(0, begin, end),
                                .weight = op.weight,
                                .targets = op.targets.slice(0, begin, end),
                                .loss = op.loss.slice(0, begin, end),
                                .weight_scale = op.weight_scale};
    const Tensor logits = memory.slice(0, 0, end - begin).slice(1, 0, vocab_size);
    cuda::linear_fwd(ctx, {.x = chunk.x,
                           .weight = op.weight,
                           .bias = {},
                           .y = logits,
                           .weight_scale = op.weight_scale});
    body(chunk, begin, logits,
         LogitRows{.logits = logits.ptr<float>(),
                   .targets = chunk.targets.ptr<int32_t>(),
                   .loss = chunk.loss.ptr<float>(),
                   .count = end - begin,
                   .pitch = plan.pitch,
                   .vocab_size = static_cast<int>(vocab_size),
                   .scale = 0});
  }
}

CrossEntropyPlan plan_of(Context& ctx, const CrossEntropy& op) {
  return CrossEntropyPlan::make(op.x.shape[0], op.weight.shape[0],
                                state_of(ctx).shared_bytes_per_block);
}

}  // namespace

void cross_entropy_fwd(Context& ctx, const CrossEntropy& op) {
  const CrossEntropyPlan plan = plan_of(ctx, op);
  for_each_chunk(ctx, op, plan,
                 [&](const CrossEntropy&, int64_t, const Tensor&, const LogitRows& rows) {
                   launch_losses(ctx, plan, rows);
                 });
}

void cross_entropy_bwd(Context& ctx, const CrossEntropy& op, const CrossEntropyGrad& grad) {
  const CrossEntropyPlan plan = plan_of(ctx, op);
  for_each_chunk(
      ctx, op, plan,
      [&](const CrossEntropy& chunk, int64_t begin, const Tensor& logits, LogitRows rows) {
        rows.scale = grad.scale;
        launch_losses_and_gradients(ctx, plan, rows, op.x.dtype);
        Tensor dlogits = logits;  // in T, each row at the start of the f32 row it replaces
        dlogits.dtype = op.x.dtype;
        dlogits.stride[0] *= static_cast<int64_t>(sizeof(float) / size_of(op.x.dtype));
        const Linear head = {.x = chunk.x, .weight = op.weight, .bias = {}, .y = {}};
        cuda::linear_bwd(ctx, head,
                         {.dy = dlogits,
                          .dx = {},
                          .dweight = grad.dweight,
                          .dbias = {},
                          .add_dweight = grad.add_dweight || begin > 0});
        const Tensor dx = grad.dx.slice(0, begin, begin + logits.shape[0]);  // may be chunk.x
        cuda::linear_bwd(ctx, head, {.dy = dlogits, .dx = dx, .dweight = {}, .dbias = {}});
      });
}

}  // namespace krait::cuda
