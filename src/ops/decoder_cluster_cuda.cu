// Decoder step of many sequences through a small model on the GPU: one kernel for all layers,
// again for each pass, then the norm and the head as ops.
#include <algorithm>
#include <vector>

#include "core/error.h"
#include "ops/cuda/arguments.h"
#include "ops/decoder_cluster_kernel.h"
#include "ops/decoder_ways.h"

namespace krait::cuda {
namespace {

int clusters_of(size_t shared_bytes) {
  static const int clusters = decoder_clusters_at_once(shared_bytes);
  return clusters;
}

DecoderClusterPlan plan_of(Context& ctx, const DecoderStep& op, int64_t num_seqs) {
  const size_t shared_bytes = state_of(ctx).shared_bytes_per_block;
  DecoderShape shape = shape_of(op);
  shape.num_seqs = num_seqs;
  return plan_decoder_cluster(shape, static_cast<int>(size_of(op.layers[0].ssm.dtype)),
                              clusters_of(shared_bytes), shared_bytes);
}

DecoderClusterLayer args_of(const DecoderLayer& l, const DecoderClusterPlan& plan) {
  return {.in_proj = tensor_map(l.in_proj, plan.channels),
          .x_proj = tensor_map(l.x_proj, plan.x_proj_rows),
          .dt_proj = tensor_map(l.dt_proj, plan.channels),
          .out_proj = tensor_map(l.out_proj, plan.outputs),
          .norm = f32(l.norm),
          .in_bias = f32(l.in_proj_bias),
          .conv_weight = f32(l.conv1d_weight),
          .conv_bias = f32(l.conv1d_bias),
          .dt_bias = f32(l.dt_proj_bias),
          .A = f32(l.A),
          .D = f32(l.D),
          .out_bias = f32(l.out_proj_bias),
          .conv = l.conv.data,
          .ssm = l.ssm.data};
}

bool takes_layer(const DecoderLayer& l) {
  if (!l.dt_proj) return false;
  for (const Tensor* t : {&l.in_proj, &l.x_proj, &l.dt_proj, &l.out_proj})
    if (!tiles_possible(*t)) return false;
  return std::ranges::all_of(
      std::initializer_list<const Tensor*>{&l.norm, &l.in_proj_bias, &l.conv1d_weight,
                                           &l.conv1d_bias, &l.A, &l.D, &l.out_proj_bias, &l.conv,
                                           &l.ssm},
      [](const Tensor* t) { return aligned(*t); });
}

// args: all but what differs between passes.
void launch_pass(const State& gpu, const DecoderStep& pass, const Tensor& residual,
                 DecoderClusterArgs& args) {
  args.num_seqs = static_cast<int>(pass.tokens.shape[0]);
  args.tokens = pass.tokens.ptr<int32_t>();
  args.slot = i32(pass.slot);
  args.residual = residual.data;
  for (size_t i = 0; i < pass.layers.size(); ++i) {
    args.layer[i].conv = pass.layers[i].conv.data;
    args.layer[i].ssm = pass.layers[i].ssm.data;
  }
  launch_decoder_cluster(gpu, args, pass.layers[0].ssm.dtype == DType::bf16);
}

}  // namespace

int64_t clusters_take(Context& ctx, const DecoderStep& op) {
  if (!many_possible(ctx, op) || !std::ranges::all_of(op.layers, takes_layer)) return 0;
  const int64_t clusters = clusters_of(state_of(ctx).shared_bytes_per_block);
  int64_t seqs = kClusterMaxPasses * clusters * kClusterMaxSeqs;
  while (seqs > 0 && !plan_of(ctx, op, seqs).usable) seqs -= clusters * kClusterOctet;
  return seqs;
}

void decoder_cluster(Context& ctx, const DecoderStep& op) {
  const Arena::Scope scope(ctx.workspace());
  const DecoderClusterPlan plan = plan_of(ctx, op, op.tokens.shape[0]);
  KRAIT_CHECK(plan.usable);
  const int64_t num_seqs = op.tokens.shape[0], d_model = op.norm_f.shape[0];
  const Tensor residual = ctx.workspace().tensor(op.residual_dtype, {num_seqs, d_model});
  DecoderClusterArgs args{};
  std::ranges::transform(op.layers, args.layer,
                         [&](const DecoderLayer& l) { return args_of(l, plan); });
  args.cut = plan;
  args.n_layer = static_cast<int>(op.layers.size());
  args.embedding = op.embedding.ptr<bf16>();
  args.eps = op.norm_eps;
  args.per_d_model = 1.0f / static_cast<float>(d_model);
  args.residual_f32 = op.residual_dtype == DType::f32;
  std::vector<DecoderLayer> layers;
  for (int64_t pass = 0; pass < plan.passes; ++pass) {
    const int64_t begin = num_seqs * pass / plan.passes, end = num_seqs * (pass + 1) / plan.passes;
    launch_pass(state_of(ctx), part_of(op, begin, end, layers), residual.slice(0, begin, end),
                args);
  }
  decoder_logits(ctx, op, residual);
}

}  // namespace krait::cuda
