// Decoder step of few sequences on the GPU: one persistent kernel for the whole model.
#include <algorithm>

#include "core/dtype.h"
#include "ops/cuda/arguments.h"
#include "ops/cuda/state.h"
#include "ops/decoder_step_block.cuh"
#include "ops/decoder_step_prefetch.cuh"
#include "ops/decoder_ways.h"

namespace krait::cuda {
namespace {

static_assert(sizeof(DecoderArgs) <= 32764);  // what arguments of a launch may take

// Grid: one block for each multiprocessor, all resident; which rows a block owns, and why that
// shape: decoder_step_plan.h. Four exchanges a layer (exchanged_words.cuh): the residual, u, x_dbl,
// y. A block withdraws what it published in the last layer only after it has taken over something
// that every reader of it published behind its reading. One warp copies weights, each once,
// into a ring in shared memory; the others multiply them, with what blocks exchange. Numerics:
// products of bf16 with sums in f32; weights of 8 bits times inputs of 16 bits (of the largest of
// their vector) with exact sums. A warp's share of a row as the tensor core adds, then the warps in
// order; rounded to bf16 where the ops' outputs are.
template <int kSeqs, class W>
__global__ void __launch_bounds__(kDecoderThreads + 32, 1)
    decoder_step_persistent(const __grid_constant__ DecoderArgs args) {
  extern __shared__ __align__(16) char memory[];
  const DecoderProducts<W> products(args, memory);
  const WeightRing ring(memory + args.shared.ring, memory + args.shared.barriers,
                        decoder_stages(kSeqs));
  products.fill();
  if (threadIdx.x == 0) ring.init();
  __syncthreads();  // products and barriers are there
  if (threadIdx.x >= kDecoderThreads)
    stream_weights(products, ring, PrefetchAhead<kSeqs, W>(args, products));
  else
    Decoder<kSeqs, W>(args, products, ring, memory).run();
}

DecoderStepPlan plan_of(Context& ctx, const DecoderStep& op) {
  const State& state = state_of(ctx);
  return plan_decoder_step(shape_of(op), state.multiprocessors, state.shared_bytes_per_block);
}

DecoderLayerArgs args_of(const DecoderLayer& l) {
  return {.norm = f32(l.norm),
          .in_scale = f32(l.in_proj_scale),
          .in_bias = f32(l.in_proj_bias),
          .conv_weight = f32(l.conv1d_weight),
          .conv_bias = f32(l.conv1d_bias),
          .dt_bias = f32(l.dt_proj_bias),
          .A = f32(l.A),
          .D = f32(l.D),
          .out_scale = f32(l.out_proj_scale),
          .out_bias = f32(l.out_proj_bias),
          .in_proj = l.in_proj.data,
          .x_proj = l.x_proj.data,
          .out_proj = l.out_proj.data,
          .dt_proj = l.dt_proj.ptr<bf16>(),
          .conv = l.conv.data,
          .ssm = l.ssm.data};
}

// Before the exchanged words, a line for DecoderArgs::done.
constexpr int kWordsBefore = 32;

// All but the layers and the sequences.
DecoderArgs args_of(const DecoderStep& op, const DecoderStepPlan& plan, void* exchange) {
  const DecoderShape s = shape_of(op);
  const DecoderExchange e = DecoderExchange::of(s, plan.seqs);
  DecoderArgs a{};
  a.done = static_cast<uint32_t*>(exchange);
  a.words = static_cast<ExchangedWord*>(exchange) + kWordsBefore;
  a.layer_words = static_cast<int>(e.words);
  a.layer_places = static_cast<int>(e.places);
  a.residual = static_cast<int>(e.residual);
  a.u = static_cast<int>(e.u);
  a.y = static_cast<int>(e.y);
  a.x_dbl = static_cast<int>(e.x_dbl);
  a.shared = DecoderShared::of(s, plan);
  a.d_model = static_cast<int>(s.d_model);
  a.d_inner = static_cast<int>(s.d_inner);
  a.d_state = static_cast<int>(s.d_state);
  a.dt_rank = static_cast<int>(s.dt_rank);
  a.x_proj_rows = static_cast<int>(s.x_proj_rows());
  a.vocab_size = static_cast<int>(s.vocab_size);
  a.narrow_stride = static_cast<int>(plan.narrow_stride);
  a.wide_stride = static_cast<int>(plan.wide_stride);
  a.max_channels = static_cast<int>(plan.max_channels);
  a.max_out_rows = static_cast<int>(plan.max_out_rows);
  a.eps = op.norm_eps;
  a.streams = plan.streams;
  a.per_d_model = 1.0f / static_cast<float>(s.d_model);
  a.bf16_states = op.layers[0].ssm.dtype == DType::bf16;
  a.residual_f32 = op.residual_dtype == DType::f32;
  a.logits_stride = op.logits.stride[0];
  return a;
}

template <int kSeqs, class W>
void launch(const DecoderStepPlan& plan, cudaStream_t stream, DecoderArgs& args) {
  const auto kernel = decoder_step_persistent<kSeqs, W>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(plan.shared_bytes)),
        "asking for shared memory");
  void* arguments[] = {&args};
  check(
      cudaLaunchCooperativeKernel(kernel, dim3(static_cast<unsigned>(plan.blocks)),
                                  dim3(kDecoderThreads + 32), arguments, plan.shared_bytes, stream),
      "decoder_step_persistent");
}

template <class W>
void launch(const DecoderStepPlan& plan, cudaStream_t stream, DecoderArgs& args) {
  if (plan.seqs == 1) return launch<1, W>(plan, stream, args);
  launch<kDecoderMaxSeqs, W>(plan, stream, args);
}

// The layers, at most kDecoderMaxLayers a launch.
void launch_layers(const DecoderStep& op, const DecoderStepPlan& plan, cudaStream_t stream,
                   DecoderArgs& a) {
  a.num_seqs = static_cast<int>(op.tokens.shape[0]);
  a.tokens = op.tokens.ptr<int32_t>();
  a.logits = op.logits.ptr<float>();
  a.slot = i32(op.slot);
  const size_t n_layer = op.layers.size();
  for (size_t first = 0; first < n_layer; first += kDecoderMaxLayers) {
    const size_t count = std::min<size_t>(kDecoderMaxLayers, n_layer - first);
    const bool last = first + count == n_layer;
    a.n_layer = static_cast<int>(count);
    a.first_layer = static_cast<int>(first);
    for (size_t i = 0; i < count; ++i) a.layer[i] = args_of(op.layers[first + i]);
    a.embedding = first == 0 ? op.embedding.ptr<bf16>() : nullptr;
    a.norm_f = last ? f32(op.norm_f) : nullptr;
    a.head = last ? op.head.data : nullptr;
    a.head_scale = last ? f32(op.head_scale) : nullptr;
    if (op.head.dtype == DType::i8)
      launch<int8_t>(plan, stream, a);
    else
      launch<bf16>(plan, stream, a);
  }
}

}  // namespace

int64_t persistent_takes(Context& ctx, const DecoderStep& op) {
  if (!state_of(ctx).cooperative || op.embedding.dtype != DType::bf16) return 0;
  for (const DecoderLayer& l : op.layers) {
    if (l.in_proj.dtype != op.head.dtype || l.out_proj.dtype != op.head.dtype) return 0;
    for (const Tensor* t :
         {&l.norm, &l.in_proj, &l.conv1d_weight, &l.x_proj, &l.dt_proj, &l.A, &l.out_proj, &l.ssm})
      if (!aligned(*t)) return 0;
  }
  if (!aligned(op.embedding) || !aligned(op.head) || !aligned(op.norm_f)) return 0;
  const DecoderStepPlan plan = plan_of(ctx, op);
  return plan.usable ? plan.seqs : 0;
}

void decoder_persistent(Context& ctx, const DecoderStep& op) {
  const DecoderStepPlan plan = plan_of(ctx, op);
  KRAIT_CHECK(plan.usable && op.tokens.shape[0] <= plan.seqs);
  State& state = state_of(ctx);
  const size_t bytes =
      static_cast<size_t>(plan.exchange_words + kWordsBefore) * sizeof(ExchangedWord);
  void* const exchange = state.lasting_memory(bytes);
  DecoderArgs args = args_of(op, plan, exchange);
  try {
    launch_layers(op, plan, state.stream, args);
  } catch (...) {
    // A first launch leaves words for the one that did not come.
    cudaMemsetAsync(exchange, 0, bytes, state.stream);
    throw;
  }
}

}  // namespace krait::cuda
