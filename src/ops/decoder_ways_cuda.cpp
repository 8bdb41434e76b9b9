// Decoder step on the GPU: which way takes it, of how many sequences at a time.
#include <algorithm>
#include <vector>

#include "core/error.h"
#include "ops/cuda/arguments.h"
#include "ops/cuda/state.h"
#include "ops/decoder_ways.h"

namespace krait::cuda {
namespace {

struct Way {
  void (*step)(Context&, const DecoderStep&) = nullptr;  // none: by the ops
  int64_t seqs = 0;                                      // at a time
};

// With batch_invariant the same for any number of sequences. Else the fastest, of all at once: a
// second time would read the weights again.
Way way_of(Context& ctx, const DecoderStep& op) {
  const int64_t num_seqs = op.tokens.shape[0];
  if (op.layers.empty() || num_seqs == 0) return {};
  const auto suits = [&](int64_t takes) {
    return takes > 0 && (ctx.batch_invariant || num_seqs <= takes);
  };
  if (ctx.batch_invariant || num_seqs > kDecoderMaxSeqs) {
    if (const int64_t seqs = clusters_take(ctx, op); suits(seqs)) return {decoder_cluster, seqs};
    if (const int64_t seqs = batch_takes(ctx, op); suits(seqs)) return {decoder_batch, seqs};
    if (!ctx.batch_invariant) return {};
  }
  const int64_t seqs = persistent_takes(ctx, op);
  return suits(seqs) ? Way{decoder_persistent, seqs} : Way{};
}

}  // namespace

bool takes_decoder_step(Context& ctx, const DecoderStep& op) {
  return way_of(ctx, op).step != nullptr;
}

void decoder_step(Context& ctx, const DecoderStep& op) {
  const Way way = way_of(ctx, op);
  KRAIT_CHECK(way.step);
  const int64_t num_seqs = op.tokens.shape[0];
  if (num_seqs <= way.seqs) return way.step(ctx, op);
  std::vector<DecoderLayer> layers;
  for (int64_t begin = 0; begin < num_seqs; begin += way.seqs)
    way.step(ctx, part_of(op, begin, std::min(num_seqs, begin + way.seqs), layers));
}

DecoderStep part_of(const DecoderStep& op, int64_t begin, int64_t end,
                    std::vector<DecoderLayer>& layers) {
  DecoderStep part = op;
  part.tokens = op.tokens.slice(0, begin, end);
  part.logits = op.logits.slice(0, begin, end);
  if (op.slot) {
    part.slot = op.slot.slice(0, begin, end);
    return part;
  }
  layers.assign(op.layers.begin(), op.layers.end());
  for (DecoderLayer& l : layers)
    for (Tensor* state : {&l.conv, &l.ssm}) *state = state->slice(0, begin, end);
  part.layers = layers;
  return part;
}

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
