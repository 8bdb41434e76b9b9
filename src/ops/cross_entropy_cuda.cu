// Strategy: the logits of a chunk of tokens at a time, in f32 (rounding them to bf16 would cost the
// probabilities 2 % at a logit of 10). Each row's gradient takes the place of its logits, in T, so
// that a chunk needs memory once; then two products with the chunk give dx and add to dweight.
#include <cfloat>

#include "ops/cross_entropy_plan.h"
#include "ops/cuda/math.cuh"
#include "ops/cuda/state.h"
#include "ops/cuda/vector.cuh"
#include "ops/engine.h"

namespace krait::cuda {
namespace {

constexpr int kWidth = 4;    // elements of a vector access
constexpr int kVectors = 4;  // vectors that a thread has in flight
constexpr int kWarp = 32;

struct Rows {
  float* logits;  // (count, pitch)
  const int32_t* targets;
  float* loss;
  int64_t count, pitch;
  int vocab_size;
  float scale;  // of the gradient
};

struct MaxSum {
  float max, sum;  // sum of exp(logit - max)
};

// Scales both sums to the larger maximum; an empty side has max -FLT_MAX and sum 0.
__device__ MaxSum merge(MaxSum a, MaxSum b) {
  const float max = fmaxf(a.max, b.max);
  return {max, fmaf(a.sum, exp2_approx((a.max - max) * kLog2E),
                    b.sum * exp2_approx((b.max - max) * kLog2E))};
}

// Over the kGroup threads of a row, in fixed order; every thread gets the result.
template <int kGroup>
__device__ MaxSum reduce(MaxSum x) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2)
    x = merge(x, {__shfl_xor_sync(~0u, x.max, step), __shfl_xor_sync(~0u, x.sum, step)});
  if constexpr (kGroup > kWarp) {
    __shared__ MaxSum of_warp[kGroup / kWarp];
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
    __syncthreads();  // every warp's result is there
    x = of_warp[0];
    for (int i = 1; i < kGroup / kWarp; ++i) x = merge(x, of_warp[i]);
  }
  return x;
}

// kVectors vectors of a thread: first, first + kGroup * kWidth, ..; beyond vocab_size -FLT_MAX.
template <int kGroup>
struct Batch {
  Floats<kWidth> at[kVectors];
  int first;

  static constexpr int kSpan = kGroup * kWidth * kVectors;  // elements of all threads

  __device__ Batch(const float* row, int begin, int lane, int vocab_size)
      : first(begin + lane * kWidth) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int column = column_of(i);
      at[i] = column < vocab_size ? load_vector<kWidth>(row + column) : constant<kWidth>(-FLT_MAX);
      if (column < vocab_size && column + kWidth > vocab_size) {
#pragma unroll
        for (int j = 1; j < kWidth; ++j)
          if (column + j >= vocab_size) at[i][j] = -FLT_MAX;
      }
    }
  }
  __device__ int column_of(int i) const { return first + i * kGroup * kWidth; }
};

template <int kGroup>
__device__ MaxSum max_sum(const float* row, int lane, int vocab_size) {
  MaxSum total{-FLT_MAX, 0};
  for (int begin = 0; begin < vocab_size; begin += Batch<kGroup>::kSpan) {
    const Batch<kGroup> x(row, begin, lane, vocab_size);
    float max = total.max;
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
#pragma unroll
      for (int j = 0; j < kWidth; ++j) max = fmaxf(max, x.at[i][j]);
    float sum = total.sum * exp2_approx((total.max - max) * kLog2E);
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      if (x.column_of(i) < vocab_size) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) sum += exp2_approx((x.at[i][j] - max) * kLog2E);
      }
    total = {max, sum};
  }
  return reduce<kGroup>(total);
}

// Writes the gradient, in T, over the row it is made from.
template <class T, int kGroup>
__device__ void gradient_row(float* row, int lane, const Rows& rows, int target, MaxSum norm) {
  T* to = reinterpret_cast<T*>(row);
  const float inverse = 1 / norm.sum, factor = rows.scale * inverse;
  for (int begin = 0; begin < rows.vocab_size; begin += Batch<kGroup>::kSpan) {
    Batch<kGroup> x(row, begin, lane, rows.vocab_size);
    // What is written in bf16 covers logits up to the middle of this batch: all threads have them.
    if constexpr (sizeof(T) < sizeof(float) && kGroup > kWarp) __syncthreads();
    if constexpr (sizeof(T) < sizeof(float) && kGroup == kWarp) __syncwarp();
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int column = x.column_of(i);
      if (column >= rows.vocab_size) break;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float e = exp2_approx((x.at[i][j] - norm.max) * kLog2E);
        x.at[i][j] = target < 0             ? 0
                     : column + j == target ? fmaf(e, inverse, -1.0f) * rows.scale
                                            : e * factor;
      }
      store_vector(to + column, x.at[i]);  // up to the pitch
    }
  }
}

// Grid: rows, blockDim / kGroup of them to a block; kGroup threads own a row. Reads the logits, a
// second time for the gradient (from the L2 cache, mostly) and writes it: 4 bytes an element, and 4
// or 2 more. Numerics: exp2 with an argument rounded once; sums per thread, then a tree.
template <class T, int kGroup, bool kGradient>
__global__ void __launch_bounds__(kGroup > 256 ? kGroup : 256) cross_entropy_rows(Rows rows) {
  const int64_t t = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kGroup;
  if (t >= rows.count) return;  // whole warps, where a block has several rows
  const int lane = static_cast<int>(threadIdx.x) % kGroup;
  float* row = rows.logits + t * rows.pitch;
  const int target = rows.targets[t];
  if (!kGradient && target < 0) {
    if (lane == 0) rows.loss[t] = 0;
    return;
  }
  const MaxSum norm = max_sum<kGroup>(row, lane, rows.vocab_size);
  if (lane == 0) {
    // A target beyond the vocabulary cannot be reported from here: its loss is no number.
    const float logit = target < 0                 ? 0
                        : target < rows.vocab_size ? row[target]
                                                   : __int_as_float(0x7fffffff);
    rows.loss[t] = target < 0 ? 0 : logf(norm.sum) + (norm.max - logit);
  }
  if constexpr (kGradient) {
    // Thread 0 has read the target's logit, which the gradient overwrites.
    if constexpr (kGroup > kWarp)
      __syncthreads();
    else
      __syncwarp();
    gradient_row<T, kGroup>(row, lane, rows, target, norm);
  }
}

template <class T, bool kGradient>
void launch_rows(Context& ctx, const CrossEntropyPlan& plan, const Rows& rows) {
  const auto blocks = static_cast<unsigned>(plan.blocks(rows.count));
  const auto threads = static_cast<unsigned>(plan.threads);
  const cudaStream_t stream = state_of(ctx).stream;
  if (plan.threads_per_row == 32)
    cross_entropy_rows<T, 32, kGradient><<<blocks, threads, 0, stream>>>(rows);
  else if (plan.threads_per_row == 256)
    cross_entropy_rows<T, 256, kGradient><<<blocks, threads, 0, stream>>>(rows);
  else
    cross_entropy_rows<T, 1024, kGradient><<<blocks, threads, 0, stream>>>(rows);
  check_launch("cross_entropy_rows");
}

// body(chunk of op, its first token, its logits, the same as the row kernels take them), in order.
template <class F>
void for_each_chunk(Context& ctx, const CrossEntropy& op, const CrossEntropyPlan& plan, F&& body) {
  const int64_t tokens = op.x.shape[0], vocab_size = op.weight.shape[0];
  const Arena::Scope scope(ctx.workspace());
  const Tensor memory =
      ctx.workspace().tensor(DType::f32, {std::min(tokens, plan.chunk_tokens), plan.pitch});
  for (int64_t begin = 0; begin < tokens; begin += plan.chunk_tokens) {
    const int64_t end = std::min(tokens, begin + plan.chunk_tokens);
    const CrossEntropy chunk = {.x = op.x.slice(0, begin, end),
                                .weight = op.weight,
                                .targets = op.targets.slice(0, begin, end),
                                .loss = op.loss.slice(0, begin, end)};
    const Tensor logits = memory.slice(0, 0, end - begin).slice(1, 0, vocab_size);
    cuda::linear_fwd(ctx, {.x = chunk.x, .weight = op.weight, .bias = {}, .y = logits});
    body(chunk, begin, logits,
         Rows{.logits = logits.ptr<float>(),
              .targets = chunk.targets.ptr<int32_t>(),
              .loss = chunk.loss.ptr<float>(),
              .count = end - begin,
              .pitch = plan.pitch,
              .vocab_size = static_cast<int>(vocab_size),
              .scale = 0});
  }
}

}  // namespace

void cross_entropy_fwd(Context& ctx, const CrossEntropy& op) {
  const auto plan = CrossEntropyPlan::make(op.x.shape[0], op.weight.shape[0]);
  for_each_chunk(ctx, op, plan, [&](const CrossEntropy&, int64_t, const Tensor&, const Rows& rows) {
    launch_rows<float, false>(ctx, plan, rows);
  });
}

void cross_entropy_bwd(Context& ctx, const CrossEntropy& op, const CrossEntropyGrad& grad) {
  const auto plan = CrossEntropyPlan::make(op.x.shape[0], op.weight.shape[0]);
  for_each_chunk(ctx, op, plan,
                 [&](const CrossEntropy& chunk, int64_t begin, const Tensor& logits, Rows rows) {
                   rows.scale = grad.scale;
                   dispatch_f32_bf16(op.x.dtype, [&](auto t) {
                     launch_rows<typename decltype(t)::type, true>(ctx, plan, rows);
                   });
                   Tensor dlogits =
                       logits;  // in T, each row at the start of the f32 row it replaces
                   dlogits.dtype = op.x.dtype;
                   dlogits.stride[0] *= static_cast<int64_t>(sizeof(float) / size_of(op.x.dtype));
                   cuda::linear_bwd(ctx, {.x = chunk.x, .weight = op.weight, .bias = {}, .y = {}},
                                    {.dy = dlogits,
                                     .dx = grad.dx.slice(0, begin, begin + logits.shape[0]),
                                     .dweight = grad.dweight,
                                     .dbias = {}});
                 });
}

}  // namespace krait::cuda
