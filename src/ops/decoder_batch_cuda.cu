// Decoder step of many sequences on the GPU: in_proj with the convolution, x_proj, the scan with
// dt_proj, out_proj with the residual stream, each a kernel that starts while the one before it
// ends.
#include <algorithm>

#include "core/error.h"
#include "ops/cuda/arguments.h"
#include "ops/cuda/dependent_launch.cuh"
#include "ops/cuda/tensor_map.h"
#include "ops/cuda/vector.cuh"
#include "ops/decoder_batch_kernels.h"
#include "ops/decoder_ways.h"
#include "ops/linear_kernels.h"
#include "ops/selective_scan_plan.h"

namespace krait::cuda {
namespace {

constexpr int kThreads = 256, kVector = 8;

// Grid: a block for each sequence: its token's row becomes the residual stream r; x = bf16(r norm),
// and the sum of squares of the row as one tile.
template <class R>
__global__ void __launch_bounds__(kThreads)
    decoder_batch_embed(const int32_t* tokens, const bf16* embedding, const float* norm,
                        R* residual, bf16* x, float* squares, int d_model) {
  __shared__ float of_warp[kThreads / 32];
  wait_for_earlier_work();
  let_next_start();
  const int64_t seq = blockIdx.x;
  const bf16* const from = embedding + tokens[seq] * int64_t{d_model};
  float sum = 0;
  for (int i = static_cast<int>(threadIdx.x) * kVector; i < d_model; i += kThreads * kVector) {
    const Floats<kVector> r = load_vector<kVector>(from + i);
    Floats<kVector> weighted = load_vector<kVector>(norm + i);
#pragma unroll
    for (int k = 0; k < kVector; ++k) sum = fmaf(r[k], r[k], sum), weighted[k] *= r[k];
    store_vector(residual + seq * d_model + i, r);
    store_vector(x + seq * d_model + i, weighted);
  }
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < kThreads / 32; ++w) sum += of_warp[w];
  squares[seq] = sum;
}

DecoderBatchPlan plan_of(const Context& ctx, const DecoderStep& op, int64_t num_seqs) {
  static const DecoderBatchMachine machine = decoder_batch_machine();
  return plan_decoder_batch({.num_seqs = num_seqs,
                             .d_model = op.norm_f.shape[0],
                             .d_inner = op.layers[0].D.shape[0],
                             .state_bytes = static_cast<int>(size_of(op.layers[0].conv.dtype)),
                             .any_width = ctx.batch_invariant},
                            machine);
}

// What goes from kernel to kernel.
struct Activations {
  Tensor residual, x;  // (num_seqs, d_model)    R, T
  Tensor u, z, y;      // (num_seqs, d_inner)    T
  Tensor x_dbl;        // (num_seqs, dt_rank + 2 d_state)  T
  Tensor squares;      // (tiles, kDecoderBatchMaxSeqs)    f32
  Tensor dt, B, C;     // of x_dbl; (num_seqs, 1, d_state) twice

  Activations(Context& ctx, const DecoderStep& op, const DecoderBatchPlan& plan) {
    const DecoderLayer& l = op.layers[0];
    const int64_t n = op.tokens.shape[0], d_model = op.norm_f.shape[0], d_inner = l.D.shape[0];
    const int64_t dt_rank = l.dt_proj.shape[1], d_state = l.A.shape[1];
    const auto take = [&](DType type, int64_t rows, int64_t width) {
      return ctx.workspace().tensor(type, {rows, width});
    };
    residual = take(op.residual_dtype, n, d_model);
    x = take(DType::bf16, n, d_model);
    u = take(DType::bf16, n, d_inner);
    z = take(DType::bf16, n, d_inner);
    y = take(DType::bf16, n, d_inner);
    x_dbl = take(DType::bf16, n, dt_rank + 2 * d_state);
    squares = take(DType::f32, plan.out.tiles, kDecoderBatchMaxSeqs);
    dt = x_dbl.slice(1, 0, dt_rank);
    B = one_group(x_dbl.slice(1, dt_rank, dt_rank + d_state));
    C = one_group(x_dbl.slice(1, dt_rank + d_state, dt_rank + 2 * d_state));
  }
};

void embed(Context& ctx, const DecoderStep& op, const Activations& a) {
  const auto launch = [&]<class R>(R* residual) {
    launch_dependent(state_of(ctx), "decoder_batch_embed", decoder_batch_embed<R>,
                     {.grid = dim3(static_cast<unsigned>(a.x.shape[0])), .block = kThreads},
                     op.tokens.ptr<int32_t>(), op.embedding.ptr<bf16>(), f32(op.layers[0].norm),
                     residual, a.x.ptr<bf16>(), f32(a.squares), static_cast<int>(a.x.shape[1]));
  };
  if (op.residual_dtype == DType::f32)
    launch(a.residual.ptr<float>());
  else
    launch(a.residual.ptr<bf16>());
}

SelectiveScan scan_of(const DecoderLayer& l, const Tensor& slot, const Activations& a) {
  return {.u = a.u,
          .dt = a.dt,
          .A = l.A,
          .B = a.B,
          .C = a.C,
          .D = l.D,
          .dt_bias = l.dt_proj_bias,
          .z = a.z,
          .seq_start = {},
          .state = l.ssm,
          .slot = slot,
          .y = a.y,
          .saved = {},
          .dt_proj = l.dt_proj,
          .settled = true};
}

// squares: of the residual stream that comes in; next_norm: of what comes behind this layer.
void run_layer(Context& ctx, const DecoderStep& op, const DecoderBatchPlan& plan,
               const Activations& a, const DecoderLayer& l, int tiles, const Tensor& next_norm) {
  const State& gpu = state_of(ctx);
  launch_decoder_batch_in(gpu, plan.in,
                          {.squares = {f32(a.squares), tiles},
                           .eps = op.norm_eps,
                           .per_d_model = 1.0f / static_cast<float>(a.x.shape[1]),
                           .bias = f32(l.in_proj_bias),
                           .conv_weight = f32(l.conv1d_weight),
                           .conv_bias = f32(l.conv1d_bias),
                           .conv = l.conv.data,
                           .slot = i32(op.slot),
                           .bf16_states = l.conv.dtype == DType::bf16,
                           .u = a.u.ptr<bf16>(),
                           .z = a.z.ptr<bf16>()},
                          l.in_proj, a.x);
  const Linear x_proj = {
      .x = a.u, .weight = l.x_proj, .bias = {}, .y = a.x_dbl, .weight_scale = {}, .settled = true};
  // However few sequences there are: where inputs are so many, it is fast, and its rows know
  // nothing of each other.
  if (skinny_possible(gpu, x_proj))
    launch_skinny(ctx, x_proj);
  else
    krait::linear_fwd(ctx, x_proj);
  krait::selective_scan_step(ctx, scan_of(l, op.slot, a));
  launch_decoder_batch_out(gpu, plan.out,
                           {.bias = f32(l.out_proj_bias),
                            .residual = a.residual.data,
                            .residual_f32 = op.residual_dtype == DType::f32,
                            .norm = f32(next_norm),
                            .x = a.x.ptr<bf16>(),
                            .squares = f32(a.squares)},
                           l.out_proj, a.y);
}

// Shapes, and memory that is aligned.
bool scan_projects(const DecoderStep& op) {
  const DecoderLayer& l = op.layers[0];
  return scan_step_projects_shape({.tokens = op.tokens.shape[0],
                                   .num_seqs = op.tokens.shape[0],
                                   .d_inner = l.D.shape[0],
                                   .d_state = l.A.shape[1],
                                   .n_groups = 1,
                                   .state_bytes = static_cast<int>(size_of(l.ssm.dtype))},
                                  l.dt_proj.shape[1]) &&
         std::ranges::all_of(op.layers, [](const DecoderLayer& layer) {
           return aligned(layer.A) && aligned(layer.ssm) && aligned(layer.dt_proj);
         });
}

}  // namespace

int64_t batch_takes(Context& ctx, const DecoderStep& op) {
  if (!many_possible(ctx, op) || op.layers[0].conv1d_weight.shape[1] != 4) return 0;
  for (const DecoderLayer& l : op.layers) {
    if (!l.dt_proj || l.in_proj.dtype != DType::bf16 || l.out_proj.dtype != DType::bf16 ||
        !tiles_possible(l.in_proj) || !tiles_possible(l.out_proj))
      return 0;
    for (const Tensor* t : {&l.norm, &l.in_proj_bias, &l.conv1d_weight, &l.conv1d_bias,
                            &l.out_proj_bias, &l.conv, &l.x_proj})
      if (!aligned(*t)) return 0;
  }
  if (!aligned(op.norm_f) || !scan_projects(op)) return 0;
  int64_t seqs = kDecoderBatchMaxSeqs;
  while (seqs > 0 && !plan_of(ctx, op, seqs).usable) seqs /= 2;
  return seqs;
}

void decoder_batch(Context& ctx, const DecoderStep& op) {
  const Arena::Scope scope(ctx.workspace());
  const DecoderBatchPlan plan = plan_of(ctx, op, op.tokens.shape[0]);
  KRAIT_CHECK(plan.usable);
  const Activations a(ctx, op, plan);
  embed(ctx, op, a);
  int tiles = 1;
  for (size_t i = 0; i < op.layers.size(); ++i) {
    const bool last = i + 1 == op.layers.size();
    run_layer(ctx, op, plan, a, op.layers[i], tiles, last ? op.norm_f : op.layers[i + 1].norm);
    tiles = static_cast<int>(plan.out.tiles);
  }
  decoder_logits(ctx, op, a.residual);
}

}  // namespace krait::cuda
